"""WebDataset tars of others as a source: members by their key, read through their offsets."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import orjson
import xxhash

from megatron_omni.data.sources.columns import Columns, mapped_entry
from megatron_omni.data.sources.line import Embedded, Entry, Reject
from megatron_omni.data.sources.source import stem_of
from megatron_omni.runtime.errors import InputError

TEXTS = {"txt", "cls", "text", "transcript"}
"""Endings of members that are read as text; ``json`` is parsed, others are bytes."""


class Tars:
    """A ``Source``: samples in the order of the tars."""

    def __init__(self, urls: Sequence[str], columns: Columns) -> None:
        """Scans the headers of all tars; raises ``InputError`` for one that is cut, holds links, or repeats a key."""
        self.columns, self.needs_codec = columns, columns.needs_codec
        self.urls = list(urls)
        self.name = stem_of(self.urls[0])
        self._samples: list[tuple[int, str, dict[str, tuple[int, int]]]] = []
        """Tar, key, and offset and size by ending."""
        seen: dict[str, str] = {}
        for number, url in enumerate(self.urls):
            for key, members in scan(url):
                if key in seen:
                    raise InputError(f"{url}: the key {key!r} occurs in {seen[key]} too; keys are unique: rename one")
                seen[key] = url
                self._samples.append((number, key, members))
        self.digest = xxhash.xxh3_128_hexdigest(orjson.dumps([(url, key, members) for url, key, members in self._samples]))

    def __len__(self) -> int:
        return len(self._samples)

    def entries(self, start: int, stop: int) -> list[Entry | Reject]:
        return [self._entry(number) for number in range(start, stop)]

    def identity(self, start: int, stop: int) -> bytes:
        slice_ = [(self.urls[tar], key, members) for tar, key, members in self._samples[start:stop]]
        return f"{self.name} {start} {self.columns.model_dump_json()}".encode() + orjson.dumps(slice_)

    def _entry(self, number: int) -> Entry | Reject:
        tar, key, members = self._samples[number]
        record: dict[str, Any] = {"__key__": key}
        with fsspec.open(self.urls[tar], "rb") as file:
            for ending, (offset, size) in members.items():
                file.seek(offset)
                data = file.read(size)
                try:
                    *outer, last = ending.split(".")
                    holder = record
                    for name in outer:  # ``codes.npy`` is found at the path codes.npy
                        holder = holder.setdefault(name, {})
                    holder[last] = _value(ending, data, f"{self.urls[tar]}: {key}.{ending}", offset)
                except ValueError as error:
                    return Reject(number + 1, key, f"{self.urls[tar]}: {key}.{ending} at offset {offset}: {error}")
        return mapped_entry(record, self.columns, number + 1, Path(), self.name)


def scan(url: str) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """Keys of a tar in order, with offset and size of each member by its ending (WebDataset: the first dot parts the two).

    Raises:
        InputError: The tar is cut or damaged, holds anything but plain files, or takes a key up again.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    last = None
    try:
        with fsspec.open(url, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                if not member.isreg() or member.name.startswith("/") or ".." in Path(member.name).parts:
                    raise InputError(f"{url}: the member {member.name!r} is a link, a device or lies outside; only plain files are read")
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if (key in samples and key != last) or ending.lower() in samples.get(key, {}):
                    raise InputError(f"{url}: the key {key!r} comes again at offset {member.offset}; the members of a sample lie together")
                samples.setdefault(key, {})[ending.lower()] = (member.offset_data, member.size)
                last = key
            file.seek(0, 2)
            if tar.offset > file.tell() or not samples:
                raise InputError(f"{url}: ends after {file.tell()} bytes, inside a member, or is empty; download it again")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{url}: is no readable tar ({error}); download it again") from error
    return list(samples.items())


def _value(ending: str, data: bytes, name: str, offset: int) -> Any:
    if ending == "json":
        return orjson.loads(data)
    return data.decode().strip() if ending in TEXTS else Embedded(name, data, offset)
