"""Columns of a foreign record to the keys of a line, by a short YAML file or a named preset.

::

    task: transcribe                 # task, prompt, source: the same for every sample
    audio: wav                       # any other key: a column
    text: {column: "answers.text[0]", lower: true}
    attributes: {emotion: emotion, speaker: spk_id}

A column is a path: names parted by dots, ``[0]`` for one item, ``[*]`` for all (texts are joined by blanks); with
``a | b`` the first one that is there is taken. ``map`` replaces values, one that it lacks is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_omni.data.sources.line import Embedded, Entry, Line, Reject, entry_of, explain
from megatron_omni.runtime.errors import InputError

PRESETS = Path(__file__).parent / "presets"
"""A YAML file for each public data set that the project knows."""


class Column(BaseModel):
    """Where a value comes from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    column: str
    lower: bool = False
    map: dict[str, str] | None = None


class Columns(BaseModel):
    """A mapping; keys as in ``Line``, a plain string is a column, but for ``task``, ``prompt`` and ``source``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str | Column
    audio: str | Column
    id: str | Column | None = None
    start: str | Column | None = None
    end: str | Column | None = None
    duration: str | Column | None = Field(None, description="seconds, instead of ``end``")
    channel: str | Column | None = None
    text: str | Column | None = None
    target_audio: str | Column | None = None
    codes: str | Column | None = None
    prompt: str | Column | None = None
    source: str | None = None
    attributes: dict[str, str | Column] = {}
    split: str | None = Field(None, description="of a Hugging Face data set, unless --split names one")
    unverified: list[str] = Field([], description="columns that were not seen in the data set itself")

    @property
    def needs_codec(self) -> bool:
        return self.codes is not None or self.target_audio is not None

    @property
    def names(self) -> list[str]:
        """First steps of all paths: the columns that have to be read."""
        values = [*(getattr(self, key) for key in _COLUMN_KEYS), *self.attributes.values()]
        values += [value for value in (self.task, self.prompt) if isinstance(value, Column)]
        paths = [value.column if isinstance(value, Column) else value for value in values if value is not None]
        return sorted({re.split(r"[.\[]", path.strip())[0] for either in paths for path in either.split("|")})


_COLUMN_KEYS = ("id", "audio", "start", "end", "duration", "channel", "text", "target_audio", "codes")
_MISSING = {"", "na", "null", "unk", "unknown", "nan", "none"}
"""How data sets write that an attribute is not known (DATASETS: SIFT)."""


def load_columns(file_or_preset: str | Path) -> Columns:
    """Reads a YAML file, or the preset of that name.

    Raises:
        InputError: There is no such file or preset, or it holds unknown keys.
    """
    path = Path(file_or_preset)
    if not path.is_file():
        path = PRESETS / f"{file_or_preset}.yaml"
    try:
        return Columns.model_validate(yaml.safe_load(path.read_text()))
    except OSError as error:
        known = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.yaml")))
        raise InputError(f"columns {file_or_preset}: no such file, and no preset of that name; the presets are {known}") from error
    except (yaml.YAMLError, ValidationError) as error:
        raise InputError(f"columns {path}: {error}; see {PRESETS} for examples") from error


def fallback_id(number: int) -> str:
    """The id of the ``number``th record where its maker gave none."""
    return f"{number:09d}"


def sample_id(record: Mapping[str, Any], columns: Columns, fallback: str) -> str:
    """The record's id as a key of a tar: dots, slashes and blanks become dashes."""
    value = _value(record, columns.id)
    return fallback if value is None else re.sub(r"[./\\\s\x00-\x1f\x7f]+", "-", str(value)).strip("-") or fallback


def mapped_entry(record: Mapping[str, Any], columns: Columns, number: int, base: Path | str, source: str) -> Entry | Reject:
    """A record as an entry, or why it is none.

    Args:
        record: By column; audio as a path, ``Embedded`` bytes, or Hugging Face's ``{"bytes", "path"}``; codes as lists [K][T] or a path.
        number: Of the record in its collection, from 1.
        base: Folder or URL that paths are relative to.
        source: Name of the collection.
    """
    key = sample_id(record, columns, fallback_id(number))
    try:
        embedded: dict[str, Embedded | np.ndarray] = {}
        line = _line(record, columns, key, embedded)
    except ValidationError as error:
        return Reject(number, key, "; ".join(explain(error)))
    except InputError as error:
        return Reject(number, key, str(error))
    return entry_of(line, number, base, source, embedded)


def _line(record: Mapping[str, Any], columns: Columns, key: str, embedded: dict[str, Embedded | np.ndarray]) -> Line:
    data: dict[str, Any] = {"id": key, "task": _value(record, columns.task, constant=True), "source": columns.source}
    for name, column in (("audio", columns.audio), ("target_audio", columns.target_audio)):
        if column is not None:
            data[name] = _audio(_value(record, column), name, embedded)
    if columns.codes is not None:
        data["codes"] = _codes(_value(record, columns.codes), embedded)
    for name in ("text", "start", "end", "channel"):
        data[name] = _value(record, getattr(columns, name))
    if columns.prompt is not None:
        data["prompt"] = _value(record, columns.prompt, constant=True)
    if columns.duration is not None and (duration := _value(record, columns.duration)) is not None:
        data["end"] = float(data["start"] or 0.0) + float(duration)
    attributes = {name: _value(record, column) for name, column in columns.attributes.items()}
    data["attributes"] = {name: str(value) for name, value in attributes.items() if str(value).strip().lower() not in _MISSING}
    return Line.model_validate({name: value for name, value in data.items() if value is not None})


def _value(record: Mapping[str, Any], column: str | Column | None, constant: bool = False) -> Any:
    if column is None or (constant and isinstance(column, str)):
        return column
    column = Column(column=column) if isinstance(column, str) else column
    for path in column.column.split("|"):
        value = _at(record, path.strip())
        if value is not None:
            break
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        value = " ".join(value)
    if column.map is not None:
        if str(value) not in column.map:
            raise InputError(f"column {column.column!r} holds {value!r:.60}, expected one of {sorted(column.map)}; add it to 'map'")
        value = column.map[str(value)]
    return value.lower() if column.lower and isinstance(value, str) else value


def _at(value: Any, path: str) -> Any:
    """The value at a path, None where it leads nowhere."""
    for step in re.findall(r"[^.\[\]]+|\[\d+\]|\[\*\]", path):
        if step == "[*]":
            rest = path[path.index("[*]") + 3 :].lstrip(".")
            return [_at(item, rest) if rest else item for item in value] if isinstance(value, list | tuple | np.ndarray) else None
        try:
            value = value[int(step[1:-1])] if step.startswith("[") else value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _audio(value: Any, key: str, embedded: dict[str, Embedded | np.ndarray]) -> str | None:
    """A path, or the key of ``embedded`` under which the bytes now lie."""
    if isinstance(value, Mapping):
        value = value["path"] if value.get("bytes") is None else Embedded(value.get("path") or key, value["bytes"])
    elif isinstance(value, bytes):
        value = Embedded(key, value)
    if isinstance(value, Embedded):
        embedded[f"@{key}"] = value
        return f"@{key}"
    if value is not None and not isinstance(value, str):
        raise InputError(f"column of {key}: holds {type(value).__name__}, expected a path or the bytes of an audio file")
    return value


def _codes(value: Any, embedded: dict[str, Embedded | np.ndarray]) -> str | None:
    """A path to a ``.npy``, or the key of ``embedded`` under which the array now lies."""
    if isinstance(value, str | None):
        return value
    if isinstance(value, Embedded):
        embedded["@codes"] = value
        return "@codes"
    try:
        embedded["@codes"] = np.array([np.asarray(row) for row in value])
    except ValueError as error:
        raise InputError("column of codes: its rows differ in length; one list of frames per codebook, all equally long") from error
    return "@codes"
