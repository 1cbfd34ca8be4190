"""What each sample of a data set takes of a row: measured once from texts and lengths, no audio read, and kept.

Tables lie in the user's cache directory, in a folder per tokenizer, encoder geometry and delay. A table names the shards
that it measured by their sha256, so a data set that grew by a shard, or lost one, or is mixed with another measures only
what no table has. Tables are mapped, not read: a start costs the same at a thousand samples and at a hundred million.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash
from filelock import FileLock

from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.config.model import CodecConfig
from megatron_omni.data.render import demand, render
from megatron_omni.data.rows.plan import RESOURCES, WINDOW_ROWS, PlanFingerprint, capacity, too_long
from megatron_omni.data.rows.speed import at_speed
from megatron_omni.data.shards.dataset import ShardedDataset
from megatron_omni.data.tokenizer import OmniTokenizer
from megatron_omni.runtime.cli import progress
from megatron_omni.runtime.files import atomic_open
from megatron_omni.runtime.logs import get_logger
from megatron_omni.schema import TASKS, RowShape, Sample, SampleArrays

logger = get_logger(__name__)
_VERSION = 2
_COLUMNS = len(RESOURCES) + 2  # and the longest clip, and the task
_CHUNK = 4096  # samples that one process measures at a time

BLOCK = np.dtype([("sha256", "V32"), ("samples", "<u8"), ("total", "<i8", (len(RESOURCES),)), ("largest", "<i8", (len(RESOURCES) + 1,))])
"""Of a shard: sums over its samples, and the largest of them with the longest clip as the last column."""


class Samples(Protocol):
    """A data set with random access; ``ShardedDataset`` is one."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def codec(self) -> CodecConfig | None: ...

    def __len__(self) -> int: ...

    def sample(self, number: int, /) -> Sample: ...

    def arrays(self, number: int, /) -> SampleArrays: ...


@dataclass(frozen=True, eq=False)
class Demands:
    """Of every sample of a data set."""

    table: np.ndarray
    """int32 [samples, 5], columns as ``plan.RESOURCES``; may be mapped."""
    longest_clip: int
    """Encoder frames of the largest slot of a single clip."""
    tasks: np.ndarray | None = None
    """int32 [samples]: place in ``schema.TASKS``; None where nobody asks for it."""
    blocks: np.ndarray | None = None
    """``BLOCK`` records of consecutive samples, where they are known; they save looking at each."""

    @cached_property
    def total(self) -> np.ndarray:
        """int64 [5]."""
        return self.table.sum(0, dtype=np.int64) if self.blocks is None else self.blocks["total"].sum(0)

    def too_long(self, shape: RowShape) -> np.ndarray:
        """int64: numbers of the samples that no row holds, ascending."""
        if self.blocks is None:
            return too_long(self.table, shape)
        ends = self.blocks["samples"].cumsum().astype(np.int64)
        found = [np.empty(0, np.int64)]
        for block in np.flatnonzero((self.blocks["largest"][:, : len(RESOURCES)] > capacity(shape)).any(1)):
            start = int(ends[block]) - int(self.blocks["samples"][block])
            found.append(start + too_long(self.table[start : ends[block]], shape))
        return np.concatenate(found)


def measure(
    samples: Samples,
    tokenizer: OmniTokenizer,
    geometry: EncoderGeometry,
    acoustic_delay: int,
    workers: int | None = None,
    speed: float = 1.0,
) -> Demands:
    """Renders every sample that no table has, in ``workers`` processes (None: one per core that this one may use).

    With ``speed``, clips have the length that they have at so many times their speed.

    Tables lie under ``XDG_CACHE_HOME``. Of several processes that ask at once, one measures and the others wait.
    """
    settings = xxhash.xxh3_128_hexdigest(repr((_VERSION, tokenizer.fingerprint, geometry, acoustic_delay, speed)).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_omni" / "demands" / settings
    blocks = _blocks(samples)

    def measure_range(span: range) -> np.ndarray:
        rows = [_row(at_speed(samples.sample(number), speed), tokenizer, geometry, acoustic_delay) for number in span]
        return np.array(rows, np.int32).reshape(-1, _COLUMNS)

    whole = cache / f"{xxhash.xxh3_128_hexdigest(blocks.tobytes())}.npy"
    with ExitStack() as stack:
        try:
            if not _shards_of(whole).exists():
                cache.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(cache / "lock"))
            if not _shards_of(whole).exists():
                _fill_cache(cache, whole, blocks, measure_range, workers)
            return _demands(np.load(whole, mmap_mode="r", allow_pickle=False), np.load(_shards_of(whole), "r", allow_pickle=False))
        except OSError as error:
            logger.warning("cannot keep the samples' lengths in %s (%s): they are measured again at every start", cache, error)
    spans = list(_spans(blocks, range(len(blocks))))
    table = np.concatenate([np.empty((0, _COLUMNS), np.int32), *_measured([span for _, span in spans], measure_range, workers)])
    return _demands(table, _summed(blocks, table))


def plan_fingerprint(
    samples: Samples,
    tokenizer: OmniTokenizer,
    geometry: EncoderGeometry,
    shape: RowShape,
    acoustic_delay: int,
    seed: int,
    window_rows: int = WINDOW_ROWS,
    mixture: str = "",
    long_samples: str = "refuse",
    speeds: tuple[float, ...] = (1.0,),
) -> PlanFingerprint:
    """What the rows of this data set depend on, under these settings; ``mixture`` is ``Mixture.fingerprint``."""
    row = " ".join(f"{name}={value}" for name, value in dataclasses.asdict(shape).items())
    hop, strides, stack = geometry.hop_length, "x".join(map(str, geometry.conv_strides)), geometry.stack
    encoder = f"hop={hop} strides={strides} stack={stack}"
    return PlanFingerprint(
        samples.fingerprint,
        tokenizer.fingerprint,
        encoder,
        row,
        acoustic_delay,
        seed,
        window_rows,
        mixture,
        long_samples,
        " ".join(map(str, speeds)),
    )


def measure_one(sample: Sample, tokenizer: OmniTokenizer, geometry: EncoderGeometry, acoustic_delay: int) -> np.ndarray:
    """int32 [5] of one sample."""
    return np.array(_row(sample, tokenizer, geometry, acoustic_delay)[: len(RESOURCES)], np.int32)


def _row(sample: Sample, tokenizer: OmniTokenizer, geometry: EncoderGeometry, acoustic_delay: int) -> tuple[int, ...]:
    rendered = render(sample, tokenizer, geometry)
    need = demand(sample, rendered, geometry, acoustic_delay)
    clips = [geometry.slot(sample.num_samples[span.name]) for span in rendered.audio]
    return (*(getattr(need, name) for name in RESOURCES), max(clips, default=0), TASKS.index(sample.task))


def _demands(table: np.ndarray, blocks: np.ndarray) -> Demands:
    return Demands(table[:, : len(RESOURCES)], int(blocks["largest"][:, -1].max(initial=0)), table[:, -1], blocks)


# --------------------------------------------------------------------------- the cache


def _blocks(samples: Samples) -> np.ndarray:
    """``BLOCK`` records that tell the shards, nothing measured yet; a data set that is not sharded is one block."""
    if isinstance(samples, ShardedDataset):
        shards = samples.shards
        blocks = np.zeros(len(shards), BLOCK)
        blocks["sha256"], blocks["samples"] = shards["tar_sha256"], shards["samples"]
        return blocks
    blocks = np.zeros(1, BLOCK)
    blocks["sha256"] = np.void(xxhash.xxh3_128_digest(f"{samples.fingerprint} {len(samples)}".encode()).ljust(32, b"\0"))
    blocks["samples"] = len(samples)
    return blocks


def _fill_cache(cache: Path, whole: Path, blocks: np.ndarray, measure_range: Callable[[range], np.ndarray], workers: int | None) -> None:
    """Writes ``whole``, the table of all ``blocks``, from the tables that are there and from what had to be measured.

    What is measured is kept in parts as it comes, so a start that was killed goes on. Tables that the new one contains
    are removed at the end.
    """
    tables = _tables(cache)
    known = {key for kept in tables.values() for key in kept["sha256"].tolist()}
    unknown = [number for number, key in enumerate(blocks["sha256"].tolist()) if key not in known]
    spans = list(_spans(blocks, unknown))
    for (members, _), rows in zip(spans, _measured([span for _, span in spans], measure_range, workers), strict=True):
        part = blocks[members]
        path = cache / f"part-{xxhash.xxh3_128_hexdigest(part['sha256'].tobytes())}.npy"
        _save(path, [rows], _summed(part, rows))
        tables[path] = _summed(part, rows)
    where = {
        key: (path, int(stop) - int(count), int(stop), number)
        for path, kept in tables.items()
        for number, (key, count, stop) in enumerate(
            zip(kept["sha256"].tolist(), kept["samples"].tolist(), kept["samples"].cumsum().tolist(), strict=True)
        )
    }
    places = [where[key] for key in blocks["sha256"].tolist()]
    mapped = {path: np.load(path, mmap_mode="r", allow_pickle=False) for path in {path for path, *_ in places}}
    summed = np.concatenate([blocks[:0], *(tables[path][number : number + 1] for path, _, _, number in places)])
    _save(whole, (mapped[path][start:stop] for path, start, stop, _ in places), summed)
    contained = set(blocks["sha256"].tolist())
    for path, kept in tables.items():
        if path != whole and contained.issuperset(kept["sha256"].tolist()):
            _shards_of(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)


def _tables(cache: Path) -> dict[Path, np.ndarray]:
    """The ``BLOCK`` records of the complete tables in ``cache``; unreadable ones are left aside."""
    tables = {}
    for path in sorted(cache.glob("*.npy")):
        if not path.name.endswith(".shards.npy") and _shards_of(path).exists():
            try:
                tables[path] = np.load(_shards_of(path), "r", allow_pickle=False)
            except (OSError, ValueError) as error:
                logger.warning("%s is left aside: %s", path, error)
    return tables


def _shards_of(table: Path) -> Path:
    """The file that tells a table's shards; it is written last, so without it there is no table."""
    return table.with_suffix(".shards.npy")


def _save(path: Path, pieces: Iterable[np.ndarray], blocks: np.ndarray) -> None:
    header = {"descr": "<i4", "fortran_order": False, "shape": (int(blocks["samples"].sum()), _COLUMNS)}
    with atomic_open(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, "<i4").tobytes())
    with atomic_open(_shards_of(path)) as file:
        np.save(file, blocks, allow_pickle=False)


def _summed(blocks: np.ndarray, table: np.ndarray) -> np.ndarray:
    """``blocks`` with their sums and largest values."""
    blocks = blocks.copy()
    stop = 0
    for block in blocks:
        start, stop = stop, stop + int(block["samples"])
        block["total"] = table[start:stop, : len(RESOURCES)].sum(0, dtype=np.int64)
        block["largest"] = table[start:stop, : len(RESOURCES) + 1].max(0, initial=0)
    return blocks


def _spans(blocks: np.ndarray, wanted: Sequence[int]) -> Iterator[tuple[list[int], range]]:
    """Runs of neighbouring wanted blocks of about ``_CHUNK`` samples, with the sample numbers of each run."""
    ends = blocks["samples"].cumsum().tolist()
    members: list[int] = []
    for number in wanted:
        begun = ends[members[0]] - int(blocks["samples"][members[0]]) if members else 0
        if members and (number != members[-1] + 1 or ends[members[-1]] - begun >= _CHUNK):
            yield members, range(begun, ends[members[-1]])
            members = []
        members.append(number)
    if members:
        yield members, range(ends[members[0]] - int(blocks["samples"][members[0]]), ends[members[-1]])


# --------------------------------------------------------------------------- in parallel

_measure_range: Callable[[range], np.ndarray] | None = None


def _measured(spans: Sequence[range], measure_range: Callable[[range], np.ndarray], workers: int | None) -> Iterator[np.ndarray]:
    """``measure_range`` of each span, in order; in forked processes where there is enough to do."""
    chunks = [range(start, min(start + _CHUNK, span.stop)) for span in spans for start in range(span.start, span.stop, _CHUNK)]
    workers = min(len(chunks), len(os.sched_getaffinity(0)) if workers is None else workers)
    with ExitStack() as stack:
        if workers > 1:
            fork = multiprocessing.get_context("fork")  # the function, the data set and the tokenizer are shared, not sent
            pool = stack.enter_context(ProcessPoolExecutor(workers, fork, _remember, (measure_range,)))
            measured = pool.map(_recall, chunks)
        else:
            measured = map(measure_range, chunks)
        done = iter(progress(zip(chunks, measured, strict=True), "measuring samples", len(chunks)))
        for span in spans:
            pieces = [next(done)[1] for _ in range(span.start, span.stop, _CHUNK)]
            yield np.concatenate([np.empty((0, _COLUMNS), np.int32), *pieces])


def _remember(measure_range: Callable[[range], np.ndarray]) -> None:
    global _measure_range
    _measure_range = measure_range


def _recall(span: range) -> np.ndarray:
    assert _measure_range is not None
    return _measure_range(span)
