"""The sidecar index of a tar: where each member of each sample lies, its hash and its length. ``shard-000000.index``."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_omni.data.shards.sections import SPAN, TEXT, Strings, open_sections, to_bytes

MAGIC, VERSION = b"OMNI.IDX", 1

BESIDE = 1 << 63
"""Added to an offset: the member lies in ``NAME.samples`` beside the tar. So lie the conversations of tars that others wrote."""

TAR = np.dtype([("bytes", "<u8"), ("sha256", "V32")])
SAMPLE = np.dtype(
    [("key", *SPAN), ("task", *SPAN), ("first_member", "<u4"), ("members", "<u4"), ("wave_samples", "<u8"), ("frames", "<u8")]
)
MEMBER = np.dtype([("suffix", *SPAN), ("offset", "<u8"), ("bytes", "<u8"), ("xxh3", "<u8"), ("length", "<u8")])
_SAMPLE, _MEMBER = struct.Struct("<2Q2I2Q"), struct.Struct("<5Q")
"""The same records for ``struct``, which takes one apart ten times as fast as numpy; a span is one number there."""
_LOW = 0xFFFFFFFF
_new_tuple = tuple.__new__  # for named tuples, three times as fast as their own


class Member(NamedTuple):
    """One file in the tar."""

    suffix: str
    """After the key and a dot: ``json``, ``audio0.flac``, ``codes0.npy``."""
    offset: int
    """Of its first byte in the tar, or ``BESIDE`` it."""
    size: int
    """Bytes."""
    xxh3: int
    length: int
    """Wave samples at the encoder's rate of an audio, frames of codes, 0 of JSON."""

    @property
    def name(self) -> str:
        """As the sample calls it: ``audio0``."""
        return NAME_AND_KIND[self.suffix][0]

    @property
    def kind(self) -> str:
        """``json``, ``audio`` or ``codes``."""
        return NAME_AND_KIND[self.suffix][1]


class _NamesAndKinds(dict[str, tuple[str, str]]):
    def __missing__(self, suffix: str) -> tuple[str, str]:
        name = suffix.partition(".")[0]
        found = name, name.rstrip("0123456789")
        if len(self) < 10_000:  # suffixes are few, but for hostile ones
            self[suffix] = found
        return found


NAME_AND_KIND = _NamesAndKinds()
"""Of a member, by its suffix."""


class IndexedSample(NamedTuple):
    key: str
    task: str
    members: tuple[Member, ...]

    def length(self, kind: str) -> int:
        """Summed over its members of that kind."""
        return sum(member.length for member in self.members if member.kind == kind)


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """A mapped index; nothing is parsed until it is asked for."""

    tar_bytes: int
    tar_sha256: str
    samples: np.ndarray
    """``SAMPLE`` records; ``["wave_samples"]`` and ``["frames"]`` are sums over the sample's members."""
    members: np.ndarray
    """``MEMBER`` records of all samples, in the order of the tar."""
    text: np.ndarray

    @classmethod
    def open(cls, path: Path) -> ShardIndex:
        """Raises ``WorkError`` where the file is missing or damaged."""
        tar, samples, members, text = open_sections(path, MAGIC, VERSION, (TAR, SAMPLE, MEMBER, TEXT))
        return cls(int(tar["bytes"][0]), tar["sha256"][0].tobytes().hex(), samples, members, text)

    @staticmethod
    def to_bytes(samples: list[IndexedSample], tar_bytes: int, tar_sha256: str) -> bytes:
        strings = Strings()
        sample_rows: list[tuple[object, ...]] = []
        member_rows: list[tuple[object, ...]] = []
        for sample in samples:
            spans = (strings.span(sample.key), strings.span(sample.task))
            sample_rows.append((*spans, len(member_rows), len(sample.members), sample.length("audio"), sample.length("codes")))
            member_rows += [(strings.span(m.suffix), m.offset, m.size, m.xxh3, m.length) for m in sample.members]
        tar = np.array([(tar_bytes, bytes.fromhex(tar_sha256))], TAR)
        return to_bytes(MAGIC, VERSION, [tar, np.array(sample_rows, SAMPLE), np.array(member_rows, MEMBER), strings.section()])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> IndexedSample:
        key, task, first, count, _, _ = _SAMPLE.unpack_from(self._sample_bytes, number * _SAMPLE.size)
        records = _MEMBER.iter_unpack(self._member_bytes[first * _MEMBER.size : (first + count) * _MEMBER.size])
        strings = self._strings
        members = [_new_tuple(Member, (strings[span], offset, size, xxh3, length)) for span, offset, size, xxh3, length in records]
        return _new_tuple(IndexedSample, (str(self._text[key & _LOW : key >> 32], "utf-8"), strings[task], tuple(members)))

    def __iter__(self) -> Iterator[IndexedSample]:
        return (self[number] for number in range(len(self)))

    @cached_property
    def _sample_bytes(self) -> memoryview:
        return self.samples.view(np.uint8).data

    @cached_property
    def _member_bytes(self) -> memoryview:
        return self.members.view(np.uint8).data

    @cached_property
    def _text(self) -> memoryview:
        return self.text.data

    @cached_property
    def _strings(self) -> _Strings:
        return _Strings(self._text)


class _Strings(dict[int, str]):
    """Strings that recur, by span: the suffixes and tasks of a shard."""

    def __init__(self, text: memoryview) -> None:
        self._text = text

    def __missing__(self, span: int) -> str:
        self[span] = found = str(self._text[span & _LOW : span >> 32], "utf-8")
        return found
