"""Small finished data sets, written without a builder, whose members may be anything."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import soundfile

from megatron_omni.audio.waveform import write_flac
from megatron_omni.data.shards.info import AUDIO_RATE, CodecProvenance, DatasetInfo, Totals
from megatron_omni.data.shards.table import ShardRecord, write_table
from megatron_omni.data.shards.writer import ShardWriter
from megatron_omni.schema import Message, Part, Sample

CODEC = CodecProvenance(name="tiny", num_codebooks=4, card=16, frame_rate=12.5, sample_rate=24_000)
WAVE, FRAMES = 1600, 6
PER_SHARD = 4

Members = list[tuple[str, bytes, int]]
"""Suffix, bytes and length, as ``ShardWriter.add_members`` takes them."""


def sample_of(number: int) -> Sample:
    messages = (
        Message("user", (Part("audio", "audio0"),)),
        Message("assistant", (Part("text", f"word {number}"), Part("codes", "codes0"))),
    )
    return Sample(f"s{number}", "speech_to_speech", "test", messages, {"audio0": WAVE}, {"codes0": FRAMES})


def codes_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, CODEC.card, (CODEC.num_codebooks, FRAMES), dtype=np.uint16)


def wave_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(0, 0.1, WAVE).astype(np.float32)


def npy(array: np.ndarray, pickled: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=pickled)
    return buffer.getvalue()


def members_of(number: int) -> Members:
    """Of a sample that is right."""
    return [
        ("json", orjson.dumps(sample_of(number).to_json()), 0),
        ("audio0.flac", write_flac(wave_of(number), AUDIO_RATE), WAVE),
        ("codes0.npy", npy(codes_of(number)), FRAMES),
    ]


def write_folder(folder: Path, shards: int = 2, changed: dict[int, tuple[str, Members]] | None = None) -> Path:
    """Shards of ``PER_SHARD`` samples ``s0``, ``s1``, ...; ``changed`` gives key and members of some of them."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for shard in range(shards):
        with ShardWriter(folder / f"shard-{shard:06d}.tar") as writer:
            for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                key, members = (changed or {}).get(number) or (f"s{number}", members_of(number))
                writer.add_members(key, "speech_to_speech", members)
        hashes = (writer.tar_sha256, writer.index_sha256)
        records.append(ShardRecord(writer.path.name, *hashes, writer.tar_bytes, PER_SHARD, 0, PER_SHARD * WAVE, PER_SHARD * FRAMES))
    write_info(folder, records)
    return folder


def write_info(folder: Path, records: Sequence[ShardRecord], **changed: Any) -> None:
    """``shards.bin`` and ``dataset.json``."""
    table = write_table(records)
    (folder / "shards.bin").write_bytes(table)
    samples = sum(record.samples for record in records)
    fields: dict[str, Any] = {
        "sample_rate": AUDIO_RATE,
        "codec": CODEC,
        "totals": Totals(samples=samples, rejected=0, shards=len(records), hours=0, speech_hours=0, bytes=0),
        "manifest": "test",
        "manifest_xxh3": "",
        "samples_per_shard": PER_SHARD,
        "command": "",
        "versions": {},
        "table_sha256": hashlib.sha256(table).hexdigest(),
    }
    (folder / "dataset.json").write_bytes(DatasetInfo(**fields | changed).to_json())


def foreign(path: Path, names: list[str], kind: bytes = tarfile.REGTYPE) -> Path:
    """A tar of someone else: recordings of noise, and ``word`` in all other members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wav = io.BytesIO()
    soundfile.write(wav, wave_of(0), AUDIO_RATE, format="WAV")
    with tarfile.open(path, "w") as tar:
        for name in names:
            data = wav.getvalue() if name.endswith("wav") else b"word"
            found = tarfile.TarInfo(name)
            found.type, found.size = kind, len(data) if kind == tarfile.REGTYPE else 0
            found.linkname = "" if kind == tarfile.REGTYPE else "/etc/passwd"
            tar.addfile(found, io.BytesIO(data))
    return path
