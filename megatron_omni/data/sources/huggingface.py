"""Hugging Face data sets: a folder that ``save_to_disk`` wrote, parquet files anywhere, or a name on the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import xxhash

from megatron_omni.data.sources.columns import Columns, mapped_entry, sample_id
from megatron_omni.data.sources.line import Entry, Reject
from megatron_omni.data.sources.source import is_url
from megatron_omni.runtime.errors import InputError

SCAN = 10_000
"""Rows whose ids are read at once."""


class Rows(Protocol):
    """Records by number."""

    digest: str
    columns: list[str]

    def __len__(self) -> int: ...

    def rows(self, start: int, stop: int, columns: list[str]) -> list[dict[str, Any]]: ...


class HuggingFace:
    """A ``Source`` over rows; audio stays as bytes or paths until it is decoded."""

    def __init__(self, rows: Rows, name: str, base: Path | str, columns: Columns) -> None:
        """Raises ``InputError`` where the columns do not lie in the data set, or an id occurs twice."""
        self.name, self.columns, self._rows, self._base = name, columns, rows, base
        self.needs_codec = columns.needs_codec
        self.digest = rows.digest
        self._read = [column for column in columns.names if column in rows.columns]
        audio = columns.audio if isinstance(columns.audio, str) else columns.audio.column
        if not any(column in rows.columns for column in Columns(task="transcribe", audio=audio).names):
            raise InputError(
                f"{name}: has no column {audio!r} of audio; its columns are {', '.join(rows.columns)}: map them with --columns"
            )
        seen: set[str] = set()
        for number, key in enumerate(self._ids()):
            if key in seen:
                raise InputError(f"{name}: row {number} has the id {key!r} of an earlier one; leave 'id' out of the columns, or repair it")
            seen.add(key)

    def __len__(self) -> int:
        return len(self._rows)

    def entries(self, start: int, stop: int) -> list[Entry | Reject]:
        rows = self._rows.rows(start, stop, self._read)
        return [mapped_entry(row, self.columns, number, self._base, self.name) for number, row in enumerate(rows, start + 1)]

    def identity(self, start: int, stop: int) -> bytes:
        return f"{self.name} {self.digest} {start} {stop} {self.columns.model_dump_json()}".encode()

    def _ids(self) -> Iterator[str]:
        """Of all rows, where a column gives them."""
        if self.columns.id is None:
            return
        needed = [column for column in Columns(task="transcribe", audio="", id=self.columns.id).names if column in self._rows.columns]
        if not needed:
            return
        for start in range(0, len(self), SCAN):
            for row in self._rows.rows(start, min(start + SCAN, len(self)), needed):
                yield sample_id(row, self.columns, "")


class DatasetRows:
    """Of a ``datasets.Dataset``: arrow files, mapped."""

    def __init__(self, dataset: datasets.Dataset) -> None:
        for name, feature in dataset.features.items():
            if isinstance(feature, datasets.Audio):
                dataset = dataset.cast_column(name, datasets.Audio(decode=False))
        self._dataset = dataset
        self.columns: list[str] = dataset.column_names
        self.digest = xxhash.xxh3_128_hexdigest(dataset._fingerprint.encode())

    def __len__(self) -> int:
        return len(self._dataset)

    def rows(self, start: int, stop: int, columns: list[str]) -> list[dict[str, Any]]:
        return cast(list[dict[str, Any]], self._dataset.select_columns(columns).select(range(start, stop)).to_list())


class ParquetRows:
    """Of parquet files on disk or behind URLs; a row group is read when one of its rows is asked for, nothing is downloaded before."""

    def __init__(self, files: list[str]) -> None:
        self.files = files
        self._groups: list[tuple[int, int, int]] = []
        """File, row group, first row."""
        rows = 0
        stamps = []
        for number, name in enumerate(files):
            with fsspec.open(name, "rb") as file:
                metadata = _metadata(name, file)
                stamps.append(f"{name.rpartition('/')[2]} {metadata.num_rows} {metadata.serialized_size}")
                self.columns = metadata.schema.to_arrow_schema().names
                for group in range(metadata.num_row_groups):
                    self._groups.append((number, group, rows))
                    rows += metadata.row_group(group).num_rows
        self._rows = rows
        self.digest = xxhash.xxh3_128_hexdigest("\n".join(stamps).encode())

    def __len__(self) -> int:
        return self._rows

    def rows(self, start: int, stop: int, columns: list[str]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        first = int(np.searchsorted([group[2] for group in self._groups], start, side="right")) - 1
        while start < stop:
            begin = self._groups[first][2]
            table = self._table(first, tuple(columns))
            part = table.slice(start - begin, stop - start)
            found += part.to_pylist()
            start += len(part)
            first += 1
        return found

    def _table(self, number: int, columns: tuple[str, ...]) -> pa.Table:
        if self._held[0] != (number, columns):
            file, group, _ = self._groups[number]
            with fsspec.open(self.files[file], "rb") as opened:
                table = pyarrow.parquet.ParquetFile(opened).read_row_group(group, columns=list(columns))
            self._held[:] = [(number, columns), table]
        return self._held[1]

    @cached_property
    def _held(self) -> list[Any]:
        """The row group read last."""
        return [None, None]

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_held"}


def open_huggingface(where: str | Path, columns: Columns, split: str | None, streaming: bool) -> HuggingFace:
    """Opens rows by what ``where`` is: parquet (a file, folder or URL of them), a saved data set, or a name.

    Raises:
        InputError: There is none, or it has several splits and none is named.
    """
    split = split or columns.split
    if files := _parquet_files(where):
        base: Path | str = Path(files[0]).parent if not is_url(where) else str(where)
        return HuggingFace(ParquetRows(files), Path(str(where)).stem, base, columns)
    try:
        if Path(where).is_dir():
            loaded = datasets.load_from_disk(str(where))
        elif streaming:
            builder = datasets.load_dataset_builder(str(where))
            return open_huggingface(_only(dict(builder.config.data_files or {}), split, where)[0], columns, split, False)
        else:
            loaded = datasets.load_dataset(str(where), split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"data set {where}: cannot be loaded ({error}); give a folder, parquet files or a name on the Hub") from error
    dataset = _only(loaded, split, where) if isinstance(loaded, datasets.DatasetDict) else loaded
    return HuggingFace(DatasetRows(dataset), Path(str(where)).name, Path(where) if Path(where).is_dir() else Path(), columns)


def _only(splits: Any, split: str | None, where: str | Path) -> Any:
    if split is None and len(splits) == 1:
        (split,) = splits
    if split not in splits:
        raise InputError(f"data set {where}: has no split {split!r}; name one of {', '.join(splits)} with --split")
    return splits[split]


def _parquet_files(where: str | Path) -> list[str]:
    if is_url(where):
        fs, path = fsspec.url_to_fs(str(where))
        found = [path] if path.endswith(".parquet") else sorted(fs.glob(f"{path.rstrip('/')}/**/*.parquet"))
        return [fs.unstrip_protocol(name) for name in found]
    path_ = Path(where)
    if path_.suffix == ".parquet":
        return [str(path_)]
    return sorted(map(str, path_.rglob("*.parquet"))) if path_.is_dir() else []


def _metadata(name: str, file: Any) -> pyarrow.parquet.FileMetaData:
    try:
        return pyarrow.parquet.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{name}: is no whole parquet file ({error}); download it again") from error
