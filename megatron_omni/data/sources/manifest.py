"""The manifest: one JSON line per sample, as a person writes it, and what becomes of it.

A line is ``{"id": "utt1", "audio": "wavs/utt1.wav", "text": "three five", "task": "transcribe"}``; see ``Line`` for the
optional keys. Paths are relative to the manifest. A broken manifest (no JSON, an unknown key or task, an id twice) is
refused whole, before any work. What is wrong with one sample (its audio, its text, its codes) shows when it is built.

Manifests of other makers are JSON lines too (NeMo, Lhotse cuts): with ``columns`` each line is mapped to ours, and one
that does not fit is rejected alone.
"""

from __future__ import annotations

import gzip
import zlib
from array import array
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, cast

import fsspec
import numpy as np
import orjson
import xxhash
from pydantic import ValidationError

from megatron_omni.data.sources.columns import Columns, fallback_id, mapped_entry, sample_id
from megatron_omni.data.sources.line import Entry, Line, Reject, entry_of, explain
from megatron_omni.data.sources.source import file_stamps, folder_of, stem_of
from megatron_omni.runtime.errors import InputError

MAX_FAULTS = 20
"""Faults that one refusal lists."""


class Manifest:
    """A ``Source``: JSON lines in a file, plain or gzipped, on disk or behind a URL. Only the place of each line is held in memory."""

    def __init__(self, path: Path | str, columns: Columns | None, lines: np.ndarray, needs_codec: bool, digest: str) -> None:
        self.path = path
        self.name = stem_of(path)
        self.columns = columns
        self._lines = lines
        """int64 [samples, 3]: line number, first byte, byte after the last."""
        self.needs_codec = needs_codec
        self.digest = digest

    @classmethod
    def read(cls, path: Path | str, columns: Columns | None = None) -> Manifest:
        """Checks every line.

        Args:
            columns: Of another maker's lines; None: the lines are ours.

        Raises:
            InputError: No such file, no line in it, or faults, of which the first 20 are named by line.
        """
        faults: list[tuple[int, str]] = []
        lines, ids = array("q"), array("Q")
        needs_codec, offset, whole = columns is not None and columns.needs_codec, 0, xxhash.xxh3_128()
        try:
            with _open(path) as file:
                for number, raw in enumerate(file, 1):
                    whole.update(raw)
                    offset += len(raw)
                    if not raw.strip():
                        continue
                    try:
                        key, speaks = _key_and_speech(raw, columns, number)
                    except ValidationError as error:
                        faults += [(number, fault) for fault in explain(error)]
                        continue
                    except ValueError as error:
                        faults.append((number, f"{error}; a line is one JSON object in UTF-8"))
                        continue
                    lines.extend((number, offset - len(raw), offset))
                    ids.append(xxhash.xxh3_64_intdigest(key.encode()))
                    needs_codec = needs_codec or speaks
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"manifest {path}: cannot be read ({error}); give a file of JSON lines") from error
        manifest = cls(path, columns, np.array(lines, np.int64).reshape(-1, 3), needs_codec, whole.hexdigest())
        faults += manifest._repeated_ids(np.array(ids, np.uint64))
        if faults:
            faults.sort(key=lambda fault: fault[0])
            shown = [f"{path}:{number}: {fault}" for number, fault in faults[:MAX_FAULTS]]
            more = [f"... and {len(faults) - MAX_FAULTS} more"] if len(faults) > MAX_FAULTS else []
            raise InputError("\n".join([f"manifest {path}: faults: {len(faults)}; nothing was built:", *shown, *more]))
        if not len(manifest):
            raise InputError(f"manifest {path}: holds no line; expected one JSON object per sample")
        return manifest

    def __len__(self) -> int:
        return len(self._lines)

    def entries(self, start: int, stop: int) -> list[Entry | Reject]:
        numbers = self._lines[start:stop, 0].tolist()
        return [self._entry(raw, number) for raw, number in zip(self.raw(start, stop), numbers, strict=True)]

    def identity(self, start: int, stop: int) -> bytes:
        files = [file for entry in self.entries(start, stop) if isinstance(entry, Entry) for file in entry.files()]
        head = f"{self.name} {self._lines[start, 0]} {'' if self.columns is None else self.columns.model_dump_json()}".encode()
        return b"\n".join([head, file_stamps(files), *self.raw(start, stop)])

    def raw(self, start: int, stop: int) -> list[bytes]:
        """The lines of samples ``start .. stop - 1`` as they stand in the file."""
        self._file.seek(int(self._lines[start, 1]))
        block = self._file.read(int(self._lines[stop - 1, 2] - self._lines[start, 1]))
        places = self._lines[start:stop, 1:] - self._lines[start, 1]
        return [block[first:last] for first, last in places.tolist()]

    @cached_property
    def _file(self) -> BinaryIO:
        """Kept open: in a gzipped file every way back begins at its start."""
        return _open(self.path)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_file"}

    def _entry(self, raw: bytes, number: int) -> Entry | Reject:
        base = folder_of(self.path)
        if self.columns is None:
            return entry_of(Line.model_validate_json(raw), number, base, self.name)
        return mapped_entry(orjson.loads(raw), self.columns, number, base, self.name)

    def _repeated_ids(self, hashes: np.ndarray) -> list[tuple[int, str]]:
        """Finds ids that occur twice; equal hashes are looked up, since different ids may share one."""
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        faults = []
        for first, second in zip(order[same].tolist(), order[same + 1].tolist(), strict=True):
            lines = [int(self._lines[sample, 0]) for sample in (first, second)]
            raw = [self.raw(sample, sample + 1)[0] for sample in (first, second)]
            earlier, later = (_key_and_speech(content, self.columns, line)[0] for content, line in zip(raw, lines, strict=True))
            if earlier == later:
                faults.append((lines[1], f"id {later!r} is that of line {lines[0]} too; ids are unique: rename or drop one"))
        return faults


def _open(path: Path | str) -> BinaryIO:
    file = fsspec.open(str(path), "rb").open()
    return cast(BinaryIO, gzip.GzipFile(fileobj=file) if str(path).endswith(".gz") else file)


def _key_and_speech(raw: bytes, columns: Columns | None, number: int) -> tuple[str, bool]:
    """The id of a line, and whether it has speech to learn."""
    if columns is not None:
        record = orjson.loads(raw)
        if not isinstance(record, dict):
            raise ValueError(f"holds {type(record).__name__}")
        return sample_id(record, columns, fallback_id(number)), columns.needs_codec
    line = Line.model_validate_json(raw)
    parts = [part for turn in line.turns() if not isinstance(turn.content, str) for part in turn.content]
    return line.id, any(part.type == "codes" for part in parts)
