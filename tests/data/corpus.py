"""A small corpus for the shard tests: recordings of noise, a manifest, and a tiny Mimi with random weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import soundfile
import torch
from transformers import MimiConfig, MimiModel

K, CARD = 4, 16


def save_tiny_mimi(folder: Path, seed: int = 0) -> Path:
    """A Mimi of 126 k random weights at the published rates, whose codebooks are spread so that codes vary."""
    torch.manual_seed(seed)
    config = MimiConfig(
        hidden_size=32,
        upsample_groups=32,
        num_filters=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=32,
        codebook_size=CARD,
        codebook_dim=16,
        vector_quantization_hidden_dimension=16,
        num_quantizers=K,
        sliding_window=20,
    )
    model = MimiModel(config)
    for name, buffer in model.named_buffers():
        if name.endswith("embed_sum"):
            buffer.copy_(0.01 * torch.randn(buffer.shape))
        elif name.endswith("cluster_usage"):
            buffer.fill_(1.0)
    model.save_pretrained(folder)
    return folder


def write_wave(path: Path, seconds: float, rate: int = 22_050, seed: int = 0, channels: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).normal(0, 0.1, (round(seconds * rate), channels))
    soundfile.write(path, noise, rate)


def write_manifest(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    return path


def make_corpus(folder: Path, count: int = 10) -> tuple[Path, list[dict[str, Any]]]:
    """Lines of every kind: transcription, a cut, speech to be encoded, ready codes, a conversation; and where they lie."""
    lines: list[dict[str, Any]] = []
    for number in range(count):
        name = f"wavs/u{number}.wav"
        write_wave(folder / name, 0.3 + 0.05 * (number % 3), (16_000, 22_050, 44_100)[number % 3], number, 1 + number % 2)
        line: dict[str, Any] = {"id": f"utt-{number}", "audio": name, "text": f"word {number}", "task": "transcribe"}
        if number % 5 == 1:
            line |= {"start": 0.1, "end": 0.25, "attributes": {"speaker": "a", "age": 40}}
        elif number % 5 == 2:
            line |= {"task": "speech_to_speech", "target_audio": f"wavs/u{number - 1}.wav"}
        elif number % 5 == 3:
            codes = np.random.default_rng(number).integers(0, CARD, (K, 5 + number), dtype=np.uint16)
            np.save(folder / f"c{number}.npy", codes)
            line |= {"task": "answer", "codes": f"c{number}.npy"}
        elif number % 5 == 4:
            line = {"id": f"utt-{number}", "task": "converse", "source": "talks", "messages": conversation(name)}
        lines.append(line)
    return write_manifest(folder / "corpus.jsonl", lines), lines


def conversation(wave: str) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [{"type": "audio", "audio": wave}, {"type": "text", "text": "and?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}, {"type": "codes", "audio": wave}]},
        {"role": "user", "content": [{"type": "audio", "audio": wave, "start": 0.1}]},
        {"role": "assistant", "content": [{"type": "text", "text": "bye"}, {"type": "codes", "codes": "c3.npy"}]},
    ]


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file that is not hidden, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def flip_bit(path: Path, byte: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))
