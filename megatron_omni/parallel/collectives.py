"""Collectives with their gradients, named by what they do forward (Megatron-LM, arXiv:1909.08053, section 3).

=====================  =====================  =====================
function               forward                backward
=====================  =====================  =====================
``copy_to_ranks``      identity               sum over ranks
``sum_over_ranks``     sum over ranks         identity
``split_rows``         own rows of dim 0      gather rows
``gather_rows``        gather rows of dim 0   own rows
=====================  =====================  =====================

With one rank all are the identity.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_omni.parallel.topology import TensorParallel


def _sum(x: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=tp.group)
    return x


def _split(x: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
    assert x.shape[0] % tp.size == 0, (x.shape, tp.size)
    return x.chunk(tp.size)[tp.rank].contiguous()


def _gather(x: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
    out = x.new_empty(tp.size * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=tp.group)
    return out


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _sum(grad, ctx.tp), None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
        return _sum(x, tp)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _SplitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
        ctx.tp = tp
        return _split(x, tp)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _gather(grad, ctx.tp), None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
        ctx.tp = tp
        return _gather(x, tp)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _split(grad, ctx.tp), None


def copy_to_ranks(x: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
    """Entry of a tensor-parallel region: the same ``x`` on every rank, each contributes to its gradient."""
    return x if tp.size == 1 else _CopyToRanks.apply(x, tp)


def sum_over_ranks(x: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
    """Exit of a tensor-parallel region: partial results become the whole on every rank."""
    return x if tp.size == 1 else _SumOverRanks.apply(x, tp)


def split_rows(x: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
    """Deals the rows of a replicated tensor out, ``shape[0] / size`` each (it must divide)."""
    return x if tp.size == 1 else _SplitRows.apply(x, tp)


def gather_rows(x: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
    """Collects every rank's rows; what follows is replicated, so the gradient's own rows go back."""
    return x if tp.size == 1 else _GatherRows.apply(x, tp)
