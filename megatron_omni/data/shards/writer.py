"""Writes one shard: a tar that any WebDataset reader knows, and its index. Equal samples give equal bytes.

Members of a sample lie side by side, ``KEY.json`` first. Headers are plain USTAR without times, owners or anything
else of the machine. The tar, then the index, appear under their names when they are complete.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
import orjson
import xxhash

from megatron_omni.data.shards.index import IndexedSample, Member, ShardIndex
from megatron_omni.runtime.files import atomic_open, atomic_write
from megatron_omni.schema import Sample


class ShardWriter:
    """``with ShardWriter(path) as writer: writer.add(...)``; an exception inside leaves no shard behind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples: list[IndexedSample] = []
        self.tar_bytes = 0
        self.tar_sha256 = ""
        """Hex; set when the shard is complete, as is the next."""
        self.index_sha256 = ""
        self._hash = hashlib.sha256()
        self._stack = ExitStack()

    def __enter__(self) -> ShardWriter:
        self._file = self._stack.enter_context(atomic_open(self.path))
        return self

    def add(self, sample: Sample, audio: Mapping[str, bytes], codes: Mapping[str, np.ndarray]) -> None:
        """Appends a sample.

        Args:
            sample: With the lengths of its arrays.
            audio: FLAC files by name.
            codes: uint16 [K, T] by name.
        """
        members = [("json", orjson.dumps(sample.to_json()), 0)]
        members += [(f"{name}.flac", data, sample.num_samples[name]) for name, data in audio.items()]
        members += [(f"{name}.npy", _npy(array), sample.num_frames[name]) for name, array in codes.items()]
        self.add_members(sample.id, sample.task, members)

    def add_members(self, key: str, task: str, members: Iterable[tuple[str, bytes, int]]) -> None:
        """Appends a sample of ready files: suffix, bytes and length of each."""
        self.samples.append(IndexedSample(key, task, tuple(self._member(key, *member) for member in members)))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._write(bytes(2 * tarfile.BLOCKSIZE))  # the end of a tar
        self._stack.__exit__(kind, error, trace)
        if kind is None:
            self.tar_sha256 = self._hash.hexdigest()
            index = ShardIndex.to_bytes(self.samples, self.tar_bytes, self.tar_sha256)
            self.index_sha256 = hashlib.sha256(index).hexdigest()
            atomic_write(self.path.with_suffix(".index"), index)

    def _member(self, key: str, suffix: str, data: bytes, length: int) -> Member:
        header = tarfile.TarInfo(f"{key}.{suffix}")
        header.size = len(data)
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self.tar_bytes
        self._write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
        return Member(suffix, offset, len(data), xxhash.xxh3_64_intdigest(data), length)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.tar_bytes += len(data)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()
