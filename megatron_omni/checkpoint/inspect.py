"""What ``tools/convert_checkpoint.py info`` and ``verify`` say of a checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from megatron_omni.checkpoint.load import NONE_HERE, Checkpoint, candidates, open_checkpoint
from megatron_omni.checkpoint.state import SavedTopology
from megatron_omni.runtime.errors import InputError, WorkError


@dataclass(frozen=True)
class Part:
    """Tensors that share the first components of their names."""

    name: str
    tensors: int
    parameters: int
    frozen: int
    """Parameters of them that do not train."""


@dataclass(frozen=True)
class Info:
    checkpoint: str
    step: int
    samples: int
    saved_by: SavedTopology
    tensors: int
    parameters: int
    bytes: int
    """On disk, moments and frozen weights included."""
    parts: list[Part]


@dataclass(frozen=True)
class Verified:
    checkpoints: int
    files: int
    bytes: int
    faults: list[str]


def info(path: Path, depth: int = 2) -> Info:
    """Sizes of a checkpoint (of a run: its newest good one) by the first ``depth`` components of the names."""
    checkpoint = open_checkpoint(path)
    parts: dict[str, list[str]] = {}
    for name in checkpoint.names():
        parts.setdefault(".".join(name.split(".")[:depth]), []).append(name)

    def count(names: list[str]) -> int:
        return sum(math.prod(checkpoint.shape(name)) for name in names)

    return Info(
        checkpoint=str(checkpoint.path),
        step=checkpoint.state.step,
        samples=checkpoint.state.samples,
        saved_by=checkpoint.state.topology,
        tensors=len(checkpoint.names()),
        parameters=count(checkpoint.names()),
        bytes=sum(store.manifest.num_bytes for store in checkpoint.stores()),
        parts=[Part(part, len(names), count(names), count(list(filter(checkpoint.is_frozen, names)))) for part, names in parts.items()],
    )


def verify(path: Path) -> Verified:
    """Reads every byte of one checkpoint, or of all checkpoints of a run, against hashes and index."""
    found = candidates(path)
    if not found:
        raise InputError(NONE_HERE.format(path))
    files, size, faults = 0, 0, []
    for folder in found:
        try:
            checkpoint = Checkpoint(folder, check_sizes=False)
        except WorkError as error:
            faults.append(str(error))
            continue
        faults += checkpoint.verify()
        files += sum(len(store.manifest.files) for store in checkpoint.stores())
        size += sum(store.manifest.num_bytes for store in checkpoint.stores())
    return Verified(len(found), files, size, faults)
