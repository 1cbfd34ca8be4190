"""One tar with its index: finds the members of a sample, checks them, decodes them.

Nothing is read through the tar format: the index says where a member lies, and what lies there must have the xxh3 that the
index says. Then it must be what a sample of format v1 holds. Codes come back as views of the mapped tar, nothing copied.

A file that is cut while it is mapped ends the process (SIGBUS), as with any mapping: shards are never changed in place.
"""

from __future__ import annotations

import functools
import io
import mmap
import tarfile
import zlib
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import orjson
import soundfile
from xxhash import xxh3_64_intdigest

from megatron_omni.audio.waveform import read_audio, resample
from megatron_omni.config.model import CodecConfig
from megatron_omni.data.shards.index import BESIDE, NAME_AND_KIND, IndexedSample, Member, ShardIndex
from megatron_omni.data.shards.info import AUDIO_RATE
from megatron_omni.data.shards.table import ShardRecord
from megatron_omni.runtime.errors import InputError, WorkError
from megatron_omni.schema import TASKS, Sample, SampleArrays

HEADER = tarfile.BLOCKSIZE
"""Bytes of a tar header; a member's lies right before it."""

_ROLES, _ARRAYS = {"system", "user", "assistant"}, {"audio", "codes"}
NPY_HEADER = 128
"""Bytes of the header of an ordinary .npy file."""
_UINT16 = np.dtype(np.uint16)


class DamagedError(WorkError):
    """Bytes are not those that were written; another copy of them may be whole."""


class TarBytes(Protocol):
    """The bytes of a tar, wherever it lies; a ``memoryview`` is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: slice, /) -> memoryview: ...


def map_file(path: Path) -> memoryview:
    """A local file, mapped read-only until the last view of it is gone."""
    try:
        with open(path, "rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:  # ValueError: it is empty
        raise WorkError(f"{path}: cannot be read ({error}); build the shard again") from error


class Shard:
    """Reads the samples of one tar. All methods raise ``WorkError`` naming shard, member and offset."""

    def __init__(
        self,
        path: Path,
        record: ShardRecord | None = None,
        uniform: bool = False,
        tar: TarBytes | None = None,
        place: str | None = None,
    ) -> None:
        """Opens the index beside ``path`` and maps the tar.

        Args:
            record: What the table says of the shard.
            uniform: All audio is mono at ``AUDIO_RATE``, and anything else a fault; False: it is resampled.
            tar: Its bytes, where they are not in the file ``path``.
            place: Name in messages; ``path`` by default.

        Raises:
            WorkError: A file is missing or damaged, or they do not belong together.
        """
        self.path, self.place, self.uniform = path, place or str(path), uniform
        self.index = ShardIndex.open(path.with_suffix(".index"))
        if record is not None and (self.index.tar_sha256, len(self.index)) != (record.tar_sha256, record.samples):
            raise WorkError(f"{path.with_suffix('.index')}: is the index of another tar; build the shard again")
        self._tar: TarBytes = map_file(path) if tar is None else tar
        self._beside = map_file(path.with_suffix(".samples")) if (self.index.members["offset"] >= BESIDE).any() else None
        self._check_places()

    def close(self) -> None:
        """Lets go of the tar, as the end of the object does; arrays that view it stay valid."""
        self._tar, self._beside = memoryview(b""), None

    # a sample

    def sample(self, indexed: IndexedSample) -> Sample:
        """The conversation; it and the index must name the same arrays, of the same lengths."""
        if "." in indexed.key or "/" in indexed.key or not indexed.members:
            raise WorkError(f"{self.place}: holds the key {indexed.key!r}, expected one without dot or slash and with members: rename it")
        first = indexed.members[0]  # JSON comes first; anything else fails to parse
        try:
            sample = Sample.from_json(orjson.loads(self.read(indexed, first)))
            wrong = _what_is_wrong(sample, indexed)
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise self.fault(indexed, first, f"is no sample of format v1 ({error!r})") from error
        if wrong:
            raise self.fault(indexed, first, wrong)
        return sample

    def arrays(self, indexed: IndexedSample, codec: CodecConfig | None, kinds: tuple[str, ...] = ("audio", "codes")) -> SampleArrays:
        """Decodes its audio and codes, or those of ``kinds`` only; ``codec`` is that of the data set."""
        audio: dict[str, np.ndarray] = {}
        codes: dict[str, np.ndarray] = {}
        for member in indexed.members:
            name, kind = NAME_AND_KIND[member.suffix]
            if kind not in kinds:
                continue
            if kind == "codes":
                codes[name] = self.codes(indexed, member, codec)
            else:
                audio[name] = self.audio(indexed, member)
        return SampleArrays(audio, codes)

    # its members

    def read(self, sample: IndexedSample, member: Member) -> memoryview:
        """The bytes of a member, read-only; raises ``DamagedError`` where they or its tar header are not those that were written."""
        _, offset, size, xxh3, _ = member
        if offset & BESIDE:
            assert self._beside is not None
            data = self._beside[offset - BESIDE : offset - BESIDE + size]
        else:
            header, data = self._tar[offset - HEADER : offset], self._tar[offset : offset + size]
            if zlib.adler32(header) & 0xFFFF != _adler_of_header(bytes(header[148:156])):
                raise DamagedError(self._message(sample, member, "its tar header is damaged; build the shard again"))
        if xxh3_64_intdigest(data) != xxh3:
            what = "its bytes do not match the hash in the index; the shard is damaged: build it again"
            raise DamagedError(self._message(sample, member, what))
        return data

    def audio(self, indexed: IndexedSample, member: Member) -> np.ndarray:
        """float32 [W], mono, 16 kHz."""
        data = io.BytesIO(self.read(indexed, member))
        try:
            wave = _decode(data, member.length) if self.uniform else resample(*read_audio(data), AUDIO_RATE)
        except InputError as error:
            raise self.fault(indexed, member, str(error)) from error
        except soundfile.SoundFileError as error:
            raise self.fault(indexed, member, f"cannot be read as audio ({str(error).rpartition(': ')[2]})") from error
        if len(wave) != member.length:
            raise self.fault(indexed, member, f"decodes to {len(wave)} wave samples, the index says {member.length}")
        return wave

    def codes(self, indexed: IndexedSample, member: Member, codec: CodecConfig | None) -> np.ndarray:
        """uint16 [K, T], every code below the card; a read-only view of the tar where it is mapped."""
        if codec is None:
            raise self.fault(indexed, member, "dataset.json names no codec; build the data set again")
        data = self.read(indexed, member)
        try:
            shape, dtype, order, start = _npy_header(bytes(data[:NPY_HEADER]))
            if dtype != _UINT16 or shape != (codec.num_codebooks, member.length):
                raise self.fault(indexed, member, f"is {dtype} {list(shape)}, expected uint16 {[codec.num_codebooks, member.length]}")
            codes: np.ndarray = np.ndarray(shape, dtype, data, start, None, order)
        except (ValueError, TypeError) as error:  # TypeError: the array would be longer than its bytes
            raise self.fault(indexed, member, f"is no .npy array ({error})") from error
        if codes.size and (largest := codes.item(codes.argmax())) >= codec.card:  # half the time of max()
            raise self.fault(indexed, member, f"holds the code {largest}, expected 0..{codec.card - 1}")
        return codes

    def fault(self, sample: IndexedSample, member: Member, what: str) -> WorkError:
        return WorkError(self._message(sample, member, what))

    def _message(self, sample: IndexedSample, member: Member, what: str) -> str:
        place = f"offset {member.offset - BESIDE} of its .samples" if member.offset & BESIDE else f"offset {member.offset}"
        return f"{self.place}: {sample.key}.{member.suffix} at {place}: {what}"

    def _check_places(self) -> None:
        """That all members lie in the tar, and no key twice."""
        samples, members = self.index.samples, self.index.members
        here = members[members["offset"] < BESIDE]
        size = len(self._tar)
        outside = (here["offset"] < HEADER) | (here["offset"] > size) | (here["bytes"] > size - here["offset"])
        if outside.any() or size != self.index.tar_bytes:
            what = f"has {size} bytes, its index says {self.index.tar_bytes}; it is cut or changed: build it again"
            if outside.any():
                lost = next(
                    f"{sample.key}.{member.suffix} at offset {member.offset}"
                    for sample in self.index
                    for member in sample.members
                    if not member.offset & BESIDE and not HEADER <= member.offset <= size - member.size
                )
                what += f"; the first member that is not there whole: {lost}"
            raise DamagedError(f"{self.place}: {what}")
        if int(samples["members"].sum()) != len(members):
            raise WorkError(f"{self.path.with_suffix('.index')}: its samples and members do not fit together; build the shard again")
        starts, numbers, counts = np.unique(samples["key"][:, 0], return_index=True, return_counts=True)
        if len(starts) < len(samples):  # equal keys are one string
            key = self.index[int(numbers[counts.argmax()])].key
            raise WorkError(f"{self.place}: holds the key {key!r} {counts.max()} times; keys are unique: rename one in the manifest")


def _decode(data: io.BytesIO, length: int) -> np.ndarray:
    """float32 [length] of a file that must be mono at ``AUDIO_RATE``; its header is not believed before memory is taken."""
    with soundfile.SoundFile(data) as file:
        if (file.samplerate, file.channels, file.frames) != (AUDIO_RATE, 1, length) or not length:
            told = f"{file.frames} samples in {file.channels} channels at {file.samplerate} Hz"
            raise InputError(f"is audio of {told}, expected {length or 'some'} in 1 at {AUDIO_RATE}; build the shard again")
        wave: np.ndarray = file.read(dtype="float32")
        if file.format != "FLAC" and not np.isfinite(wave).all():  # FLAC holds integers
            raise InputError("holds NaN or infinite samples; build the shard again")
    return wave


@functools.lru_cache(4096)
def _adler_of_header(told: bytes) -> int:
    """What the lower half of the Adler-32 of a tar header must be that tells the checksum ``told``; -1 where that is no number.

    The checksum of a tar header is the sum of its bytes, its own eight counted as blanks; the lower half of an Adler-32 is the sum
    of all bytes plus 1, modulo 65521, and is computed in C.
    """
    try:
        return (1 + int(told.strip(b" \0"), 8) - 8 * 32 + sum(told)) % 65521
    except ValueError:
        return -1


@functools.lru_cache(4096)
def _npy_header(start: bytes) -> tuple[tuple[int, ...], np.dtype, Literal["C", "F"], int]:
    """Shape, dtype, order and place of the first number, from the first ``NPY_HEADER`` bytes; parsed once for all arrays alike.

    Raises ``ValueError``.
    """
    stop = 10 + int.from_bytes(start[8:10], "little")
    if start[:8] != b"\x93NUMPY\x01\x00" or stop > len(start):
        raise ValueError(f"it starts with {start[:10]!r}, expected a header of version 1 within {NPY_HEADER} bytes")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(start[8:stop]))
    return shape, dtype, "F" if fortran else "C", stop


def _what_is_wrong(sample: Sample, indexed: IndexedSample) -> str:
    """Empty where the sample is one of format v1 and the index has its arrays."""
    if sample.id != indexed.key:
        return f"holds the id {sample.id!r}, expected that of its name"
    if sample.task not in TASKS:
        return f"is of the task {sample.task!r}, expected one of {', '.join(TASKS)}"
    told = {**sample.num_samples, **sample.num_frames}
    members = indexed.members
    if told != {NAME_AND_KIND[member.suffix][0]: member.length for member in members[1:]} or len(told) < len(members) - 1:
        return f"names arrays of the lengths {told}, the index {[(member.suffix, member.length) for member in members[1:]]}"
    for message in sample.messages:
        if message.role not in _ROLES:
            return f"has the role {message.role!r}, expected one of {sorted(_ROLES)}"
        for part in message.content:
            if part.type == "text":
                if not isinstance(part.value, str):
                    return f"has the text {part.value!r:.80}, expected a string"
            elif part.type not in _ARRAYS or part.value not in told:
                return f"has a part of type {part.type!r} and speaks of {part.value!r:.80}, expected the name of an array that is there"
    return ""
