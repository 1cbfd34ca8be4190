"""A data set on disk and random access to its samples (shard format v1).

::

    DIR/dataset.json            what it is: format version, codec, totals, how it was built
    DIR/shards.bin              a record per shard: hashes, sizes, counts
    DIR/shard-000000.tar        WebDataset: KEY.json, KEY.audio0.flac, KEY.codes0.npy, ...
    DIR/shard-000000.index      where each member lies, its xxh3, its length

Nothing but ``dataset.json`` and ``shards.bin`` is read on opening; a shard's index is mapped when one of its samples
is asked for. Every member that is read is compared with its xxh3.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_omni.audio.waveform import read_audio, resample
from megatron_omni.config.model import CodecConfig
from megatron_omni.data.shards.index import BESIDE, IndexedSample, Member, ShardIndex
from megatron_omni.data.shards.sections import SPAN, TEXT, Strings, open_sections, text_at, to_bytes
from megatron_omni.runtime.errors import InputError, WorkError
from megatron_omni.runtime.files import sha256_file
from megatron_omni.schema import Sample, SampleArrays

AUDIO_RATE = 16_000
"""Hz of the audio members: the encoder's rate."""

OPEN_SHARDS = 64
"""Tars and indexes kept open."""

# --------------------------------------------------------------------------- what a data set says of itself


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CodecProvenance(CodecConfig):
    """The codec that made the codes."""

    name: str
    """Folder name or Hub id."""

    def config(self) -> CodecConfig:
        return CodecConfig.model_validate(self.model_dump(exclude={"name"}))


class Totals(_Record):
    samples: int
    rejected: int
    shards: int
    hours: float
    """Of audio heard."""
    speech_hours: float
    """Of speech as codes."""
    bytes: int


class DatasetInfo(_Record):
    """``dataset.json``."""

    format_version: Literal[1] = 1
    sample_rate: int
    """Hz of the audio members."""
    codec: CodecProvenance | None
    totals: Totals
    manifest: str
    """Name of the collection."""
    manifest_xxh3: str
    build: dict[str, Any] = {}
    """The options that its shards depend on."""
    samples_per_shard: int
    command: str
    versions: dict[str, str]
    table_sha256: str
    """Of ``shards.bin``."""
    checksum: str = ""
    """xxh3-128 of all of the above, hex."""

    def to_json(self) -> bytes:
        """The file, with its checksum."""
        sealed = self.model_copy(update={"checksum": self._digest()})
        return sealed.model_dump_json(indent=2).encode() + b"\n"

    def _digest(self) -> str:
        return xxhash.xxh3_128_hexdigest(self.model_dump_json(exclude={"checksum"}).encode())

    @classmethod
    def read(cls, folder: Path) -> DatasetInfo:
        """Raises ``InputError`` where there is no complete data set of a known version."""
        path = folder / "dataset.json"
        try:
            info = cls.model_validate_json(path.read_bytes())
            if info.checksum and info.checksum != info._digest():
                raise WorkError(f"{path}: its content does not match its checksum; start make_shards again, finished shards are kept")
            return info
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); give a folder that make_shards has finished") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(step) for step in first["loc"])
            raise InputError(f"{path}: {where}: {first['msg']}, got {first['input']!r:.80}; update this program, or build again") from error


# --------------------------------------------------------------------------- the table of shards

_TABLE_MAGIC, _TABLE_VERSION = b"OMNI.TBL", 1
SHARD = np.dtype(
    [
        ("name", *SPAN),
        ("tar_sha256", "V32"),
        ("index_sha256", "V32"),
        ("tar_bytes", "<u8"),
        ("samples", "<u4"),
        ("rejected", "<u4"),
        ("wave_samples", "<u8"),
        ("frames", "<u8"),
    ]
)


@dataclass(frozen=True)
class ShardRecord:
    """A row of the table of shards."""

    name: str
    """File name of the tar."""
    tar_sha256: str
    index_sha256: str
    tar_bytes: int
    samples: int
    rejected: int
    """Lines of its slice of the manifest that gave no sample."""
    wave_samples: int
    frames: int


def write_table(records: Sequence[ShardRecord]) -> bytes:
    strings = Strings()
    rows = [
        (
            strings.span(r.name),
            *(bytes.fromhex(r.tar_sha256), bytes.fromhex(r.index_sha256)),
            *(r.tar_bytes, r.samples, r.rejected, r.wave_samples, r.frames),
        )
        for r in records
    ]
    return to_bytes(_TABLE_MAGIC, _TABLE_VERSION, [np.array(rows, SHARD), strings.section()])


class ShardTable:
    """The shards of one data set, mapped."""

    def __init__(self, folder: Path) -> None:
        self.rows, self._text = open_sections(folder / "shards.bin", _TABLE_MAGIC, _TABLE_VERSION, (SHARD, TEXT))
        """``SHARD`` records."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> ShardRecord:
        row = self.rows[number]
        hashes = (row["tar_sha256"].tobytes().hex(), row["index_sha256"].tobytes().hex())
        counts = (int(row[field]) for field in ("tar_bytes", "samples", "rejected", "wave_samples", "frames"))
        return ShardRecord(text_at(self._text, row["name"]), *hashes, *counts)


# --------------------------------------------------------------------------- reading


class Shard:
    """One tar with its index; reads members and checks them.

    Raises ``WorkError`` where a file is missing or the two do not belong together.
    """

    def __init__(self, path: Path, record: ShardRecord | None = None) -> None:
        self.path = path
        self.index = ShardIndex.open(path.with_suffix(".index"))
        if record is not None and (self.index.tar_sha256, len(self.index)) != (record.tar_sha256, record.samples):
            raise WorkError(f"{path.with_suffix('.index')}: is the index of another tar; build the shard again")
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise WorkError(f"{path}: cannot be read ({error.strerror}); build the shard again") from error
        self.close = weakref.finalize(self, os.close, self._handle)
        """Closes the tar; so does the end of the object."""
        size = os.fstat(self._handle).st_size
        if size != self.index.tar_bytes:
            raise WorkError(f"{path}: has {size} bytes, its index says {self.index.tar_bytes}; it is cut or changed: build it again")

    def read(self, sample: IndexedSample, member: Member) -> bytes:
        """The bytes of a member; raises ``WorkError`` where they are not those that were written."""
        if member.offset & BESIDE:
            data = self._beside[member.offset - BESIDE :][: member.size]
        else:
            data = os.pread(self._handle, member.size, member.offset)
        if len(data) != member.size or xxhash.xxh3_64_intdigest(data) != member.xxh3:
            raise self.fault(sample, member, "its bytes do not match the hash in the index; the shard is damaged: build it again")
        return data

    @functools.cached_property
    def _beside(self) -> bytes:
        path = self.path.with_suffix(".samples")
        try:
            return path.read_bytes()
        except OSError as error:
            raise WorkError(f"{path}: cannot be read ({error.strerror}); index the tar again") from error

    def sample(self, indexed: IndexedSample) -> Sample:
        member = indexed.members[0]  # JSON comes first; anything else fails to parse
        try:
            sample = Sample.from_json(orjson.loads(self.read(indexed, member)))
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise self.fault(indexed, member, f"is no sample of format v1 ({error!r})") from error
        if sample.id != indexed.key:
            raise self.fault(indexed, member, f"holds the id {sample.id!r}, expected that of its name")
        return sample

    def audio(self, indexed: IndexedSample, member: Member) -> np.ndarray:
        """float32 [W], mono, 16 kHz."""
        try:
            wave, rate = read_audio(io.BytesIO(self.read(indexed, member)))
        except InputError as error:
            raise self.fault(indexed, member, str(error)) from error
        wave = resample(wave, rate, AUDIO_RATE)
        if len(wave) != member.length:
            raise self.fault(indexed, member, f"decodes to {len(wave)} wave samples, the index says {member.length}")
        return wave

    def codes(self, indexed: IndexedSample, member: Member, codec: CodecConfig) -> np.ndarray:
        """uint16 [K, T], every code below the card."""
        try:
            codes: np.ndarray = np.load(io.BytesIO(self.read(indexed, member)), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise self.fault(indexed, member, f"is no .npy array ({error})") from error
        expected = (codec.num_codebooks, member.length)
        if codes.dtype != np.uint16 or codes.shape != expected:
            raise self.fault(indexed, member, f"is {codes.dtype} {list(codes.shape)}, expected uint16 {list(expected)}")
        if codes.max(initial=0) >= codec.card:
            raise self.fault(indexed, member, f"holds the code {codes.max()}, expected 0..{codec.card - 1}")
        return codes

    def fault(self, sample: IndexedSample, member: Member, what: str) -> WorkError:
        return WorkError(f"{self.path}: {sample.key}.{member.suffix} at offset {member.offset}: {what}")


class ShardedDataset:
    """Samples of one or more data sets by number, in the order of the folders, their shards and their tars.

    Pickled and sent to another process it opens its own files.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = tuple(folders)
        if not self._folders:
            raise InputError("no folder of shards is given; give at least one that make_shards has written")
        self.codec: CodecConfig | None = None
        """The codec of all codes; None where the data sets have none."""
        self._tables: list[ShardTable] = []
        hashes = hashlib.sha256()
        for folder in self._folders:
            info = DatasetInfo.read(folder)
            if info.codec is not None:
                self.codec = self.codec or info.codec.config()
                if info.codec.config() != self.codec:
                    raise InputError(
                        f"{folder}: its codes are of the codec {info.codec.config()}, those of the folders before of {self.codec}; "
                        "one model speaks one codec: leave the folder out, or build it again with the other codec"
                    )
            if sha256_file(folder / "shards.bin") != info.table_sha256:
                raise WorkError(f"{folder / 'shards.bin'}: is not the table that dataset.json names; start make_shards again")
            table = ShardTable(folder)
            hashes.update(table.rows["tar_sha256"].tobytes())
            self._tables.append(table)
        self.fingerprint: str = hashes.hexdigest()
        """sha256 over the sha256 of all tars, hex."""
        counts = np.concatenate([table.rows["samples"] for table in self._tables]).astype(np.int64)
        self._ends = np.cumsum(counts)
        """Number after the last sample of each shard of all folders."""
        self._first_shards = np.cumsum([0, *map(len, self._tables)])
        self._shard = functools.lru_cache(OPEN_SHARDS)(self._open_shard)

    @classmethod
    def open(cls, paths: Sequence[Path]) -> ShardedDataset:
        """Opens the folders that make_shards has written.

        Raises:
            InputError: A folder holds no finished data set, or codes of another codec.
            WorkError: A table is damaged.
        """
        return cls(paths)

    def __reduce__(self) -> tuple[type[ShardedDataset], tuple[Sequence[Path]]]:
        return ShardedDataset, (self._folders,)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def sample(self, number: int, /) -> Sample:
        """The conversation; no audio is read.

        Raises:
            WorkError: Its bytes are not those that were written.
        """
        shard, indexed = self._find(number)
        return shard.sample(indexed)

    def key(self, number: int, /) -> str:
        """The sample's id, from the index alone."""
        return self._find(number)[1].key

    def samples(self) -> Iterator[Sample]:
        """All, in order."""
        return map(self.sample, range(len(self)))

    def arrays(self, number: int, /) -> SampleArrays:
        """Decodes the sample's audio and codes.

        Raises:
            WorkError: Its bytes are not those that were written, or do not decode to what the index says.
        """
        shard, indexed = self._find(number)
        audio = {m.name: shard.audio(indexed, m) for m in indexed.members if m.kind == "audio"}
        return SampleArrays(audio, self.codes(number))

    def codes(self, number: int, /) -> dict[str, np.ndarray]:
        """uint16 [K, T] by name, without decoding the audio; raises as ``arrays`` does."""
        shard, indexed = self._find(number)
        codes = {}
        for member in indexed.members:
            if member.kind == "codes":
                if self.codec is None:
                    raise shard.fault(indexed, member, "dataset.json names no codec; build the data set again")
                codes[member.name] = shard.codes(indexed, member, self.codec)
        return codes

    def members(self, number: int, /) -> Iterator[tuple[Member, bytes]]:
        """The sample's files as they lie in its tar; raises ``WorkError`` where one is not what was written."""
        shard, indexed = self._find(number)
        return ((member, bytes(shard.read(indexed, member))) for member in indexed.members)

    @property
    def folders(self) -> list[tuple[str, int]]:
        """Place and number of samples of each data set, in order; numbers of samples count through them."""
        return [(str(folder), int(table.rows["samples"].sum())) for folder, table in zip(self._folders, self._tables, strict=True)]

    @property
    def shards(self) -> np.ndarray:
        """``SHARD`` records of all folders, in order."""
        return np.concatenate([table.rows for table in self._tables])

    def shard_of(self, number: int, /) -> str:
        """Path of the tar that holds the sample."""
        return str(self._path_and_record(self._shard_number(number))[0])

    def _shard_number(self, number: int) -> int:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of a data set of {len(self)}")
        return int(np.searchsorted(self._ends, number, side="right"))

    def _path_and_record(self, shard: int) -> tuple[Path, ShardRecord]:
        folder = int(np.searchsorted(self._first_shards, shard, side="right")) - 1
        record = self._tables[folder][shard - int(self._first_shards[folder])]
        return self._folders[folder] / record.name, record

    def _open_shard(self, shard: int) -> Shard:
        return Shard(*self._path_and_record(shard))

    def _find(self, number: int) -> tuple[Shard, IndexedSample]:
        number_of_shard = self._shard_number(number)
        shard = self._shard(number_of_shard)
        first = int(self._ends[number_of_shard]) - len(shard.index)
        return shard, shard.index[number - first]
