"""Makes a data set of WebDataset tars that others wrote, without writing them again.

Beside each tar (or beside a link to it, in a folder of one's own) lie then ``NAME.index``, which says where the recordings
and codes lie in the tar, and ``NAME.samples``, the conversations that the columns made of its texts. ``dataset.json`` and
the table of shards complete the data set. Recordings stay as they are; they are decoded and resampled when they are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path

import orjson
import xxhash

from megatron_omni.audio.waveform import read_audio, resample
from megatron_omni.data.building.finish import BuildSummary, summarize
from megatron_omni.data.building.pool import in_processes
from megatron_omni.data.building.prepare import read_codes
from megatron_omni.data.shards.index import BESIDE, IndexedSample, Member, ShardIndex
from megatron_omni.data.shards.info import AUDIO_RATE, CodecProvenance, DatasetInfo, Totals
from megatron_omni.data.shards.table import ShardRecord, write_table
from megatron_omni.data.sources.columns import Columns
from megatron_omni.data.sources.line import Embedded, Entry, Reject
from megatron_omni.data.sources.tars import Tars
from megatron_omni.runtime.cli import progress
from megatron_omni.runtime.errors import InputError
from megatron_omni.runtime.files import atomic_write, sha256_file


def index_tars(
    tars: Sequence[Path], columns: Columns, codec: CodecProvenance | None, out: Path | None = None, workers: int = 0
) -> BuildSummary:
    """Writes the sidecars of ``tars`` and the data set's own files.

    Args:
        codec: Of the codes in the tars; None if there are none.
        out: A folder to hold links to the tars and all that is written; None: the tars' own folder.

    Raises:
        InputError: A tar is broken, holds anything but plain files, or the tars lie in several folders and ``out`` is None.
    """
    folders = {tar.resolve().parent for tar in tars}
    if out is None and len(folders) > 1:
        raise InputError(
            f"the tars lie in {len(folders)} folders ({', '.join(map(str, sorted(folders)[:3]))}, ...); give one folder with --out"
        )
    if columns.needs_codec and codec is None:
        raise InputError("the columns name codes, but no codec is given; give --codec, whose weights made them")
    folder = folders.pop() if out is None else out
    source = Tars([str(tar) for tar in tars], columns)  # refuses keys that repeat across tars, before any work
    places = [folder / tar.name for tar in tars]
    for place, tar in zip(places, tars, strict=True):
        if not place.exists():
            folder.mkdir(parents=True, exist_ok=True)
            place.symlink_to(tar.resolve())
    index = partial(_index, columns=columns, codec=codec)
    indexed = in_processes(index, places, workers, 2, _nothing)
    done = list(progress(indexed, "indexing tars", total=len(places)))
    records, rejects = [record for record, _ in done], [reject for _, found in done for reject in found]
    table = write_table(records)
    atomic_write(folder / "shards.bin", table)
    atomic_write(folder / "rejects.jsonl", b"".join(orjson.dumps(reject) + b"\n" for reject in rejects))
    summary = summarize(records, rejects, [])
    frames = sum(record.frames for record in records)
    info = DatasetInfo(
        sample_rate=None,
        codec=codec,
        totals=Totals(
            samples=summary.samples,
            rejected=summary.rejected,
            shards=summary.shards,
            hours=summary.hours,
            speech_hours=0.0 if codec is None else frames / codec.frame_rate / 3600,
            bytes=sum(record.tar_bytes for record in records),
        ),
        manifest=source.name,
        manifest_xxh3=source.digest,
        build={"columns": columns.model_dump(mode="json")},
        samples_per_shard=0,
        command="index_shards",
        versions={},
        table_sha256=hashlib.sha256(table).hexdigest(),
    )
    atomic_write(folder / "dataset.json", info.to_json())
    return summary


def _nothing() -> None:
    pass


def _index(place: Path, columns: Columns, codec: CodecProvenance | None) -> tuple[ShardRecord, list[Reject]]:
    """Indexes one tar."""
    source = Tars([str(place)], columns)
    samples: list[IndexedSample] = []
    rejects: list[Reject] = []
    beside: list[bytes] = []
    held = 0
    for number in range(len(source)):
        (entry,) = source.entries(number, number + 1)
        if isinstance(entry, Entry):
            try:
                members = _members(entry, codec)
            except InputError as error:
                entry = Reject(entry.line, entry.sample.id, str(error))
        if isinstance(entry, Reject):
            rejects.append(entry)
            continue
        lengths = {kind: {m.name: m.length for m in members if m.kind == kind} for kind in ("audio", "codes")}
        text = orjson.dumps(replace(entry.sample, num_samples=lengths["audio"], num_frames=lengths["codes"]).to_json())
        first = Member("json", BESIDE + held, len(text), xxhash.xxh3_64_intdigest(text), 0)
        beside.append(text)
        held += len(text)
        samples.append(IndexedSample(entry.sample.id, entry.sample.task, (first, *members)))
    tar_bytes, tar_sha256 = place.stat().st_size, sha256_file(place)
    index = ShardIndex.to_bytes(samples, tar_bytes, tar_sha256)
    atomic_write(place.with_suffix(".samples"), b"".join(beside))
    atomic_write(place.with_suffix(".index"), index)
    record = ShardRecord(
        name=place.name,
        tar_sha256=tar_sha256,
        index_sha256=hashlib.sha256(index).hexdigest(),
        tar_bytes=tar_bytes,
        samples=len(samples),
        rejected=len(rejects),
        wave_samples=sum(sample.length("audio") for sample in samples),
        frames=sum(sample.length("codes") for sample in samples),
    )
    return record, rejects


def _members(entry: Entry, codec: CodecProvenance | None) -> list[Member]:
    """Where the sample's recordings and codes lie; what cannot be read as it lies there is refused."""
    members = []
    if entry.speech:
        raise InputError("has speech to be encoded; an index cannot hold it: build shards with tools/make_shards.py --kind tars")
    for name, clip in entry.audio.items():
        if not isinstance(clip.file, Embedded) or clip.file.offset is None or (clip.start, clip.end, clip.channel) != (None, None, None):
            raise InputError(f"{name}: is no whole member of the tar; cuts and channels need tools/make_shards.py --kind tars")
        wave, rate = read_audio(BytesIO(clip.file.data))
        ending = clip.file.name.rpartition(".")[2]
        members.append(_member(f"{name}.{ending}", clip.file, len(resample(wave, rate, AUDIO_RATE))))
    for name, file in entry.codes.items():
        if not isinstance(file, Embedded) or file.offset is None or codec is None:
            raise InputError(f"{name}: is no member of the tar; build shards with tools/make_shards.py --kind tars")
        array = read_codes(file, codec.num_codebooks, codec.card)
        if array.dtype.str not in file.data[:128].decode("latin-1"):
            raise InputError(f"{name}: is not stored as uint16; build shards with tools/make_shards.py --kind tars")
        members.append(_member(f"{name}.npy", file, array.shape[1]))
    return members


def _member(suffix: str, file: Embedded, length: int) -> Member:
    assert file.offset is not None
    return Member(suffix, file.offset, len(file.data), xxhash.xxh3_64_intdigest(file.data), length)
