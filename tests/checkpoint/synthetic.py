"""A small state without a model: logical tensors, and the slices that any rank of any topology holds of them."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from megatron_omni.checkpoint.slices import KINDS, LocalSlice
from megatron_omni.checkpoint.state import CheckpointState, SavedTopology
from megatron_omni.parallel.layout import TensorLayout
from megatron_omni.runtime.seeds import generator

# name -> shape, cut dimension, fused parts
TENSORS: dict[str, tuple[tuple[int, ...], int | None, list[int]]] = {
    "embed.weight": ((12, 5), 0, [12]),
    "mlp.gate_up.weight": ((24, 7), 0, [12, 12]),
    "mlp.down.weight": ((7, 12), 1, [12]),
    "attention.qkv.weight": ((20, 7), 0, [12, 4, 4]),
    "conv.weight": ((3, 8, 3), 1, [4, 4]),
    "norm.weight": ((7,), None, []),
    "scale": ((), None, []),
}
FROZEN = ("encoder.weight", (9, 4))


def layout(name: str, rank: int, tensor: int) -> TensorLayout:
    shape, dim, parts = TENSORS[name]
    return TensorLayout(shape) if dim is None or tensor == 1 else TensorLayout.sharded(shape, dim, parts, rank, tensor)


def logical(name: str, kind: str, step: int = 0) -> torch.Tensor:
    shape = dict(TENSORS, **{FROZEN[0]: (FROZEN[1], None, [])})[name][0]
    return torch.randn(shape, generator=generator(name, kind, step))


def slices(rank: int, data: int, tensor: int, zero: int, step: int | None = 0) -> list[LocalSlice]:
    """What a rank holds: ZeRO-3 cuts each tensor, ZeRO-1 the concatenation, ZeRO-0 nothing. ``step`` None: empty ones to fill."""
    own, offset = [], 0
    layouts = {name: layout(name, rank % tensor, tensor) for name in TENSORS}
    share = math.ceil(sum(cut.local_numel for cut in layouts.values()) / data)
    for name, cut in layouts.items():
        n = math.ceil(cut.local_numel / data)
        place = rank // tensor
        low, high = {0: (0, cut.local_numel), 1: (share * place - offset, share * (place + 1) - offset), 3: (n * place, n * place + n)}[
            zero
        ]
        low, high = min(max(low, 0), cut.local_numel), min(max(high, 0), cut.local_numel)
        offset += cut.local_numel
        if low < high:
            for kind in KINDS:
                whole = torch.zeros(cut.local_numel) if step is None else cut.cut(logical(name, kind, step)).flatten()
                own.append(LocalSlice(name, kind, cut, low, whole[low:high]))
    return own


def frozen_slices(fill: bool = True) -> list[LocalSlice]:
    name, shape = FROZEN
    tensor = logical(name, "param").flatten() if fill else torch.zeros(math.prod(shape))
    return [LocalSlice(name, "param", TensorLayout(shape), 0, tensor)]


def state(step: int, data: int = 1, tensor: int = 1, zero: int = 3) -> CheckpointState:
    return CheckpointState(
        step=step, samples=8 * step, topology=SavedTopology(data=data, tensor=tensor, zero=zero), data={"streams": [[step, 0]]}
    )


class _Threads:
    """A ``Comm`` between threads."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, box: list[Any]) -> None:
        self.rank, self.size, self._barrier, self._box = rank, size, barrier, box

    def barrier(self) -> None:
        self._barrier.wait(30)

    def gather(self, value: Any) -> list[Any] | None:
        self._box[self.rank] = value
        self.barrier()
        values = list(self._box) if self.rank == 0 else None
        self.barrier()
        return values

    def broadcast(self, value: Any) -> Any:
        if self.rank == 0:
            self._box[0] = value
        self.barrier()
        got = self._box[0]
        self.barrier()
        return got


def on_ranks(world: int, function: Callable[..., Any]) -> list[Any]:
    """``function(comm)`` on every rank of a fake world, each a thread; an exception is returned as a result."""
    barrier, box = threading.Barrier(world), [None] * world

    def run(rank: int) -> Any:
        try:
            return function(_Threads(rank, world, barrier, box))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))
