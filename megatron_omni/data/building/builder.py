"""Builds shards from a manifest: decode in processes, encode in this one, write.

Consecutive slices of the manifest become one shard each, so a shard is a pure function of its slice, the files named
there and ``BuildOptions``; who builds it, with how many processes and after how many restarts, does not show.

::

    manifest slice -> [pool] decode, resample, check -> groups of at most GROUP_SECONDS -> Mimi -> ShardWriter -> receipt

A receipt (``shard-000000.receipt.json``) is written last and says what the shard was built from, its hashes and its
rejects. On a restart a shard whose receipt matches is checked against it and kept. ``dataset.json`` is written when
all receipts are there, so that its presence says: complete.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import re
import shlex
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

import orjson
import soundfile
import torch
import xxhash
from pydantic import TypeAdapter, ValidationError

from megatron_omni import __version__
from megatron_omni.audio.codec import Mimi
from megatron_omni.data.building.prepare import Chunk, Prepared, Reject, prepare_chunk
from megatron_omni.data.shards.dataset import AUDIO_RATE, BuildOptions, CodecProvenance, DatasetInfo, ShardRecord, Totals, write_table
from megatron_omni.data.shards.writer import ShardWriter
from megatron_omni.data.sources.manifest import Manifest
from megatron_omni.runtime.cli import progress
from megatron_omni.runtime.errors import InputError, WorkError
from megatron_omni.runtime.files import atomic_write, sha256_file
from megatron_omni.runtime.logs import get_logger

logger = get_logger(__name__)
Given = TypeVar("Given")
Made = TypeVar("Made")

GROUP_SECONDS = 600.0
"""Speech that is collected before it is encoded: long enough to find clips of one length, 58 MB of waves at 24 kHz."""

CHUNK = 8
"""Samples that a process takes at a time."""

AHEAD = 32
"""Chunks per process that are decoded ahead of the codec; bounds the memory."""

STALE_SECONDS = 600
"""A temporary file that nobody has written to for so long was left by a killed builder."""


@dataclass(frozen=True)
class BuildSummary:
    samples: int
    rejected: int
    hours: float
    """Of audio heard."""
    shards: int
    faults: list[str]
    """Why the result is not to be used as it is; empty if it is."""


@dataclass(frozen=True)
class Receipt:
    """What was built from what."""

    inputs: str
    """Hash of the options, of the slice of the manifest and of the sizes and times of the files that it names."""
    record: ShardRecord
    rejects: list[Reject]


_RECEIPT = TypeAdapter(Receipt)


def build_shards(
    manifest: Path,
    out: Path,
    codec_id: str | Path | None,
    samples_per_shard: int = 1000,
    workers: int = 1,
    num_codebooks: int | None = None,
    device: str = "cpu",
    max_reject_rate: float = 0.05,
) -> BuildSummary:
    """Builds all shards of ``manifest`` in the folder ``out``, or those that are still missing.

    Samples whose audio, text or codes are at fault are left out and listed in ``out/rejects.jsonl``.

    Args:
        codec_id: Folder or Hub id of a Mimi model; None if the manifest has no speech to learn.
        workers: Processes that decode; 0: this one does it too.
        num_codebooks: The first K of the codec; None: all.
        max_reject_rate: With a larger share of rejected lines the summary has a fault.

    Raises:
        InputError: The manifest or an option is wrong; nothing was built.
        WorkError: A process died.
    """
    if samples_per_shard < 1 or workers < 0 or not 0 <= max_reject_rate <= 1:
        given = f"samples_per_shard={samples_per_shard}, workers={workers}, max_reject_rate={max_reject_rate}"
        raise InputError(f"{given}: expected at least 1, at least 0, and a share in 0..1")
    lines = Manifest.read(manifest)
    if codec_id is None and lines.needs_codec:
        raise InputError(f"manifest {manifest} has speech to learn (target_audio or codes) but no codec is given; give --codec")
    codec = None if codec_id is None else Mimi.from_pretrained(codec_id, num_codebooks, device)
    options = BuildOptions(codec=None if codec is None else CodecProvenance(name=_codec_name(codec_id), **codec.config().model_dump()))

    starts = range(0, len(lines), samples_per_shard)
    slices = [_Slice(number, start, min(start + samples_per_shard, len(lines))) for number, start in enumerate(starts)]
    inputs = {part.number: _inputs(lines, part, options) for part in slices}
    missing = [part for part in slices if not _is_finished(out, part, inputs[part.number])]
    if len(missing) < len(slices):
        logger.info("%d of %d shards are finished and whole", len(slices) - len(missing), len(slices))
    if missing:
        (out / "dataset.json").unlink(missing_ok=True)  # no longer true
    began, wave_samples = time.monotonic(), 0
    total = sum(part.stop - part.start for part in missing)
    prepared = progress(_prepared(lines, missing, options, workers), "building shards", total=total)
    for built, (number, results) in enumerate(itertools.groupby(prepared, key=lambda result: result[0]), 1):
        receipt = _build_shard(out / _name(number), inputs[number], (result for _, result in results), codec)
        atomic_write(_receipt_path(out, number), _RECEIPT.dump_json(receipt, indent=1))
        wave_samples += receipt.record.wave_samples
        hours, taken = wave_samples / AUDIO_RATE / 3600, (time.monotonic() - began) / 3600
        logger.info("shard %d of %d: %.2f audio hours, %.0f audio hours per hour", built, len(missing), hours, hours / taken)
    return _finish(out, lines, options, samples_per_shard, max_reject_rate)


# --------------------------------------------------------------------------- one shard


@dataclass(frozen=True)
class _Slice:
    """Samples ``start .. stop - 1`` of the manifest, which become shard ``number``."""

    number: int
    start: int
    stop: int


def _build_shard(path: Path, inputs: str, results: Iterable[Prepared | Reject], codec: Mimi | None) -> Receipt:
    rejects: list[Reject] = []
    with ShardWriter(path) as writer:
        for group in _groups(results, rejects, 1 if codec is None else codec.sample_rate):
            for prepared in _encoded(group, codec):
                writer.add(prepared.sample, prepared.audio, prepared.codes)
    record = ShardRecord(
        name=path.name,
        tar_sha256=writer.tar_sha256,
        index_sha256=writer.index_sha256,
        tar_bytes=writer.tar_bytes,
        samples=len(writer.samples),
        rejected=len(rejects),
        wave_samples=sum(sample.length("audio") for sample in writer.samples),
        frames=sum(sample.length("codes") for sample in writer.samples),
    )
    return Receipt(inputs, record, rejects)


def _groups(results: Iterable[Prepared | Reject], rejects: list[Reject], rate: int) -> Iterator[list[Prepared]]:
    """Deals good samples out in groups of about ``GROUP_SECONDS`` of speech; the others go to ``rejects``."""
    group: list[Prepared] = []
    seconds = 0.0
    for result in results:
        if isinstance(result, Reject):
            rejects.append(result)
            continue
        group.append(result)
        seconds += result.seconds(rate)
        if seconds >= GROUP_SECONDS:
            yield group
            group, seconds = [], 0.0
    yield group


def _encoded(group: Sequence[Prepared], codec: Mimi | None) -> Iterator[Prepared]:
    """The group with all speech as codes."""
    waves = [wave for prepared in group for wave in prepared.waves.values()]
    codes = iter(codec.encode(waves) if codec is not None and waves else [])
    for prepared in group:
        named = prepared.codes | {name: next(codes) for name in prepared.waves}
        # in the order of their names, whichever came ready: codes2 before codes10
        ordered = {name: named[name] for name in sorted(named, key=lambda name: (len(name), name))}
        frames = {name: array.shape[1] for name, array in ordered.items()}
        yield replace(prepared, sample=replace(prepared.sample, num_frames=frames), codes=ordered, waves={})


# --------------------------------------------------------------------------- the pool of processes


def _prepared(manifest: Manifest, slices: Sequence[_Slice], options: BuildOptions, workers: int) -> Iterator[tuple[int, Prepared | Reject]]:
    """The number of the shard and the sample, for every line of the slices in their order."""
    chunks = (
        Chunk(part.number, entries[first : first + CHUNK], options)
        for part in slices
        for entries in [manifest.entries(part.start, part.stop)]
        for first in range(0, len(entries), CHUNK)
    )
    for number, results in _map_ahead(prepare_chunk, chunks, workers):
        yield from ((number, result) for result in results)


def _map_ahead(function: Callable[[Given], Made], items: Iterable[Given], workers: int) -> Iterator[Made]:
    """``map`` in processes, in order, never more than ``AHEAD`` items per process ahead of the caller."""
    if workers == 0:
        yield from map(function, items)
        return
    waiting: deque[Future[Made]] = deque()
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker) as pool:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise WorkError(
            "a decoding process died, perhaps for want of memory; start again, with fewer --workers: finished shards are kept"
        ) from error


def _start_worker() -> None:
    """One thread for arithmetic, and no life after the main process: it may be killed without a word."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


# --------------------------------------------------------------------------- what was built before, and the end


def _name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _receipt_path(out: Path, number: int) -> Path:
    return (out / _name(number)).with_suffix(".receipt.json")


def _read_receipt(path: Path) -> Receipt | None:
    try:
        return _RECEIPT.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _inputs(manifest: Manifest, part: _Slice, options: BuildOptions) -> str:
    """Hash of all that the shard depends on; of the files only size and time, so that a corrected file is seen."""
    entries = manifest.entries(part.start, part.stop)
    files = {str(path): _size_and_time(path) for entry in entries for path in entry.files()}
    parts = [options.model_dump_json().encode(), manifest.path.stem.encode(), str(entries[0].line).encode(), orjson.dumps(files)]
    return xxhash.xxh3_128_hexdigest(b"\n".join(parts + manifest.raw(part.start, part.stop)))


def _size_and_time(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _is_finished(out: Path, part: _Slice, inputs: str) -> bool:
    """Whether the shard is there, of the same inputs, and whole."""
    receipt = _read_receipt(_receipt_path(out, part.number))
    if receipt is None or receipt.inputs != inputs:
        return False
    tar = out / _name(part.number)
    try:
        return (sha256_file(tar), sha256_file(tar.with_suffix(".index"))) == (receipt.record.tar_sha256, receipt.record.index_sha256)
    except OSError:
        return False


def _finish(out: Path, manifest: Manifest, options: BuildOptions, samples_per_shard: int, max_reject_rate: float) -> BuildSummary:
    """Merges the receipts of all shards into ``shards.bin``, ``rejects.jsonl`` and ``dataset.json``."""
    count = math.ceil(len(manifest) / samples_per_shard)
    records, rejects = [], []
    for number in range(count):
        receipt = _read_receipt(_receipt_path(out, number))
        if receipt is None:
            raise WorkError(f"{_receipt_path(out, number)}: is gone; another program works in {out}: start make_shards again")
        records.append(receipt.record)
        rejects += receipt.rejects
    _remove_leftovers(out, count)
    table = write_table(records)
    atomic_write(out / "shards.bin", table)
    atomic_write(out / "rejects.jsonl", b"".join(orjson.dumps(reject) + b"\n" for reject in rejects))
    totals = Totals(
        samples=sum(record.samples for record in records),
        rejected=len(rejects),
        shards=count,
        hours=sum(record.wave_samples for record in records) / AUDIO_RATE / 3600,
        speech_hours=0.0 if options.codec is None else sum(record.frames for record in records) / options.codec.frame_rate / 3600,
        bytes=sum(record.tar_bytes for record in records),
    )
    info = DatasetInfo(
        sample_rate=options.sample_rate,
        codec=options.codec,
        totals=totals,
        manifest=manifest.path.name,
        manifest_xxh3=manifest.digest,
        samples_per_shard=samples_per_shard,
        command=_command(manifest, options, samples_per_shard),
        versions=_versions(),
        table_sha256=sha256_file(out / "shards.bin"),
    )
    atomic_write(out / "dataset.json", info.model_dump_json(indent=2) + "\n")
    share = totals.rejected / len(manifest)
    faults = []
    if share > max_reject_rate:
        faults.append(
            f"{totals.rejected} of {len(manifest)} lines ({share:.1%}) were rejected, more than --max-reject-rate {max_reject_rate}; "
            f"the reasons are in {out / 'rejects.jsonl'}"
        )
    return BuildSummary(totals.samples, totals.rejected, totals.hours, totals.shards, faults)


def _remove_leftovers(out: Path, count: int) -> None:
    """Removes shards of an earlier, longer build, which any reader of ``*.tar`` would find, and files of killed builders."""
    for path in out.glob("shard-*"):
        match = re.fullmatch(r"shard-(\d{6,})\.(tar|index|receipt\.json)", path.name)
        if match and int(match[1]) >= count:
            logger.warning("%s: removed, the manifest has no samples for it any more", path)
            path.unlink(missing_ok=True)
    for path in out.glob(".shard-*.tmp"):
        status = _size_and_time(path)
        if status is not None and time.time_ns() - status[1] > STALE_SECONDS * 10**9:
            path.unlink(missing_ok=True)


def _codec_name(codec_id: str | Path | None) -> str:
    """The Hub id, or the name of the folder: where it lies on this machine is no part of the data set."""
    return Path(codec_id).name if codec_id is not None and Path(codec_id).is_dir() else str(codec_id)


def _command(manifest: Manifest, options: BuildOptions, samples_per_shard: int) -> str:
    """Only what changes the result: not the folder written to, not the number of processes."""
    command = ["make_shards", "--manifest", manifest.path.name, "--samples-per-shard", str(samples_per_shard)]
    if options.codec is not None:
        command += ["--codec", options.codec.name, "--num-codebooks", str(options.codec.num_codebooks)]
    return shlex.join(command)


def _versions() -> dict[str, str]:
    """Of all that computes bytes of a shard."""
    packages = {name: version(name) for name in ("torch", "transformers", "numpy", "soxr", "soundfile", "orjson")}
    return {"megatron_omni": __version__, **packages, "libsndfile": soundfile.__libsndfile_version__}
