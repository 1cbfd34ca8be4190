"""The text head as a formula on the whole weight, with plain autograd: what the fast version must equal."""

from __future__ import annotations

import torch

from megatron_omni.kernels.losses import HeadLoss, LossOptions, reference_losses


def text_head_reference(
    hidden_UD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_U: torch.Tensor,
    scale: float | torch.Tensor,
    options: LossOptions = LossOptions(),
) -> HeadLoss:
    """Same contract as ``text_head`` with ``group=None``."""
    logits_UV = hidden_UD @ weight_VD.T
    objective_U, plain_U = reference_losses(logits_UV, targets_U, options)
    valid_U = targets_U != options.ignore_index
    correct_U = (logits_UV.argmax(-1) == targets_U) & valid_U
    return HeadLoss(objective_U.sum() * scale, plain_U.sum()[None], valid_U.sum()[None], correct_U.sum()[None])
