"""Where shards go: a folder on disk, or the URL of one for fsspec. A file there is whole or absent."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from megatron_omni.data.sources.source import is_url, size_and_time
from megatron_omni.runtime.files import atomic_write, sha256_file

STALE_SECONDS = 600
"""A temporary file that nobody has written to for so long was left by a killed builder."""


class Output:
    """A folder of shards. Object stores show an object only when it was uploaded whole."""

    def __init__(self, where: str | Path) -> None:
        self.where = str(where)
        self._folder = None if is_url(where) else Path(where)
        if self._folder is None:
            self._fs, self._root = fsspec.url_to_fs(self.where)

    def place(self, name: str) -> str:
        """For messages."""
        return f"{self.where.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes | None:
        """None where there is no such file."""
        try:
            data: bytes = (self._folder / name).read_bytes() if self._folder is not None else self._fs.cat_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return None
        return data

    def write(self, name: str, data: bytes) -> None:
        if self._folder is not None:
            atomic_write(self._folder / name, data)
        else:
            self._fs.makedirs(self._root, exist_ok=True)
            self._fs.pipe_file(f"{self._root}/{name}", data)

    def sha256(self, name: str) -> str | None:
        """Hex; None where there is no such file."""
        try:
            if self._folder is not None:
                return sha256_file(self._folder / name)
            with self._fs.open(f"{self._root}/{name}", "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        if self._folder is not None:
            (self._folder / name).unlink(missing_ok=True)
        elif self._fs.exists(f"{self._root}/{name}"):
            self._fs.rm_file(f"{self._root}/{name}")

    def names(self) -> list[str]:
        if self._folder is not None:
            return sorted(path.name for path in self._folder.glob("*"))
        return sorted(str(path).rpartition("/")[2] for path in self._fs.ls(self._root, detail=False))

    @contextmanager
    def shard(self, name: str) -> Iterator[Path]:
        """A local path for a tar; the tar and the index beside it lie here when the block is left without an error."""
        if self._folder is not None:
            yield self._folder / name
            return
        with tempfile.TemporaryDirectory(prefix="shard-") as folder:
            yield (path := Path(folder) / name)
            self._fs.makedirs(self._root, exist_ok=True)
            for file in (path, path.with_suffix(".index")):
                self._fs.put_file(str(file), f"{self._root}/{file.name}")

    def sweep(self) -> None:
        """Removes temporary files of killed builders."""
        for path in self._folder.glob(".shard-*.tmp") if self._folder is not None else ():
            status = size_and_time(path)
            if status is not None and time.time_ns() - status[1] > STALE_SECONDS * 10**9:
                path.unlink(missing_ok=True)
