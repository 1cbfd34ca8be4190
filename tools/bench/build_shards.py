"""Building shards beside the codec alone: the same clips, decoded, resampled, gated, encoded and written, or encoded only."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import orjson
import soundfile
import torch
import typer
from common import in_turns, median_ratio, write_result
from encode_mimi import published_mimi

from megatron_omni.audio.codec import load_codec
from megatron_omni.audio.waveform import read_audio, resample
from megatron_omni.data.building.builder import build_shards
from megatron_omni.data.building.codec_choice import CodecChoice
from megatron_omni.data.building.shard import FIRST_SECONDS, GROUP_SECONDS
from megatron_omni.runtime import cli


def main(
    clips: Annotated[int, typer.Option(help="spoken answers, 44.1 kHz FLAC")] = 60,
    shortest: Annotated[float, typer.Option(help="seconds")] = 1.0,
    longest: Annotated[float, typer.Option(help="seconds")] = 8.0,
    rounds: int = 3,
    workers: int = 1,
    device: str = "cpu",
    threads: Annotated[int, typer.Option(help="of the codec")] = 1,
) -> dict[str, object]:
    """Takes turns; the builder starts its processes and loads the codec anew each time, the bare loop has all waves in memory."""
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        published_mimi().network.model.save_pretrained(folder / "codec")
        lines = []
        for number, seconds in enumerate(random.uniform(shortest, longest, clips)):
            soundfile.write(folder / f"{number}.flac", random.normal(0, 0.1, int(44_100 * seconds)), 44_100)
            line = {"id": f"u{number}", "audio": f"{number}.flac", "text": "some words", "task": "speech_to_speech"}
            lines.append(orjson.dumps(line | {"target_audio": f"{number}.flac"}) + b"\n")
        (folder / "m.jsonl").write_bytes(b"".join(lines))
        torch.set_num_threads(threads)
        codec = load_codec(folder / "codec", device=device)
        waves = [resample(*read_audio(folder / f"{number}.flac"), codec.sample_rate) for number in range(clips)]
        groups, held, enough = [[]], 0.0, FIRST_SECONDS
        for wave in waves:  # as the builder groups them
            if held >= enough:
                groups.append([])
                held, enough = 0.0, min(2 * enough, GROUP_SECONDS)
            groups[-1].append(wave)
            held += wave.size / codec.sample_rate
        choice = CodecChoice(folder / "codec", devices=(device,), threads=threads)
        outs = iter(range(1000))
        times = in_turns(
            {
                "build": lambda: build_shards(folder / "m.jsonl", folder / f"out{next(outs)}", choice, workers=workers),
                "codec": lambda: [codec.encode(group) for group in groups],
                "codec_one_by_one": lambda: [codec.encode([wave]) for wave in waves],
                "start": lambda: choice.load(device),
            },
            rounds,
        )
        seconds = sum(wave.size for wave in waves) / codec.sample_rate
    return write_result(
        f"build_shards_{device.split(':')[0]}",
        {
            "audio_seconds": seconds,
            "workers": workers,
            "codec_threads": threads,
            "median_seconds": {name: statistics.median(taken) for name, taken in times.items()},
            "build_over_codec": median_ratio(times, "codec", "build"),
            "build_over_codec_without_loading": statistics.median(
                codec / (build - start) for build, codec, start in zip(times["build"], times["codec"], times["start"], strict=True)
            ),
            "build_over_one_by_one": median_ratio(times, "codec_one_by_one", "build"),
        },
        ("transformers", "soundfile", "soxr"),
    )


if __name__ == "__main__":
    cli.command(main)
