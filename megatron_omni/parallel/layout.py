"""How one tensor-parallel rank's tensor is cut from the logical (whole) tensor.

Initialisation, checkpoints and export all speak of logical tensors; only this file knows where a rank's part lies.
A fused weight (q|k|v, gate|up) is cut part by part, so a rank's tensor is several runs of the cut dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TensorLayout:
    """Cut of dimension ``dim`` of a logical tensor of ``shape``; ``dim`` None means replicated.

    ``segments`` lists ``(global start, local start, length)`` along ``dim``, in local order.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    segments: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def sharded(cls, shape: Sequence[int], dim: int, parts: Sequence[int], rank: int, world: int) -> TensorLayout:
        """Cuts each of the fused ``parts`` (lengths that add up to ``shape[dim]``) evenly over ``world`` ranks."""
        assert sum(parts) == shape[dim], (parts, shape, dim)
        segments, start, local = [], 0, 0
        for part in parts:
            assert part % world == 0, (part, world)
            length = part // world
            segments.append((start + rank * length, local, length))
            start, local = start + part, local + length
        return cls(tuple(shape), dim, tuple(segments))

    @property
    def replicated(self) -> bool:
        return self.dim is None

    @property
    def local_shape(self) -> tuple[int, ...]:
        if self.dim is None:
            return self.shape
        local = sum(length for _, _, length in self.segments)
        return (*self.shape[: self.dim], local, *self.shape[self.dim + 1 :])

    @property
    def local_numel(self) -> int:
        return math.prod(self.local_shape)

    def cut(self, full: torch.Tensor) -> torch.Tensor:
        """The rank's tensor (a copy) from the logical one."""
        assert tuple(full.shape) == self.shape, (tuple(full.shape), self.shape)
        if self.dim is None:
            return full.clone()
        return torch.cat([full.narrow(self.dim, start, length) for start, _, length in self.segments], self.dim)

    def runs(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Contiguous runs of the local flat range ``[start, start + length)``.

        Yields ``(flat offset in the logical tensor, offset in the local flat range's tensor, count)``, the second
        counted from the beginning of the local tensor, in ascending local order.
        """
        stop = start + length
        if self.dim is None:
            if length:
                yield start, start, length
            return
        inner = math.prod(self.shape[self.dim + 1 :])
        outer = math.prod(self.shape[: self.dim])
        local_row = self.local_shape[self.dim] * inner
        global_row = self.shape[self.dim] * inner
        first, last = start // local_row if local_row else 0, -(-stop // local_row) if local_row else 0
        for row in range(first, min(last, outer)):
            for global_start, local_start, n in self.segments:
                low = row * local_row + local_start * inner
                high = low + n * inner
                begin, end = max(low, start), min(high, stop)
                if begin < end:
                    yield row * global_row + global_start * inner + (begin - low), begin, end - begin
