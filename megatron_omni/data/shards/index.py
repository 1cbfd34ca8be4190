"""The sidecar index of a tar: where each member of each sample lies, its hash and its length. ``shard-000000.index``."""

from __future__ import annotations

import functools
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
_SAMPLE, _MEMBER = struct.Struct("<6I2Q"), struct.Struct("<2I4Q")
"""The same records for ``struct``, which takes one apart ten times as fast as numpy."""


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
        return _name_and_kind(self.suffix)[0]

    @property
    def kind(self) -> str:
        """``json``, ``audio`` or ``codes``."""
        return _name_and_kind(self.suffix)[1]


@functools.lru_cache(1024)
def _name_and_kind(suffix: str) -> tuple[str, str]:
    name = suffix.partition(".")[0]
    return name, name.rstrip("0123456789")


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
        text, suffixes = self._text, self._suffixes
        *spans, first, count, _, _ = _SAMPLE.unpack_from(self._sample_bytes, number * _SAMPLE.size)
        key, task = (str(text[start:stop], "utf-8") for start, stop in (spans[:2], spans[2:]))
        members = []
        for start, stop, *rest in _MEMBER.iter_unpack(self._member_bytes[first * _MEMBER.size : (first + count) * _MEMBER.size]):
            suffix = suffixes.get((start, stop))
            if suffix is None:
                suffix = suffixes[start, stop] = str(text[start:stop], "utf-8")
            members.append(Member(suffix, *rest))
        return IndexedSample(key, task, tuple(members))

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
    def _suffixes(self) -> dict[tuple[int, int], str]:
        """By span; a shard has a handful."""
        return {}
