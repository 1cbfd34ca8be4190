"""Checks a data set byte by byte and meaning by meaning: hashes, the tar's own directory, every member, every id."""

from __future__ import annotations

import multiprocessing
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import xxhash

from megatron_omni.data.shards.index import BESIDE, IndexedSample
from megatron_omni.data.shards.info import AUDIO_RATE, DatasetInfo
from megatron_omni.data.shards.shard import Shard
from megatron_omni.data.shards.table import ShardRecord, ShardTable
from megatron_omni.runtime.cli import progress
from megatron_omni.runtime.errors import WorkError
from megatron_omni.runtime.files import sha256_file


@dataclass(frozen=True)
class VerifySummary:
    shards: int
    samples: int
    hours: float
    """Of audio heard, decoded here."""
    faults: list[str]


def verify_shards(folder: Path, workers: int = 0) -> VerifySummary:
    """Reads and decodes everything and lists what is wrong.

    Args:
        workers: Processes that read a shard each; 0: this one does it.

    Raises:
        InputError: There is no finished data set in ``folder``.
    """
    try:
        info = DatasetInfo.read(folder)
        table = ShardTable(folder)
    except WorkError as error:
        return VerifySummary(0, 0, 0.0, [str(error)])
    faults = []
    if sha256_file(folder / "shards.bin") != info.table_sha256:
        faults.append(f"{folder / 'shards.bin'}: is not the table that dataset.json names; start make_shards again")
    records = [table[number] for number in range(len(table))]
    strangers = {path.name for path in folder.glob("*.tar")} - {record.name for record in records}
    faults += [f"{folder / name}: is not in the table of shards, yet a reader of *.tar would take it in" for name in sorted(strangers)]

    check = partial(_check_shard, folder, info)
    with ExitStack() as stack:
        if workers:
            found = stack.enter_context(ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))).map(check, records)
        else:
            found = map(check, records)
        checked = list(progress(found, "verifying shards", total=len(records)))
    faults += [fault for shard in checked for fault in shard.faults]
    hashes = [shard.keys for shard in checked]
    faults += _repeated_keys(folder, records, hashes)
    samples = sum(map(len, hashes))
    if (samples, len(records)) != (info.totals.samples, info.totals.shards):
        faults.append(
            f"{folder}: holds {samples} samples in {len(records)} shards, "
            f"dataset.json says {info.totals.samples} in {info.totals.shards}; start make_shards again"
        )
    return VerifySummary(len(records), samples, sum(shard.wave_samples for shard in checked) / AUDIO_RATE / 3600, faults)


@dataclass(frozen=True)
class _Checked:
    faults: list[str]
    keys: np.ndarray
    """uint64 hashes."""
    wave_samples: int


def _check_shard(folder: Path, info: DatasetInfo, record: ShardRecord) -> _Checked:
    path = folder / record.name
    faults = list(_file_faults(path, record))
    try:
        shard = Shard(path, record)
    except WorkError as error:
        return _Checked([*faults, str(error)], np.empty(0, np.uint64), 0)
    faults += _directory_faults(shard)
    for indexed in shard.index:
        faults += _sample_faults(shard, indexed, info)
    keys = np.array([xxhash.xxh3_64_intdigest(indexed.key.encode()) for indexed in shard.index], np.uint64)
    shard.close()
    return _Checked(faults, keys, int(shard.index.samples["wave_samples"].sum()))


def _file_faults(path: Path, record: ShardRecord) -> Iterator[str]:
    for file, expected in ((path, record.tar_sha256), (path.with_suffix(".index"), record.index_sha256)):
        try:
            found = sha256_file(file)
        except OSError as error:
            yield f"{file}: cannot be read ({error.strerror}); start make_shards again"
            continue
        if found != expected:
            yield f"{file}: sha256 is {found[:12]}..., the table of shards says {expected[:12]}...; remove it and start make_shards again"


def _directory_faults(shard: Shard) -> Iterator[str]:
    """The tar's own headers against the index: in order and by name in a tar of ours, by place in one that was only indexed."""
    expected = [(f"{sample.key}.{m.suffix}", m.offset, m.size) for sample in shard.index for m in sample.members]
    try:
        with tarfile.open(shard.path, "r:") as tar:
            found = [(member.name, member.offset_data, member.size) for member in tar]
    except (tarfile.TarError, EOFError) as error:
        yield f"{shard.path}: is no readable tar ({error})"
        return
    if any(offset & BESIDE for _, offset, _ in expected):
        places = {(offset, size) for _, offset, size in found}
        for name, offset, size in expected:
            if not offset & BESIDE and (offset, size) not in places:
                yield f"{shard.path}: the index has {name} ({size} bytes at {offset}) where the tar has no member"
        return
    for (name, offset, size), theirs in zip(expected, found, strict=False):
        if theirs != (name, offset, size):
            have = f"{theirs[0]} ({theirs[2]} bytes at {theirs[1]})"
            yield f"{shard.path}: the index has {name} ({size} bytes at {offset}) where the tar has {have}"
            return
    if len(found) != len(expected):
        yield f"{shard.path}: has {len(found)} members, its index {len(expected)}"


def _sample_faults(shard: Shard, indexed: IndexedSample, info: DatasetInfo) -> Iterator[str]:
    """Every member decodes, and the index, the JSON and the arrays agree."""
    lengths: dict[str, dict[str, int]] = {"audio": {}, "codes": {}}
    for member in indexed.members:
        try:
            if member.kind == "audio":
                shard.audio(indexed, member)
            elif member.kind == "codes":
                if info.codec is None:
                    raise shard.fault(indexed, member, "dataset.json names no codec")
                shard.codes(indexed, member, info.codec)
        except WorkError as error:
            yield str(error)
        if member.kind in lengths:
            lengths[member.kind][member.name] = member.length
    try:
        sample = shard.sample(indexed)
    except WorkError as error:
        yield str(error)
        return
    told = (sample.task, sample.num_samples, sample.num_frames)
    if told != (indexed.task, lengths["audio"], lengths["codes"]):
        yield f"{shard.path}: {indexed.key}.json says {told}, the index {(indexed.task, lengths['audio'], lengths['codes'])}"
    used = {(part.type, part.value) for message in sample.messages for part in message.content if part.type != "text"}
    there = {(kind, name) for kind, names in lengths.items() for name in names}
    if used != there:
        yield f"{shard.path}: {indexed.key}.json speaks of {sorted(used - there)} that are not there, or not of {sorted(there - used)}"


def _repeated_keys(folder: Path, records: list[ShardRecord], hashes: list[np.ndarray]) -> Iterator[str]:
    """Keys that occur twice; equal hashes are looked up, since different keys may share one."""
    if not hashes:
        return
    ends = np.cumsum([len(of_shard) for of_shard in hashes])
    every = np.concatenate(hashes)
    order = np.argsort(every, kind="stable")
    for place in np.flatnonzero(every[order][1:] == every[order][:-1]):
        (first, first_key), (second, second_key) = (_key_at(folder, records, ends, int(number)) for number in order[place : place + 2])
        if first_key == second_key:
            yield f"{second}: the key {second_key!r} occurs in {first} too; ids are unique: rename one in the manifest"


def _key_at(folder: Path, records: list[ShardRecord], ends: np.ndarray, number: int) -> tuple[Path, str]:
    shard_number = int(np.searchsorted(ends, number, side="right"))
    path = folder / records[shard_number].name
    shard = Shard(path)
    try:
        return path, shard.index[number - int(ends[shard_number]) + len(shard.index)].key
    finally:
        shard.close()
