"""Packed shards: the rows of a plan with their samples, one tar sample per row, read front to back.

::

    DIR/rows.json               what it is: plan fingerprint, row shape, codec, shards; written last
    DIR/rows-000000.tar         WebDataset: row-000000000.0.json, row-000000000.0.audio0.flac, row-000000000.1.json, ...
    DIR/rows-000000.index       where each member lies (``shards.index``)
    DIR/{demands,rows,windows}.npy

A row holds its samples as they were recorded, audio still compressed: half the size of its features, the same whatever
the tensor-parallel size, and open to augmentation. Its tensors are made by the one ``collate``, so they are those of the
lazy plan bit by bit. What it saves is planning, tokenizing lengths and, above all, a seek or request per sample.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_omni.config.model import CodecConfig
from megatron_omni.data.rows.demands import Demands, Samples
from megatron_omni.data.rows.plan import PlanFingerprint, Played
from megatron_omni.data.rows.saved import SavedPlan, row_bounds
from megatron_omni.data.rows.selection import SplitSamples
from megatron_omni.data.shards.dataset import ShardedDataset
from megatron_omni.data.shards.index import IndexedSample, Member
from megatron_omni.data.shards.shard import Shard
from megatron_omni.data.shards.writer import ShardWriter
from megatron_omni.runtime.cli import progress
from megatron_omni.runtime.errors import InputError, WorkError
from megatron_omni.runtime.files import atomic_open, atomic_write
from megatron_omni.schema import RowShape, Sample, SampleArrays

ROWS_PER_SHARD = 128
_ARRAYS = ("demands", "rows", "windows")


class _Description(BaseModel):
    """``rows.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fingerprint: PlanFingerprint
    shape: RowShape
    codec: CodecConfig | None
    first: int
    """Number of the first window."""
    windows_per_epoch: int
    longest_clip: int
    rows_per_shard: int
    shards: tuple[str, ...]
    """sha256 of each tar, hex."""


def materialize(
    plan: SavedPlan, samples: Samples, longest_clip: int, fingerprint: PlanFingerprint, out: Path, rows_per_shard: int = ROWS_PER_SHARD
) -> None:
    """Writes the rows of ``plan``, whose numbers are those of ``samples``, to ``out``.

    Raises:
        InputError: ``samples`` are not those of shards.
        WorkError: a sample is damaged.
    """
    (out / "rows.json").unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    bounds = list(zip(plan.rows[:-1].tolist(), plan.rows[1:].tolist(), strict=True))
    hashes = []
    for shard, begin in enumerate(progress(range(0, len(bounds), rows_per_shard), "writing rows")):
        with ShardWriter(out / _name(shard)) as writer:
            for row, (start, stop) in enumerate(bounds[begin : begin + rows_per_shard], begin):
                members = (part for place, number in enumerate(plan.samples[start:stop]) for part in _members(samples, int(number), place))
                writer.add_members(f"row-{row:09d}", "row", members)
        hashes.append(writer.tar_sha256)
    for name, array in (("demands", plan.demands[plan.samples]), ("rows", plan.rows), ("windows", plan.windows)):
        with atomic_open(out / f"{name}.npy") as file:
            np.save(file, array, allow_pickle=False)
    description = _Description(
        fingerprint=fingerprint,
        shape=plan.shape,
        codec=samples.codec,
        first=plan.first,
        windows_per_epoch=plan.windows_per_epoch,
        longest_clip=longest_clip,
        rows_per_shard=rows_per_shard,
        shards=tuple(hashes),
    )
    atomic_write(out / "rows.json", description.model_dump_json(indent=2))


class MaterializedRows:
    """Both a plan and its samples: numbers count the samples of the rows in the order of the rows.

    Pickled and sent to another process it opens its own files.
    """

    def __init__(self, folder: Path) -> None:
        """``InputError`` where no finished folder of packed rows is."""
        try:
            self._about = _Description.model_validate_json((folder / "rows.json").read_bytes())
            self.demands, self._rows, self._windows = (np.load(folder / f"{name}.npy", "r", allow_pickle=False) for name in _ARRAYS)
        except (OSError, ValueError, ValidationError) as error:
            raise InputError(f"no packed rows in {folder}: {error}; write them with tools/pack_sequences.py --materialize") from error
        self._folder = folder
        self._shard = functools.lru_cache(16)(self._open_shard)
        self._row = functools.lru_cache(16)(self._find_row)

    @staticmethod
    def is_at(folder: Path) -> bool:
        return (folder / "rows.json").exists()

    def __reduce__(self) -> tuple[type[MaterializedRows], tuple[Path]]:
        return MaterializedRows, (self._folder,)

    @property
    def plan_fingerprint(self) -> PlanFingerprint:
        return self._about.fingerprint

    # the plan

    @property
    def shape(self) -> RowShape:
        return self._about.shape

    @property
    def windows_per_epoch(self) -> int:
        return self._about.windows_per_epoch

    @property
    def measured(self) -> Demands:
        return Demands(self.demands, self._about.longest_clip)

    def window(self, ordinal: int) -> list[np.ndarray]:
        """As ``RowPlan.window``, in its own numbers; ``InputError`` for a window that was not written."""
        first, count = self._about.first, len(self._windows) - 1
        if not first <= ordinal < first + count:
            epochs = self.windows_per_epoch
            raise InputError(
                f"{self._folder} holds the rows of epochs {first // epochs} to {(first + count) // epochs - 1}, training asks for epoch "
                f"{ordinal // epochs}: write more with tools/pack_sequences.py --epochs, or leave data.plan out"
            )
        return [np.arange(start, stop) for start, stop in row_bounds(self._rows, self._windows, ordinal - first)]

    def played(self, ordinal: int, samples: np.ndarray) -> Played:
        """As they were recorded, always (``write_rows``)."""
        return Played(self.demands[samples], np.ones(len(samples)))

    # the samples

    @property
    def fingerprint(self) -> str:
        """Of the data set that the rows were made of."""
        return self._about.fingerprint.data

    @property
    def codec(self) -> CodecConfig | None:
        return self._about.codec

    def __len__(self) -> int:
        return len(self.demands)

    def sample(self, number: int, /) -> Sample:
        shard, row, members = self._place(number)
        try:
            return Sample.from_json(orjson.loads(shard.read(row, members[0])))
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise shard.fault(row, members[0], f"is no sample of format v1 ({error!r})") from error

    def arrays(self, number: int, /) -> SampleArrays:
        shard, row, members = self._place(number)
        named = {member.suffix.split(".")[1]: member for member in members[1:]}
        audio = {name: shard.audio(row, member) for name, member in named.items() if name.startswith("audio")}
        codes = {name: member for name, member in named.items() if name.startswith("codes")}
        if codes and self.codec is None:
            raise WorkError(f"{self._folder}: rows.json names no codec, yet {row.key} holds codes; write the rows again")
        return SampleArrays(audio, {name: shard.codes(row, member, self.codec) for name, member in codes.items() if self.codec})

    def _place(self, number: int) -> tuple[Shard, IndexedSample, list[Member]]:
        row = int(np.searchsorted(self._rows, number, side="right")) - 1
        indexed, by_sample = self._row(row)
        return self._shard(row // self._about.rows_per_shard), indexed, by_sample[number - int(self._rows[row])]

    def _find_row(self, row: int) -> tuple[IndexedSample, list[list[Member]]]:
        shard, place = divmod(row, self._about.rows_per_shard)
        indexed = self._shard(shard).index[place]
        by_sample: list[list[Member]] = []
        for member in indexed.members:
            if member.suffix.endswith(".json"):
                by_sample.append([])
            by_sample[-1].append(member)
        return indexed, by_sample

    def _open_shard(self, number: int) -> Shard:
        shard = Shard(self._folder / _name(number))
        if shard.index.tar_sha256 != self._about.shards[number]:
            raise WorkError(f"{shard.path}: is not the shard that rows.json names; write the rows again")
        return shard


def _name(shard: int) -> str:
    return f"rows-{shard:06d}.tar"


def _members(samples: Samples, number: int, place: int) -> Iterator[tuple[str, bytes, int]]:
    """Suffix, bytes and length of the members of a sample, the JSON first; arrays as they lie in the shards."""
    sample = samples.sample(number)
    yield f"{place}.json", orjson.dumps(sample.to_json()), 0
    base, origin = (samples.base, samples.origin(number)) if isinstance(samples, SplitSamples) else (samples, number)
    if not isinstance(base, ShardedDataset):
        raise InputError(f"packed shards are made of shards, not of {type(base).__name__}")
    for member, data in base.members(origin):
        if member.name in sample.num_samples or member.name in sample.num_frames:
            yield f"{place}.{member.suffix}", data, member.length
