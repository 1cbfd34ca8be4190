"""Data sets behind a URL of any file system that fsspec knows: ``https://``, ``s3://``, ``gs://``, ...

A shard is brought whole into a cache on disk, compared with the sha256 that the table of shards has, and then read as a local one.
Or, where only a few samples are wanted (``reads="ranges"``), only its index is brought, and blocks of the tar are read as they
are needed, each member compared with its xxh3. Every request is bounded in time and tried again a few times.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import fsspec
import numpy as np
import tenacity
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

from megatron_omni.data.shards.cache import FolderCache
from megatron_omni.data.shards.index import BESIDE, ShardIndex
from megatron_omni.data.shards.info import AUDIO_RATE, DatasetInfo
from megatron_omni.data.shards.info import FILE as INFO
from megatron_omni.data.shards.prefetch import Prefetcher
from megatron_omni.data.shards.shard import DamagedError, Shard
from megatron_omni.data.shards.table import FILE as TABLE
from megatron_omni.data.shards.table import SHARD, ShardRecord, ShardTable
from megatron_omni.runtime.errors import InputError, WorkError
from megatron_omni.runtime.files import sha256_file
from megatron_omni.runtime.logs import get_logger

logger = get_logger(__name__)

PIECE = 8 * 2**20
"""Bytes asked for at a time."""

BLOCK, BLOCKS = 2**18, 16
"""Bytes, and number kept per open shard, of what is read of a tar that stays where it is."""


@dataclass(frozen=True)
class RemoteOptions:
    cache: Path | None = None
    """Folder; None: ``shards`` in the user's cache directory (``XDG_CACHE_HOME``)."""
    cache_bytes: int = 100 * 10**9
    reads: Literal["shards", "ranges"] = "shards"
    """Whole shards, or only the blocks that are needed."""
    timeout: float = 30.0
    """Seconds that a request for ``PIECE`` bytes may take."""
    attempts: int = 4
    """Of each request."""
    backoff: float = 0.5
    """Seconds before the second attempt; they double with each, and are jittered."""
    max_backoff: float = 20.0

    def folder_cache(self) -> FolderCache:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return FolderCache(self.cache or home / "megatron_omni" / "shards", self.cache_bytes)


def url_of(place: str | Path) -> str | None:
    """The URL that ``place`` is, None for a local folder. ``Path`` makes one slash of two, so ``s3:/bucket`` is one too.

    Raises:
        InputError: It would run a command.
    """
    text = str(place)
    if text.startswith("pipe:"):
        raise InputError(f"{text}: would run a command; give the URL of a folder (https://, s3://, ...), or copy the data set to a disk")
    found = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", text)
    return None if found is None or found[1] in ("file", "local") else f"{found[1]}://{found[2].rstrip('/')}"


def local_path(place: str | Path) -> Path:
    """Of a path or a ``file:`` URL."""
    return Path(re.sub(r"^(file|local):/+", "/", str(place)))


class MissingError(WorkError):
    """A file is not there."""


class RemoteFiles:
    """The files of a remote folder, by name."""

    def __init__(self, url: str, options: RemoteOptions) -> None:
        self.url, self._options = url, options
        self._file_system = functools.lru_cache(1)(self._connect)
        """By process: connections do not survive a fork."""

    def place(self, name: str) -> str:
        return f"{self.url}/{name}"

    def read(self, name: str, likely_bytes: int = 0) -> bytes:
        """A whole file; ``likely_bytes`` lengthens the time it may take.

        Raises:
            MissingError: There is no such file.
            WorkError: It cannot be read.
        """
        return self._tried(name, lambda: self._request(name, None, None, likely_bytes / PIECE))

    def read_from(self, name: str, start: int, stop: int, size: int) -> bytes:
        """Bytes from ``start`` to ``stop`` of a file of ``size`` bytes; or to its end, where the server does not know ranges."""

        def request() -> bytes:
            data = self._request(name, start, stop)
            if len(data) == stop - start:
                return data
            if len(data) == size:
                return data[start:]
            raise OSError(f"{len(data)} bytes came, expected {stop - start}")

        return self._tried(name, request)

    def copy(self, name: str, size: int, to: Path) -> str:
        """Writes the file to ``to``, piece by piece; returns its sha256, hex."""
        done, digest = 0, hashlib.sha256()
        with open(to, "wb") as file:
            while done < size:
                data = self.read_from(name, done, min(done + PIECE, size), size)
                digest.update(data)
                file.write(data)
                done += len(data)
        return digest.hexdigest()

    def _request(self, name: str, start: int | None, stop: int | None, pieces: float = 0) -> bytes:
        fs, root = self._file_system(os.getpid())
        limit = self._options.timeout * max(1.0, pieces)
        data: bytes = sync(fs.loop, fs._cat_file, f"{root}/{name}", start=start, end=stop, timeout=limit)
        return data

    def _tried(self, name: str, request: Callable[[], bytes]) -> bytes:
        options = self._options
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_may_pass),
            stop=tenacity.stop_after_attempt(options.attempts),
            wait=tenacity.wait_exponential_jitter(options.backoff, options.max_backoff, jitter=options.backoff),
            before_sleep=lambda state: logger.info("%s: %r; trying again", self.place(name), state.outcome and state.outcome.exception()),
            reraise=True,
        )
        try:
            return retrying(request)
        except FileNotFoundError as error:
            raise InputError(
                f"{self.place(name)}: there is no such file; give the URL of a folder that make_shards has finished"
            ) from error
        except Exception as error:  # each file system has errors of its own
            what = f"timed out after {options.timeout:g} s" if isinstance(error, asyncio.TimeoutError) else repr(error)
            tries = retrying.statistics.get("attempt_number", 1)
            raise WorkError(
                f"{self.place(name)}: cannot be read after {tries} attempts ({what}); check the server, then start again"
            ) from error

    def _connect(self, process: int) -> tuple[AsyncFileSystem, str]:
        fs, root = fsspec.url_to_fs(self.url)
        return (fs if fs.async_impl else AsyncFileSystemWrapper(fs, asynchronous=False)), root


class RemoteFolder:
    """A ``Folder``."""

    remote = True

    def __init__(self, url: str, options: RemoteOptions) -> None:
        self.place = url
        self._files, self._options, self._cache = RemoteFiles(url, options), options, options.folder_cache()
        try:
            fsspec.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise InputError(f"{url}: {error}") from error
        try:
            content = self._files.read(INFO)
        except MissingError as error:
            raise InputError(f"{self._files.place(INFO)}: there is no such file; give a folder that make_shards has finished") from error
        self.info = DatasetInfo.parse(content, self._files.place(INFO))
        self.table = ShardTable(self._cache.get(self.info.table_sha256, self._bring_table))
        self._prefetcher = Prefetcher(self._bring)

    def shard(self, record: ShardRecord) -> Shard:
        for last in (False, False, True):
            path = self._bring(record)
            try:
                return self._open(path, record)
            except WorkError as error:
                if last or not (isinstance(error, DamagedError) or _is_changed(path.with_suffix(".index"), record.index_sha256)):
                    raise
                self.forget(record)
        raise AssertionError

    def prefetch(self, records: Sequence[ShardRecord]) -> None:
        self._prefetcher.ask(records)

    def forget(self, record: ShardRecord) -> bool:
        logger.warning("%s: its copy in the cache is damaged and is brought again", self._files.place(record.name))
        self._cache.discard(self._key(record))
        return True

    def _open(self, path: Path, record: ShardRecord) -> Shard:
        tar = RemoteTar(self._files, record) if self._options.reads == "ranges" else None
        return Shard(path, record, self.info.sample_rate == AUDIO_RATE, tar, self._files.place(record.name))

    def _key(self, record: ShardRecord) -> str:
        return f"{record.tar_sha256[:32]}-{record.index_sha256[:32]}" + ("-index" if self._options.reads == "ranges" else "")

    def _bring(self, record: ShardRecord) -> Path:
        """Path of the tar in the cache, where the index lies beside it."""
        return self._cache.get(self._key(record), lambda folder: self._bring_shard(folder, record)) / "shard.tar"

    def _bring_shard(self, folder: Path, record: ShardRecord) -> None:
        stem = record.name.removesuffix(".tar")
        index = folder / "shard.index"
        self._bring_file(f"{stem}.index", record.index_sha256, lambda name: _write(index, self._files.read(name)))
        members = ShardIndex.open(index).members
        beside = members[members["offset"] >= BESIDE]
        if len(beside):  # each of them has its own hash
            size = int((beside["offset"] - np.uint64(BESIDE) + beside["bytes"]).max())
            self._files.copy(f"{stem}.samples", size, folder / "shard.samples")
        if self._options.reads == "shards":
            tar = folder / "shard.tar"
            self._bring_file(record.name, record.tar_sha256, lambda name: self._files.copy(name, record.tar_bytes, tar))

    def _bring_table(self, folder: Path) -> None:
        likely = self.info.totals.shards * (SHARD.itemsize + 32)
        self._bring_file(TABLE, self.info.table_sha256, lambda name: _write(folder / name, self._files.read(name, likely)))

    def _bring_file(self, name: str, sha256: str, bring: Callable[[str], str]) -> None:
        """``bring`` returns the sha256 of what came; wrong bytes are asked for once more."""
        found = ""
        for _ in range(2):
            found = bring(name)
            if found == sha256:
                return
        raise DamagedError(f"{self._files.place(name)}: sha256 of what came is {found[:12]}..., expected {sha256[:12]}...; upload it again")


class RemoteTar:
    """``TarBytes`` of a tar that stays where it is, read by blocks; the last ones are kept."""

    def __init__(self, files: RemoteFiles, record: ShardRecord) -> None:
        self._files, self._name, self._size = files, record.name, record.tar_bytes
        self._block = functools.lru_cache(BLOCKS)(self._read_block)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, place: slice, /) -> memoryview:
        start, stop, _ = place.indices(self._size)
        first = start // BLOCK
        blocks = [self._block(number) for number in range(first, -(-stop // BLOCK))]
        joined = blocks[0] if len(blocks) == 1 else b"".join(blocks)
        return memoryview(joined)[start - first * BLOCK : stop - first * BLOCK]

    def _read_block(self, number: int) -> bytes:
        start, stop = number * BLOCK, min((number + 1) * BLOCK, self._size)
        return self._files.read_from(self._name, start, stop, self._size)[: stop - start]


def _is_changed(path: Path, sha256: str) -> bool:
    """Whether a file of the cache has rotten, or was evicted."""
    try:
        return sha256_file(path) != sha256
    except OSError:
        return True


def _may_pass(error: BaseException) -> bool:
    """Whether another attempt may go better."""
    if getattr(error, "status", None) in (401, 403, 405, 410):  # of HTTP: refused, gone
        return False
    return isinstance(error, Exception) and not isinstance(error, FileNotFoundError | PermissionError | NotImplementedError)


def _write(path: Path, content: bytes) -> str:
    """Returns its sha256, hex."""
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()
