"""Initial weights: logical tensors into a module's parameters, sharded or not, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_omni.parallel.layers import layout_of
from megatron_omni.parallel.layout import TensorLayout


@torch.no_grad()
def fill(module: nn.Module, source: Callable[[str, TensorLayout], torch.Tensor]) -> None:
    """Fills every parameter from ``source(name, layout)``, which returns the whole logical tensor.

    Of each tensor only this rank's part stays: its tensor-parallel cut and, where the module was built under
    ``deepspeed.zero.Init``, its partition of that (the padding behind it is zeroed). Calls ``source`` in the same
    order on every rank.
    """
    parameter: Any  # DeepSpeed adds attributes
    for name, parameter in module.named_parameters():
        layout = layout_of(parameter)
        local = layout.cut(source(name, layout)).flatten()
        if not hasattr(parameter, "ds_tensor"):
            parameter.copy_(local.view(layout.local_shape))
            continue
        assert parameter.ds_numel == layout.local_numel, (name, parameter.ds_shape, layout)
        n = parameter.partition_numel()
        part = local[n * dist.get_rank(parameter.ds_process_group) :][:n]
        parameter.ds_tensor.zero_()
        parameter.ds_tensor[: part.numel()].copy_(part)
