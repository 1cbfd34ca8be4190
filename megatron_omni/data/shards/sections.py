"""Small binary tables that are mapped, not parsed: the container of shard indexes and of a data set's table of shards.

A file is a magic of 8 bytes, a version and a number of sections (uint32 each), the number of records of each section
(uint64), the sections, and an xxh3-64 of all that comes before it. Every part starts at a multiple of 8 bytes, all
numbers are little-endian, and the records of a section have one fixed numpy dtype that reader and writer agree on.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import xxhash

from megatron_omni.runtime.errors import WorkError

TEXT = np.dtype(np.uint8)
"""Section of all strings of a file, one after the other in UTF-8; records point into it with ``SPAN``."""

SPAN = ("<u4", (2,))
"""Field of a record: first byte of a string and the byte after its last."""


class Strings:
    """Collects strings for a ``TEXT`` section; a string that occurs again is stored once."""

    def __init__(self) -> None:
        self._spans: dict[str, tuple[int, int]] = {}
        self._size = 0

    def span(self, text: str) -> tuple[int, int]:
        if text not in self._spans:
            start, self._size = self._size, self._size + len(text.encode())
            self._spans[text] = (start, self._size)
        return self._spans[text]

    def section(self) -> np.ndarray:
        return np.frombuffer("".join(self._spans).encode(), TEXT)


def to_bytes(magic: bytes, version: int, sections: Sequence[np.ndarray]) -> bytes:
    """The whole file; ``magic`` has 8 bytes."""
    parts = [struct.pack("<8sII", magic, version, len(sections)), struct.pack(f"<{len(sections)}Q", *map(len, sections))]
    parts += [_padded(section.tobytes()) for section in sections]
    content = b"".join(parts)
    return content + struct.pack("<Q", xxhash.xxh3_64_intdigest(content))


def open_sections(path: Path, magic: bytes, version: int, dtypes: Sequence[np.dtype]) -> list[np.ndarray]:
    """Maps the sections of a file, read-only, after checking it whole.

    Raises:
        WorkError: The file is missing, damaged, of another kind or of another version.
    """
    try:
        content = np.asarray(np.memmap(path, np.uint8, "r"))  # a plain array: slices of a memmap are slow to make
    except (OSError, ValueError) as error:
        raise WorkError(f"{path}: cannot be read ({error}); build its shard again") from error
    head = struct.calcsize("<8sII")
    if len(content) < head + 8 or content[:8].tobytes() != magic:
        raise WorkError(
            f"{path}: starts with {content[:8].tobytes()!r}, expected {magic!r}; it is another file, or cut: build its shard again"
        )
    _, found, count = struct.unpack("<8sII", content[:head].tobytes())
    if found != version:
        raise WorkError(f"{path}: has format version {found}, this program reads {version}; update it, or build the shard again")
    if struct.unpack("<Q", content[-8:].tobytes())[0] != xxhash.xxh3_64_intdigest(content[:-8].data) or count != len(dtypes):
        raise WorkError(f"{path}: its bytes do not match its checksum; build its shard again")
    lengths = struct.unpack(f"<{count}Q", content[head : head + 8 * count].tobytes())
    sections, offset = [], head + 8 * count
    for length, dtype in zip(lengths, dtypes, strict=True):
        sections.append(content[offset : offset + length * dtype.itemsize].view(dtype))
        offset += length * dtype.itemsize + -length * dtype.itemsize % 8
    return sections


def text_at(text: np.ndarray, span: Iterable[int]) -> str:
    start, stop = span
    return text[start:stop].tobytes().decode()


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)
