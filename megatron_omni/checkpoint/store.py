"""A store: one directory of hashed files with an index that maps logical tensors to byte ranges. Reading and writing.

Checkpoints and frozen weights are stores. Rank files are plain safetensors, written as a stream, so that they are
hashed on the way and no tensor is held twice.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import orjson
import safetensors.torch
import torch
import xxhash
from pydantic import ValidationError

from megatron_omni.checkpoint.slices import KINDS, Kind, LocalSlice, Piece, plan
from megatron_omni.config.model import Strict
from megatron_omni.parallel.layout import TensorLayout
from megatron_omni.runtime.errors import WorkError

CHUNK = 4 << 20
"""Bytes that share a hash: what must be read to trust one element."""
BATCH = 1 << 30
"""Bytes that a load stages in host memory at a time."""
MANIFEST, INDEX, PIECES = "manifest.json", "index.json", "index.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class FileRecord(Strict):
    """What a file must be."""

    size: int
    sha256: str
    chunks: str
    """Hex xxh3_128 (32 digits) of each 4 MiB chunk, one after another."""

    def chunk(self, number: int) -> str:
        return self.chunks[32 * number : 32 * (number + 1)]


class Manifest(Strict):
    format_version: int = 1
    frozen: str | None = None
    """Name of the store of frozen weights that belongs to this checkpoint."""
    files: dict[str, FileRecord]

    @property
    def num_bytes(self) -> int:
        return sum(record.size for record in self.files.values())

    @property
    def digest(self) -> str:
        """Hex sha256 of everything it vouches for."""
        return hashlib.sha256(orjson.dumps(self.model_dump())).hexdigest()


def seal(manifest: Manifest) -> bytes:
    """The manifest's file: the only one that no other file vouches for, so it carries its own hash."""
    return orjson.dumps({"sha256": manifest.digest, "manifest": manifest.model_dump()})


def unseal(path: Path) -> Manifest:
    """Reads and checks a manifest; ``WorkError`` if a byte of it is not what was written."""
    try:
        raw = path.read_bytes()
        manifest = Manifest.model_validate(orjson.loads(raw)["manifest"])
    except (OSError, ValidationError, ValueError, KeyError, TypeError) as error:
        raise WorkError(f"{path}: unreadable ({type(error).__name__}: {error})") from error
    if seal(manifest) != raw:
        raise WorkError(f"{path}: does not match its own hash, so it is damaged")
    if manifest.format_version != 1:
        raise WorkError(f"{path}: format version {manifest.format_version}; this program reads version 1")
    return manifest


class HashedFile:
    """A new file whose size and hashes are known when it is closed, synced to disk."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115
        self._sha256, self._chunk, self.size = hashlib.sha256(), xxhash.xxh3_128(), 0
        self._chunks: list[str] = []

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data).cast("B")
        while rest.nbytes:
            part = rest[: CHUNK - self.size % CHUNK]
            part = part[: self._file.write(part)]  # an unbuffered write may be short
            self._sha256.update(part)
            self._chunk.update(part)
            self.size += part.nbytes
            if self.size % CHUNK == 0:
                self._end_chunk()
            rest = rest[part.nbytes :]

    def _end_chunk(self) -> None:
        self._chunks.append(self._chunk.hexdigest())
        self._chunk.reset()

    def record(self) -> FileRecord:
        if self.size % CHUNK:
            self._end_chunk()
        os.fsync(self._file.fileno())
        return FileRecord(size=self.size, sha256=self._sha256.hexdigest(), chunks="".join(self._chunks))

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def write_bytes(path: Path, content: bytes) -> FileRecord:
    with HashedFile(path) as file:
        file.write(content)
        return file.record()


def write_slices(path: Path, slices: Sequence[LocalSlice]) -> tuple[FileRecord, list[int]]:
    """Writes a safetensors file; returns its record and the byte offset of each slice."""
    order = sorted(range(len(slices)), key=lambda i: KINDS.index(slices[i].kind))  # export reads the first third only
    header: dict[str, Any] = {}
    offsets, end = [0] * len(slices), 0
    for i in order:
        piece = slices[i]
        size = piece.length * piece.tensor.element_size()
        key = f"{piece.kind}/{piece.name}[{piece.start}:{piece.start + piece.length}]"
        if key in header:
            raise WorkError(f"{path.name}: two slices are called {key}")
        header[key] = {"dtype": NAMES[piece.tensor.dtype], "shape": [piece.length], "data_offsets": [end, end + size]}
        offsets[i], end = end, end + size
    head = orjson.dumps(header)
    head += b" " * (-len(head) % 8)
    with HashedFile(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for i in order:
            file.write(_bytes(slices[i].tensor.detach().cpu()).data)
        return file.record(), [8 + len(head) + offset for offset in offsets]


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a 1-D CPU tensor, as uint8."""
    array: np.ndarray = tensor.contiguous().view(torch.uint8).numpy()
    return array


@dataclass(frozen=True)
class Claim:
    """What a rank could write, without the data."""

    name: str
    kind: Kind
    layout: TensorLayout
    start: int
    length: int
    dtype: str

    @classmethod
    def of(cls, piece: LocalSlice) -> Claim:
        if piece.tensor.dtype not in NAMES or piece.tensor.dim() != 1 or piece.kind not in KINDS:
            raise WorkError(f"{piece.name} ({piece.kind}): cannot save {piece.tensor.dtype} with {piece.tensor.dim()} dimensions")
        return cls(piece.name, piece.kind, piece.layout, piece.start, piece.length, NAMES[piece.tensor.dtype])

    @property
    def num_bytes(self) -> int:
        return self.length * DTYPES[self.dtype].itemsize


def write_index(folder: Path, written: Mapping[str, Iterable[tuple[Claim, int]]]) -> dict[str, FileRecord]:
    """Writes the index of ``written`` (file name -> its pieces and their byte offsets)."""
    tensors: dict[str, tuple[int, ...]] = {}
    cuts: dict[tuple[int | None, tuple[tuple[int, int, int], ...]], int] = {}
    stored: dict[tuple[str, Kind], int] = {}
    numbers: dict[str, int] = {}
    rows = []
    for file, pieces in enumerate(written.values()):
        for claim, offset in pieces:
            shape = tensors.setdefault(claim.name, claim.layout.shape)
            if shape != claim.layout.shape:
                raise WorkError(f"{claim.name}: one rank has shape {shape}, another {claim.layout.shape}")
            number = numbers.setdefault(claim.name, len(numbers))
            cut = cuts.setdefault((claim.layout.dim, claim.layout.segments), len(cuts))
            dtype = list(DTYPES).index(claim.dtype)
            rows.append((number, KINDS.index(claim.kind), cut, claim.start, claim.length, file, offset, dtype))
            stored[claim.name, claim.kind] = stored.get((claim.name, claim.kind), 0) + claim.length
    for (name, kind), count in stored.items():
        if count != math.prod(tensors[name]):
            raise WorkError(f"{name} ({kind}): the ranks hold {count} of {math.prod(tensors[name])} elements, so nothing is saved")
    index = {
        "format_version": 1,
        "tensors": [{"name": name, "shape": shape} for name, shape in tensors.items()],
        "cuts": [{"dim": dim, "segments": segments} for dim, segments in cuts],
        "files": list(written),
        "kinds": KINDS,
        "dtypes": list(DTYPES),
        "columns": ["tensor", "kind", "cut", "start", "length", "file", "offset", "dtype"],
    }
    table = torch.tensor(sorted(rows), dtype=torch.int64).reshape(-1, len(rows[0]) if rows else 8)
    return {
        INDEX: write_bytes(folder / INDEX, orjson.dumps(index)),
        PIECES: write_bytes(folder / PIECES, safetensors.torch.save({"pieces": table})),
    }


class Store:
    """An open store. Everything read from it is checked chunk by chunk; damage is a ``WorkError`` that names the file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = unseal(folder / MANIFEST)
        self.bytes_read = 0
        # Several neighbours share a chunk: the last few stay.
        self._chunk = functools.lru_cache(maxsize=4)(self._read_chunk)
        try:
            index = orjson.loads(self.content(INDEX))
            table = safetensors.torch.load(self.content(PIECES))["pieces"].numpy()
        except (ValueError, KeyError, safetensors.SafetensorError) as error:
            raise WorkError(f"{folder / INDEX}: unreadable ({error})") from error
        self.shapes: dict[str, tuple[int, ...]] = {tensor["name"]: tuple(tensor["shape"]) for tensor in index["tensors"]}
        self._numbers = {name: number for number, name in enumerate(self.shapes)}
        self._cuts = [(cut["dim"], tuple(map(tuple, cut["segments"]))) for cut in index["cuts"]]
        self._files: list[str] = index["files"]
        self._dtypes = [DTYPES[name] for name in index["dtypes"]]
        self._table = table
        self._keys = table[:, 0] * len(KINDS) + table[:, 1]

    def has(self, kind: Kind) -> bool:
        return bool((self._table[:, 1] == KINDS.index(kind)).any())

    def pieces(self, name: str, kind: Kind) -> list[Piece]:
        """Where ``name`` is stored; empty if it has no such moments."""
        key = self._numbers[name] * len(KINDS) + KINDS.index(kind)
        rows = self._table[np.searchsorted(self._keys, key) : np.searchsorted(self._keys, key, "right")].tolist()
        return [
            Piece(TensorLayout(self.shapes[name], *self._cuts[cut]), start, length, self._files[file], offset, self._dtypes[dtype])
            for _, _, cut, start, length, file, offset, dtype in rows
        ]

    def content(self, name: str) -> bytes:
        """A whole file."""
        size = self._record(name).size
        target = np.empty(size, np.uint8)
        self._read(name, [(0, target)])
        return target.tobytes()

    def fill(self, wanted: Sequence[LocalSlice]) -> None:
        """Fills the slices' tensors, reading each chunk that they need once per gibibyte wanted."""
        batch: list[LocalSlice] = []
        size = 0
        for piece in wanted:
            batch.append(piece)
            size += 4 * piece.length
            if size >= BATCH:
                self._fill(batch)
                batch, size = [], 0
        self._fill(batch)

    def _fill(self, wanted: Sequence[LocalSlice]) -> None:
        jobs: dict[str, list[tuple[int, np.ndarray]]] = {}
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        for piece in wanted:
            piece.tensor.fill_(math.nan)
            for run in self._plan(piece):
                stored = run.piece
                target = piece.tensor[run.target : run.target + run.count]
                buffer = target
                if target.device.type != "cpu" or target.dtype != stored.dtype or not target.is_contiguous():
                    buffer = torch.empty(run.count, dtype=stored.dtype)
                    copies.append((target, buffer))
                offset = stored.offset + run.source * stored.dtype.itemsize
                jobs.setdefault(stored.file, []).append((offset, _bytes(buffer.detach())))
        for file in sorted(jobs):
            self._read(file, jobs[file])
        for target, buffer in copies:
            target.copy_(buffer)
        for piece in wanted:
            if torch.isnan(piece.tensor).any():
                raise WorkError(f"{self.folder}: {piece.name} ({piece.kind}) is not a number somewhere after reading")

    def _plan(self, piece: LocalSlice) -> list[Any]:
        if piece.name not in self.shapes:
            raise WorkError(f"{self.folder}: has no tensor {piece.name}")
        if self.shapes[piece.name] != piece.layout.shape:
            raise WorkError(f"{self.folder}: {piece.name} has shape {self.shapes[piece.name]}, the model wants {piece.layout.shape}")
        try:
            return plan(piece.layout, piece.start, piece.length, self.pieces(piece.name, piece.kind))
        except WorkError as error:
            raise WorkError(f"{self.folder}: {piece.name} ({piece.kind}): {error}") from error

    def _read(self, name: str, jobs: list[tuple[int, np.ndarray]]) -> None:
        """Fills byte arrays from byte offsets of one file, in file order."""
        for offset, target in sorted(jobs, key=lambda job: job[0]):
            done = 0
            while done < len(target):
                number, inside = divmod(offset + done, CHUNK)
                part = self._chunk(name, number)[inside : inside + len(target) - done]
                if not len(part):
                    raise WorkError(f"{self.folder / name}: the index points behind its end")
                target[done : done + len(part)] = part
                done += len(part)

    def _read_chunk(self, name: str, number: int) -> np.ndarray:
        record = self._record(name)
        expected = max(0, min(CHUNK, record.size - number * CHUNK))
        data = np.empty(expected, np.uint8)
        try:
            with open(self.folder / name, "rb", buffering=0) as file:
                file.seek(number * CHUNK)
                got = 0
                while got < expected and (n := file.readinto(data.data[got:])):
                    got += n
        except OSError as error:
            raise WorkError(f"{self.folder / name}: cannot be read ({error.strerror})") from error
        if got < expected or (expected and xxhash.xxh3_128_hexdigest(data.data) != record.chunk(number)):
            where = f"chunk {number} (bytes {number * CHUNK} to {number * CHUNK + expected})"
            what = "ends early" if got < expected else "does not match its hash"
            raise WorkError(f"{self.folder / name}: {where} {what}, so the file is damaged")
        self.bytes_read += expected
        return data

    def _record(self, name: str) -> FileRecord:
        if name not in self.manifest.files:
            raise WorkError(f"{self.folder / MANIFEST}: does not list {name}")
        return self.manifest.files[name]

    def check_sizes(self) -> None:
        """Raises ``WorkError`` if a file is missing or has another size; quick, reads no content."""
        for name, record in self.manifest.files.items():
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != record.size:
                got = "is missing" if size is None else f"has {size} bytes"
                raise WorkError(f"{path}: {got}; the manifest says {record.size} bytes")

    def faults(self) -> list[str]:
        """Reads every byte of every file; returns what is wrong, by file."""
        found = []
        for name, record in self.manifest.files.items():
            digest = hashlib.sha256()
            try:
                for number in range(-(-record.size // CHUNK)):
                    digest.update(self._read_chunk(name, number).data)
                if digest.hexdigest() != record.sha256 or (self.folder / name).stat().st_size != record.size:
                    found.append(f"{self.folder / name}: does not match its size and sha256 in the manifest")
            except OSError as error:
                found.append(f"{self.folder / name}: cannot be read ({error.strerror})")
            except WorkError as error:
                found.append(str(error))
        for name, shape in self.shapes.items():
            for kind in KINDS:
                if pieces := self.pieces(name, kind):
                    try:
                        plan(TensorLayout(shape), 0, math.prod(shape), pieces)
                    except WorkError as error:
                        found.append(f"{self.folder / INDEX}: {name} ({kind}): {error}")
        return found
