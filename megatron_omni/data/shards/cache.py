"""A cache of folders on disk: bounded, shared by all processes of a machine, each entry complete or absent.

An entry is named by the hashes of what it holds, so that it never goes stale, and data sets share equal shards. It is filled
under a temporary name and renamed. Two processes that want the same entry fill it once: the second waits for the first, but
not for ever. Over the limit, the entries that were used longest ago go; files that a process has mapped stay readable to it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import tenacity

from megatron_omni.runtime.errors import WorkError

PATIENCE = 300.0
"""Seconds that one process waits for another that fills the same entry; then it fills it itself."""

_STALE = 24 * 3600
"""Seconds after which a temporary folder was left by a killed process."""


class FolderCache:
    def __init__(self, folder: Path, limit: int) -> None:
        """``limit`` in bytes; the newest entry stays even if it alone is larger."""
        self.folder, self.limit = folder, limit

    def get(self, key: str, fill: Callable[[Path], None]) -> Path:
        """The entry's folder; ``fill`` writes its files where there is none yet.

        Raises:
            WorkError: The disk is full, or the cache cannot be written. What ``fill`` raises is passed on.
        """
        entry = self.folder / key
        if self._touch(entry):
            return entry
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock(key):
                if not self._touch(entry):
                    self._fill(entry, fill)
                    self._evict(entry)
        except OSError as error:
            raise WorkError(
                f"{self.folder}: the cache of remote shards cannot be written ({error}); make room, or set XDG_CACHE_HOME"
            ) from error
        return entry

    def discard(self, key: str) -> None:
        self._remove(self.folder / key)

    def _fill(self, entry: Path, fill: Callable[[Path], None]) -> None:
        partial = self._temporary(entry)
        partial.mkdir()
        try:
            fill(partial)
            if not entry.exists():  # or a process that ran out of patience was faster
                os.rename(partial, entry)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _evict(self, newest: Path) -> None:
        used: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            try:
                status = path.stat()
                if path.name.startswith("."):
                    if path.suffix == ".tmp" and time.time() - status.st_mtime > _STALE:
                        shutil.rmtree(path, ignore_errors=True)
                else:
                    used.append((status.st_mtime, sum(file.stat().st_size for file in path.iterdir()), path))
            except OSError:  # another process has just removed it
                continue
        held = sum(size for _, size, _ in used)
        for _, size, path in sorted(used):
            if held <= self.limit:
                break
            if path != newest:
                self._remove(path)
                held -= size

    def _remove(self, entry: Path) -> None:
        """First out of sight, so that nobody finds half an entry."""
        hidden = self._temporary(entry)
        try:
            os.rename(entry, hidden)
        except OSError:
            return
        shutil.rmtree(hidden, ignore_errors=True)

    def _temporary(self, entry: Path) -> Path:
        return self.folder / f".{entry.name}.{os.getpid()}-{uuid4().hex[:8]}.tmp"

    @staticmethod
    def _touch(entry: Path) -> bool:
        """Whether the entry is there; it counts as used."""
        try:
            os.utime(entry)
        except FileNotFoundError:
            return False
        except OSError:  # a cache that may only be read
            return entry.exists()
        return True

    @contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        """Held by one process, or thread, at a time; given up when its holder dies."""
        handle = os.open(self.folder / f".lock-{key[:2]}", os.O_RDWR | os.O_CREAT, 0o666)

        def locked() -> bool:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:  # a file system without locks: entries are complete all the same, some are filled twice
                return True
            return True

        try:
            tenacity.Retrying(
                retry=tenacity.retry_if_result(lambda held: not held),
                stop=tenacity.stop_after_delay(PATIENCE),
                wait=tenacity.wait_fixed(0.05),
                retry_error_callback=lambda _: None,
            )(locked)
            yield
        finally:
            os.close(handle)
