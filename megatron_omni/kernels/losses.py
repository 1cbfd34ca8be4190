"""The per-row arithmetic that both heads share: cross entropy with label smoothing and z-loss, and its gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class HeadLoss(NamedTuple):
    """Result of a fused head (``J`` heads: 1 for text, K for codecs)."""

    loss: torch.Tensor
    """Scalar, sum over heads of ``scale[j]`` x summed loss (smoothing and z-loss included); attached to the graph."""
    sum_J: torch.Tensor
    """float32 [J]: summed plain cross entropy, detached."""
    count_J: torch.Tensor
    """int64 [J]: targets that are not ignored."""
    correct_J: torch.Tensor
    """int64 [J]: targets that are the most probable class."""


class LossOptions(NamedTuple):
    ignore_index: int = -100
    label_smoothing: float = 0.0
    """Share of the target's probability spread evenly over all classes."""
    z_loss: float = 0.0
    """Weight of logsumexp^2 (PaLM, arXiv:2204.02311)."""


def reference_losses(logits: torch.Tensor, targets: torch.Tensor, options: LossOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain autograd version: ``logits [..., V]``, ``targets [...]`` -> (objective, cross entropy) per position, 0 where ignored."""
    valid = targets != options.ignore_index
    safe = targets.where(valid, 0)
    lse = logits.logsumexp(-1)
    plain = lse - logits.gather(-1, safe.unsqueeze(-1)).squeeze(-1)
    smooth = lse - logits.mean(-1)
    objective = (1 - options.label_smoothing) * plain + options.label_smoothing * smooth + options.z_loss * lse**2
    return objective * valid, plain.detach() * valid


def forward_backward(
    logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor, options: LossOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Turns ``logits [..., V]`` IN PLACE into d(sum of weight x objective)/d logits.

    ``targets [...]`` int64, ``weight [...]`` float. Returns (objective, cross entropy, correct) per position, 0 where ignored.
    """
    valid = targets != options.ignore_index
    safe = targets.where(valid, 0).unsqueeze(-1)
    correct = (logits.argmax(-1, keepdim=True) == safe).squeeze(-1) & valid
    lse = logits.logsumexp(-1, keepdim=True)
    at_target = logits.gather(-1, safe)
    plain = (lse - at_target).squeeze(-1)
    objective = plain
    if options.label_smoothing or options.z_loss:
        smooth = lse.squeeze(-1) - logits.mean(-1)
        objective = (1 - options.label_smoothing) * plain + options.label_smoothing * smooth + options.z_loss * lse.squeeze(-1) ** 2
    scale = (weight * valid).unsqueeze(-1)
    # d objective / d logit = p (1 + 2 z lse) - (1 - eps) onehot - eps / V
    logits.sub_(lse).exp_().mul_(scale * (1 + 2 * options.z_loss * lse))
    if options.label_smoothing:
        logits.sub_(scale * (options.label_smoothing / logits.shape[-1]))
    logits.scatter_add_(-1, safe, -(1 - options.label_smoothing) * scale)
    return objective * valid, plain * valid, correct


class GradientsFormedForward(torch.autograd.Function):
    """Base of the fused heads: ``forward(ctx, hidden, weight, *five others)`` forms both gradients, ``backward`` scales them."""

    @staticmethod
    def keep(ctx: Any, grad_hidden: torch.Tensor | None, grad_weight: torch.Tensor | None, dtype: torch.dtype) -> None:
        """Called at the end of ``forward``; ``grad_weight`` is float32, ``dtype`` the weight's."""
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = dtype

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        to_hidden = None if grad_hidden is None else grad_hidden * grad_loss.to(grad_hidden.dtype)
        to_weight = None if grad_weight is None else (grad_weight * grad_loss).to(ctx.weight_dtype)
        return to_hidden, to_weight, None, None, None, None, None
