"""One shard from one slice of a collection: the unit of work, the same for every engine.

::

    slice of the source -> decode, resample, gate -> groups of at most GROUP_SECONDS -> codec -> ShardWriter -> receipt

A receipt (``shard-000000.receipt.json``) is written last. It says what the shard was built from, its hashes and its rejects.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import xxhash
from pydantic import TypeAdapter, ValidationError

from megatron_omni.audio.codec import Mimi
from megatron_omni.data.building.options import BuildOptions
from megatron_omni.data.building.output import Output
from megatron_omni.data.building.prepare import Prepared, prepare
from megatron_omni.data.shards.table import ShardRecord
from megatron_omni.data.shards.writer import ShardWriter
from megatron_omni.data.sources.line import Reject
from megatron_omni.data.sources.source import Source

GROUP_SECONDS = 300.0
"""Speech that is collected before it is encoded: long enough to find clips of one length, 29 MB of waves at 24 kHz."""

FIRST_SECONDS = 10.0
"""Of a shard's first group; each next one is twice as long, so that the codec starts at once."""

CHUNK = 8
"""Samples that a process takes at a time."""


@dataclass(frozen=True)
class Slice:
    """Samples ``start .. stop - 1`` of the source, which become shard ``number``."""

    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"shard-{self.number:06d}.tar"

    @property
    def receipt(self) -> str:
        return f"shard-{self.number:06d}.receipt.json"

    def chunks(self) -> Iterator[Chunk]:
        for first in range(self.start, self.stop, CHUNK):
            yield Chunk(self.number, first, min(first + CHUNK, self.stop))


@dataclass(frozen=True)
class Chunk:
    """What a process takes at a time: some samples of one shard."""

    number: int
    start: int
    stop: int


def slices_of(source: Source, samples_per_shard: int) -> list[Slice]:
    starts = range(0, len(source), samples_per_shard)
    return [Slice(number, start, min(start + samples_per_shard, len(source))) for number, start in enumerate(starts)]


@dataclass(frozen=True)
class Receipt:
    """What was built from what."""

    inputs: str
    """``inputs_of`` the slice."""
    record: ShardRecord
    rejects: list[Reject]
    """Warnings too."""


_RECEIPT = TypeAdapter(Receipt)


def inputs_of(source: Source, part: Slice, options: BuildOptions) -> str:
    """Hash of all that the shard depends on; of files only size and time, so that a corrected file is seen."""
    return xxhash.xxh3_128_hexdigest(options.model_dump_json().encode() + b"\n" + source.identity(part.start, part.stop))


def read_receipt(out: Output, part: Slice) -> Receipt | None:
    data = out.read(part.receipt)
    try:
        return None if data is None else _RECEIPT.validate_json(data)
    except ValidationError:
        return None


def is_finished(out: Output, part: Slice, inputs: str) -> bool:
    """Whether the shard is there, of the same inputs, and whole."""
    receipt = read_receipt(out, part)
    if receipt is None or receipt.inputs != inputs:
        return False
    expected = (receipt.record.tar_sha256, receipt.record.index_sha256)
    return (out.sha256(part.name), out.sha256(part.name.replace(".tar", ".index"))) == expected


def prepare_chunk(source: Source, options: BuildOptions, chunk: Chunk) -> list[Prepared | Reject]:
    """Runs where the decoding is done."""
    return [prepare(entry, options) for entry in source.entries(chunk.start, chunk.stop)]


Group = list[Prepared | Reject]
Key = TypeVar("Key")


def groups_of(results: Iterable[tuple[Key, Prepared | Reject]], rate: int) -> Iterator[tuple[Key, Group]]:
    """Deals samples out in groups of up to about ``GROUP_SECONDS`` of speech at ``rate`` Hz, never across two keys."""
    group: Group = []
    held, seconds, enough = None, 0.0, FIRST_SECONDS
    for key, result in results:
        if group and (key != held or seconds >= enough or len(group) >= 1000):
            assert held is not None
            yield held, group
            enough = FIRST_SECONDS if key != held else min(2 * enough, GROUP_SECONDS)
            group, seconds = [], 0.0
        held = key
        group.append(result)
        seconds += result.seconds(rate) if isinstance(result, Prepared) else 0.0
    if group:
        assert held is not None
        yield held, group


def encoded(group: Group, codec: Mimi | None) -> Group:
    """The group with all speech as codes."""
    waves = [wave for item in group if isinstance(item, Prepared) for wave in item.waves.values()]
    codes = iter(codec.encode(waves) if codec is not None and waves else [])
    return [_with_codes(item, {name: next(codes) for name in item.waves}) if isinstance(item, Prepared) else item for item in group]


def _with_codes(prepared: Prepared, codes: dict[str, np.ndarray]) -> Prepared:
    named = prepared.codes | codes
    # in the order of their names, whichever came ready: codes2 before codes10
    ordered = {name: named[name] for name in sorted(named, key=lambda name: (len(name), name))}
    frames = {name: array.shape[1] for name, array in ordered.items()}
    return replace(prepared, sample=replace(prepared.sample, num_frames=frames), codes=ordered, waves={})


def write_shard(out: Output, part: Slice, inputs: str, groups: Iterable[Group]) -> Receipt:
    """Writes the tar, its index and, last, the receipt."""
    rejects: list[Reject] = []
    with out.shard(part.name) as path, ShardWriter(path) as writer:
        for item in (item for group in groups for item in group):
            if isinstance(item, Reject):
                rejects.append(item)
            else:
                rejects += item.warnings
                writer.add(item.sample, item.audio, item.codes)
    record = ShardRecord(
        name=part.name,
        tar_sha256=writer.tar_sha256,
        index_sha256=writer.index_sha256,
        tar_bytes=writer.tar_bytes,
        samples=len(writer.samples),
        rejected=sum(reject.action == "reject" for reject in rejects),
        wave_samples=sum(sample.length("audio") for sample in writer.samples),
        frames=sum(sample.length("codes") for sample in writer.samples),
    )
    receipt = Receipt(inputs, record, rejects)
    out.write(part.receipt, _RECEIPT.dump_json(receipt, indent=1))
    return receipt
