"""A folder of recordings with their texts beside them: ``a/b.flac`` with ``a/b.normalized.txt``, ``a/b.txt`` or ``a/b.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import xxhash

from megatron_omni.data.sources.columns import Columns, mapped_entry
from megatron_omni.data.sources.line import Entry, Reject
from megatron_omni.data.sources.source import file_stamps
from megatron_omni.runtime.errors import InputError

AUDIO = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".wma", ".aiff", ".webm", ".mp4"}
"""What counts as a recording; some need the ffmpeg decoder."""

TEXTS = (".normalized.txt", ".txt", ".lab")
"""Endings of a text, the first that is there counts (LibriTTS has two)."""


class AudioFolder:
    """A ``Source``: recordings by path, so that the order does not depend on the file system."""

    needs_codec: bool

    def __init__(self, folder: Path, columns: Columns) -> None:
        """Raises ``InputError`` where there is no recording, or two have one id."""
        self.folder, self.columns = folder, columns
        self.name = folder.name
        self.needs_codec = columns.needs_codec
        self._paths = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix.lower() in AUDIO and path.is_file())
        if not self._paths:
            raise InputError(f"{folder}: holds no recording ({' '.join(sorted(AUDIO))}); give the folder that holds them")
        ids: dict[str, str] = {}
        for path in self._paths:
            if (other := ids.setdefault(_id(path), path)) != path:
                raise InputError(f"{folder}: {other} and {path} would both have the id {_id(path)!r}; rename one")
        self.digest = xxhash.xxh3_128_hexdigest("\n".join(self._paths).encode())

    def __len__(self) -> int:
        return len(self._paths)

    def entries(self, start: int, stop: int) -> list[Entry | Reject]:
        return [self._entry(number) for number in range(start, stop)]

    def identity(self, start: int, stop: int) -> bytes:
        files = [file for path in self._paths[start:stop] for file in (self.folder / path, *self._sidecars(path))]
        return b"\n".join([f"{self.name} {start} {self.columns.model_dump_json()}".encode(), file_stamps(files)])

    def _sidecars(self, path: str) -> list[Path]:
        stem = (self.folder / path).with_suffix("")
        return [file for file in (stem.with_name(stem.name + ending) for ending in (*TEXTS, ".json")) if file.is_file()]

    def _entry(self, number: int) -> Entry | Reject:
        path = self._paths[number]
        record: dict[str, Any] = {"id": _id(path), "audio": path, "folder": str(Path(path).parent)}
        try:
            for file in reversed(self._sidecars(path)):  # so that the first of TEXTS is written last
                if file.suffix == ".json":
                    record |= orjson.loads(file.read_bytes())
                else:
                    record["text"] = file.read_text(encoding="utf-8").strip()
        except (OSError, ValueError, TypeError) as error:
            return Reject(number + 1, _id(path), f"{file}: cannot be read ({error}); expected UTF-8, a .json with one object")
        return mapped_entry(record, self.columns, number + 1, self.folder, self.name)


def _id(path: str) -> str:
    return str(Path(path).with_suffix("")).replace("/", "-").replace(".", "-").replace(" ", "-")
