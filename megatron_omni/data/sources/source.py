"""What the builder asks of any collection."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import orjson

from megatron_omni.data.sources.line import Entry, Reject


class Source(Protocol):
    """A collection of samples in a fixed order. It is pickled to the processes that decode, which call ``entries``."""

    name: str
    """The default ``source`` of its samples."""
    digest: str
    """xxh3-128 of its listing, hex."""
    needs_codec: bool
    """Whether some sample has speech to be encoded, or codes to be checked."""

    def __len__(self) -> int: ...

    def entries(self, start: int, stop: int) -> list[Entry | Reject]:
        """Samples ``start .. stop - 1``; nothing is decoded."""
        ...

    def identity(self, start: int, stop: int) -> bytes:
        """All that these samples depend on, so that a corrected line or file is noticed on a restart."""
        ...


def file_stamps(files: Iterable[Path]) -> bytes:
    """Sizes and times of local files; None for one that is not there. Remote files are taken as never changing."""
    return orjson.dumps({str(path): size_and_time(path) for path in files})


def size_and_time(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def is_url(where: str | Path) -> bool:
    return isinstance(where, str) and "://" in where


def folder_of(where: str | Path) -> Path | str:
    """What paths in the file ``where`` are relative to."""
    return str(where).rpartition("/")[0] if is_url(where) else Path(where).parent


def stem_of(where: str | Path) -> str:
    """File or folder name without its extensions: ``corpus`` of ``s3://b/corpus.jsonl.gz``."""
    return str(where).rstrip("/").rpartition("/")[2].partition(".")[0]
