"""Parameters that know their logical tensor, and the tensor-parallel layers (Megatron-LM, arXiv:1909.08053).

Every parameter carries ``tensor_layout`` (see ``layout.py``). One that is cut also carries ``tensor_model_parallel = True``,
without which DeepSpeed's gradient norm counts rank 0's part only. One that is replicated but fed different rows on
each rank (encoder, Depformer) carries ``sum_over_tensor_parallel = True``: the engine sums its gradient over the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from megatron_omni.parallel.collectives import copy_to_ranks, sum_over_ranks
from megatron_omni.parallel.layout import TensorLayout
from megatron_omni.parallel.topology import TensorParallel


def new_parameter(layout: TensorLayout) -> nn.Parameter:
    """An uninitialised parameter for this rank's part; ``model/init.py`` or a checkpoint fills it."""
    parameter = nn.Parameter(torch.empty(layout.local_shape))
    parameter.tensor_layout = layout  # type: ignore[attr-defined]
    if not layout.replicated:
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    return parameter


def layout_of(parameter: torch.Tensor) -> TensorLayout:
    return cast(TensorLayout, parameter.tensor_layout)  # type: ignore[attr-defined]


def split_by_rows(module: nn.Module) -> None:
    """Marks all parameters of ``module`` as replicated weights that see only this rank's rows."""
    for parameter in module.parameters():
        parameter.sum_over_tensor_parallel = True  # type: ignore[attr-defined]


class Linear(nn.Module):
    """``y = x W^T + b``, whole on every rank. ``weight [out, in]``."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = new_parameter(TensorLayout((out_features, in_features)))
        self.bias = new_parameter(TensorLayout((out_features,))) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class ColumnParallelLinear(nn.Module):
    """Cuts the outputs: ``[..., in] -> [..., out / tp]``. ``parts`` are the fused outputs (q|k|v, gate|up).

    ``biased`` says for each part whether it has a bias; the ``bias`` parameter holds those that do, one after another.
    """

    def __init__(self, in_features: int, parts: Sequence[int], tp: TensorParallel, biased: Sequence[bool] = ()) -> None:
        super().__init__()
        self.tp = tp
        self.parts = [part // tp.size for part in parts]
        self.biased = list(biased) or [False] * len(parts)
        self.weight = new_parameter(self._cut(parts, in_features))
        with_bias = [part for part, has in zip(parts, self.biased, strict=True) if has]
        self.bias = new_parameter(self._cut(with_bias)) if with_bias else None

    def _cut(self, parts: Sequence[int], *inner: int) -> TensorLayout:
        shape = (sum(parts), *inner)
        return TensorLayout(shape) if self.tp.size == 1 else TensorLayout.sharded(shape, 0, parts, self.tp.rank, self.tp.size)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One tensor per part."""
        x = copy_to_ranks(x, self.tp)
        if self.bias is None:
            return F.linear(x, self.weight).split(self.parts, -1)
        if all(self.biased):
            return F.linear(x, self.weight, self.bias).split(self.parts, -1)
        outputs = F.linear(x, self.weight).split(self.parts, -1)
        biases = iter(self.bias.split([part for part, has in zip(self.parts, self.biased, strict=True) if has]))
        return tuple(y + next(biases) if has else y for y, has in zip(outputs, self.biased, strict=True))


class RowParallelLinear(nn.Module):
    """Cuts the inputs: ``[..., in / tp] -> [..., out]``, summed over the ranks; the bias is added once."""

    def __init__(self, in_features: int, out_features: int, tp: TensorParallel, bias: bool = False) -> None:
        super().__init__()
        self.tp = tp
        shape = (out_features, in_features)
        self.weight = new_parameter(
            TensorLayout(shape) if tp.size == 1 else TensorLayout.sharded(shape, 1, [in_features], tp.rank, tp.size)
        )
        self.bias = new_parameter(TensorLayout((out_features,))) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = sum_over_ranks(F.linear(x, self.weight), self.tp)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """Cuts the vocabulary: each rank looks up its own rows, zero elsewhere, summed over the ranks."""

    def __init__(self, vocab_size: int, width: int, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.rows = vocab_size // tp.size
        shape = (vocab_size, width)
        self.weight = new_parameter(TensorLayout(shape) if tp.size == 1 else TensorLayout.sharded(shape, 0, [vocab_size], tp.rank, tp.size))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 ids of any shape -> ``[..., width]``."""
        if self.tp.size == 1:
            return F.embedding(ids, self.weight)
        local = ids - self.tp.rank * self.rows
        mine = (local >= 0) & (local < self.rows)
        return sum_over_ranks(F.embedding(local.where(mine, 0), self.weight) * mine.unsqueeze(-1), self.tp)
