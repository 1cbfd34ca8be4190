"""One way in: what a person names on the command line, as a ``Source``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import fsspec

from megatron_omni.data.sources.columns import Columns, load_columns
from megatron_omni.data.sources.folder import AudioFolder
from megatron_omni.data.sources.huggingface import open_huggingface
from megatron_omni.data.sources.manifest import Manifest
from megatron_omni.data.sources.source import Source, is_url
from megatron_omni.data.sources.tars import Tars
from megatron_omni.runtime.errors import InputError
from megatron_omni.schema import Task

Kind = Literal["auto", "manifest", "nemo", "lhotse", "folder", "huggingface", "tars"]


def open_source(
    where: str | Path,
    kind: Kind = "auto",
    columns: str | Path | None = None,
    task: Task | None = None,
    split: str | None = None,
    streaming: bool = False,
) -> Source:
    """Opens a collection and checks what can be checked without decoding.

    Args:
        where: A file, a folder, a URL, a pattern of tars, or a name on the Hugging Face Hub.
        kind: ``auto`` tells by the name and by what lies there; NeMo's and Lhotse's manifests have to be named.
        columns: A YAML file or a preset (``columns.PRESETS``); by default that of the kind.
        task: Instead of the columns' own.
        split, streaming: Of a Hugging Face data set.

    Raises:
        InputError: Nothing lies there, or it is broken as a whole.
    """
    kind = _kind(where) if kind == "auto" else kind
    if kind == "manifest" and columns is None:
        if task is not None:
            raise InputError("--task: a manifest of ours names the task of every line; leave the option out, or give --columns too")
        return Manifest.read(_place(where))
    mapping = _columns(columns or {"tars": "webdataset"}.get(kind, kind), task)
    match kind:
        case "folder":
            return AudioFolder(Path(where), mapping)
        case "tars":
            return Tars(_tars(where), mapping)
        case "huggingface":
            return open_huggingface(where, mapping, split, streaming)
        case _:
            return Manifest.read(_place(where), mapping)


def _kind(where: str | Path) -> Kind:
    name, path = str(where), Path(where)
    if name.endswith((".jsonl", ".json", ".jsonl.gz")):
        return "manifest"
    if name.endswith(".tar"):
        return "tars"
    if name.endswith(".parquet") or (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return "huggingface"
    if path.is_dir():
        kinds: dict[str, Kind] = {"*.tar": "tars", "*.parquet": "huggingface", "*": "folder"}
        return next(kind for pattern, kind in kinds.items() if any(path.glob(pattern)) or pattern == "*")
    if is_url(where) or path.exists():
        raise InputError(f"{where}: it cannot be told what it is; say so with --kind")
    return "huggingface"


def _columns(file_or_preset: str | Path, task: Task | None) -> Columns:
    if file_or_preset == "huggingface":
        raise InputError("a Hugging Face data set needs --columns: a YAML file, or a preset such as loquacious, ami, heysquad, sift")
    mapping = load_columns(file_or_preset)
    return mapping if task is None else mapping.model_copy(update={"task": task})


def _place(where: str | Path) -> Path | str:
    return str(where) if is_url(where) else Path(where)


def _tars(where: str | Path) -> list[str]:
    """Tars of a folder, a pattern or a URL, by name."""
    pattern = str(where) if str(where).endswith(".tar") else f"{str(where).rstrip('/')}/*.tar"
    fs, path = fsspec.url_to_fs(pattern)
    found = [fs.unstrip_protocol(name) if is_url(where) else name for name in sorted(fs.glob(path))]
    if not found:
        raise InputError(f"{where}: no tar lies there; give a folder, a file or a pattern such as 'data/*.tar'")
    return found
