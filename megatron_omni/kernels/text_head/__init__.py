"""Fused text head: vocabulary-parallel linear cross entropy on the supervised positions only.

Every tensor-parallel rank holds ``V / tp`` rows of the weight. Positions go through in chunks; per chunk one packed
all-gather carries each rank's maximum, sum of exponentials, target logit and best class, and the chunk's logits are
overwritten by their gradient. The hidden states' gradient is summed over the group once.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_omni.kernels.losses import HeadLoss, LossOptions
from megatron_omni.kernels.text_head.chunked import ChunkedTextHead

__all__ = ["text_head"]


def text_head(
    hidden_UD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_U: torch.Tensor,
    scale: float | torch.Tensor,
    group: dist.ProcessGroup | None = None,
    options: LossOptions = LossOptions(),
    chunk_bytes: int = 1 << 30,
) -> HeadLoss:
    """Cross entropy of ``hidden @ weight.T`` without the full logits.

    Args:
        hidden_UD: ``[U, D]``, the same on every rank of ``group``.
        weight_VD: this rank's rows ``[V / tp, D]``, consecutive in rank order.
        targets_U: int64 ``[U]`` ids of the whole vocabulary, ``options.ignore_index`` where there is no target.
        scale: weight of the summed loss in the returned scalar.
        group: the tensor-parallel group; None: the weight is whole.
    """
    scale = torch.as_tensor(scale, dtype=torch.float32, device=hidden_UD.device)
    loss, total, correct = ChunkedTextHead.apply(hidden_UD, weight_VD, targets_U, scale, group, options, chunk_bytes)
    return HeadLoss(loss, total[None], (targets_U != options.ignore_index).sum()[None], correct[None])
