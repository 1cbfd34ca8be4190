"""Slices of logical tensors, and the pure planner that finds the stored elements which a wanted slice needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from megatron_omni.parallel.layout import TensorLayout
from megatron_omni.runtime.errors import WorkError

Kind = Literal["param", "exp_avg", "exp_avg_sq", "grad"]
KINDS: tuple[Kind, ...] = ("param", "exp_avg", "exp_avg_sq")
"""What is stored; gradients never are."""


@dataclass(frozen=True)
class LocalSlice:
    """What one rank holds of the logical tensor ``name``: the flat range ``[start, start + len(tensor))`` of its own cut."""

    name: str
    kind: Kind
    layout: TensorLayout
    start: int
    tensor: torch.Tensor
    """1-D view of live memory: saving reads it, loading writes it. float32, except frozen weights."""

    @property
    def length(self) -> int:
        return self.tensor.numel()


@dataclass(frozen=True)
class Piece:
    """A stored slice: the flat range ``[start, start + length)`` of some rank's cut, and where its bytes lie."""

    layout: TensorLayout
    start: int
    length: int
    file: str
    offset: int
    """Bytes from the beginning of the file."""
    dtype: torch.dtype


@dataclass(frozen=True)
class Run:
    """``count`` elements of ``piece``, from its element ``source`` on, are the wanted slice's from ``target`` on."""

    piece: Piece
    source: int
    target: int
    count: int


def plan(layout: TensorLayout, start: int, length: int, pieces: Sequence[Piece]) -> list[Run]:
    """The runs that fill the range ``[start, start + length)`` of the cut ``layout``, in order and exactly once each.

    Raises ``WorkError`` if the pieces leave a hole or overlap.
    """
    wanted = _runs(layout, start, length)
    found = [np.empty((0, 4), np.int64)]
    for number, piece in enumerate(pieces):
        if (piece.layout.dim, piece.layout.segments) == (layout.dim, layout.segments):
            begin, end = max(start, piece.start), min(start + length, piece.start + piece.length)
            if begin < end:  # the same cut: local ranges compare directly
                found.append(np.array([[begin - start, number, begin - piece.start, end - begin]]))
        else:
            target, source, count = _intersect(wanted, _runs(piece.layout, piece.start, piece.length))
            found.append(np.stack([target - start, np.full_like(target, number), source - piece.start, count], 1))
    runs = np.concatenate(found)
    runs = runs[runs[:, 0].argsort()]
    ends = runs[:, 0] + runs[:, 3]
    wrong = np.flatnonzero(np.append(0, ends) != np.append(runs[:, 0], length))
    if len(wrong):
        raise WorkError(f"the stored pieces do not cover element {start + int(np.append(0, ends)[wrong[0]])} exactly once")
    # A run goes on where the next one follows it in the wanted slice and in the same piece.
    first = np.ones(len(runs), bool)
    first[1:] = (runs[1:, 1] != runs[:-1, 1]) | (runs[1:, 2] != runs[:-1, 2] + runs[:-1, 3])
    starts = np.flatnonzero(first)
    stops = np.append(starts, len(runs))[1:] - 1
    return [
        Run(pieces[number], source, target, end - target)
        for (target, number, source, _), end in zip(runs[starts].tolist(), ends[stops].tolist(), strict=True)
    ]


def _runs(layout: TensorLayout, start: int, length: int) -> np.ndarray:
    """int64 [runs, 3]: offset in the logical tensor, offset in the cut, count; ordered by the first."""
    runs = np.array(list(layout.runs(start, length)), np.int64).reshape(-1, 3)
    return runs[runs[:, 0].argsort()]


def _intersect(wanted: np.ndarray, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where two lists of disjoint runs, ordered by logical offset, meet: offsets in both cuts and counts."""
    low = np.searchsorted(stored[:, 0] + stored[:, 2], wanted[:, 0], "right")
    high = np.searchsorted(stored[:, 0], wanted[:, 0] + wanted[:, 2], "left")
    meets = np.maximum(high - low, 0)
    a = np.repeat(np.arange(len(wanted)), meets)
    b = np.arange(len(a)) - np.repeat(np.cumsum(meets) - meets, meets) + low[a]
    begin = np.maximum(wanted[a, 0], stored[b, 0])
    end = np.minimum(wanted[a, 0] + wanted[a, 2], stored[b, 0] + stored[b, 2])
    return begin - wanted[a, 0] + wanted[a, 1], begin - stored[b, 0] + stored[b, 1], end - begin
