"""The codec head as a formula, with the full logits and plain autograd: what the fast versions must equal."""

from __future__ import annotations

import torch

from megatron_omni.kernels.losses import HeadLoss, LossOptions, reference_losses


def codec_head_reference(
    hidden: torch.Tensor,
    weight_KVH: torch.Tensor,
    targets_NK: torch.Tensor,
    scale_K: torch.Tensor,
    frame_weight_N: torch.Tensor | None = None,
    options: LossOptions = LossOptions(),
) -> HeadLoss:
    """Same contract as ``codec_head``; any float dtype, float64 for tests."""
    equation = "nh,kvh->nkv" if hidden.dim() == 2 else "nkh,kvh->nkv"
    logits_NKV = torch.einsum(equation, hidden, weight_KVH)
    objective_NK, plain_NK = reference_losses(logits_NKV, targets_NK, options)
    if frame_weight_N is not None:
        objective_NK = objective_NK * frame_weight_N.unsqueeze(-1)
    valid_NK = targets_NK != options.ignore_index
    correct_NK = (logits_NKV.argmax(-1) == targets_NK) & valid_NK
    return HeadLoss((objective_NK.sum(0) * scale_K).sum(), plain_NK.sum(0), valid_NK.sum(0), correct_NK.sum(0))
