"""Files that are complete or absent: written under a temporary name, synced, then renamed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from uuid import uuid4


def fsync_directory(path: Path) -> None:
    """Makes renames and new names in ``path`` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Makes everything under ``folder`` survive a power cut."""
    for path in [*folder.rglob("*"), folder]:
        fsync_directory(path)


@contextmanager
def atomic_open(path: Path, mode: str = "wb") -> Iterator[IO]:  # type: ignore[type-arg]
    """Opens a temporary file beside ``path``; on a clean exit it is synced and renamed to ``path``.

    On an error the temporary file is removed and ``path`` is untouched. Two writers at once do not mix: the
    temporary name is unique on all machines, and the last rename wins with a whole file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{uuid4().hex[:8]}.tmp")
    try:
        with open(partial, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        fsync_directory(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes | str) -> None:
    with atomic_open(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in 4 MiB pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
