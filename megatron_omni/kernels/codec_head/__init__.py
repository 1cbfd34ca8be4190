"""Fused codec head: hidden states and head weights in, losses and gradients out, for all codebooks of a call.

    logits[n, k, :] = weight[k] @ hidden[n]          (or hidden[n, k])
    loss            = sum_k scale[k] * sum_n frame_weight[n] * objective(logits[n, k], target[n, k])

The logits of the whole batch never exist: frames go through in chunks of at most ``chunk_bytes`` of logits, and each
chunk's logits are overwritten by their gradient. Gradients are formed in the forward pass; the backward pass only
multiplies them by the outer gradient.
"""

from __future__ import annotations

import torch

from megatron_omni.kernels.codec_head.chunked import ChunkedCodecHead
from megatron_omni.kernels.losses import HeadLoss, LossOptions

__all__ = ["codec_head"]


def codec_head(
    hidden: torch.Tensor,
    weight_KVH: torch.Tensor,
    targets_NK: torch.Tensor,
    scale_K: torch.Tensor,
    frame_weight_N: torch.Tensor | None = None,
    options: LossOptions = LossOptions(),
    chunk_bytes: int = 1 << 30,
) -> HeadLoss:
    """Per-codebook cross entropy without the full logits.

    Args:
        hidden: ``[N, H]`` shared by the heads, or ``[N, K, H]`` one per codebook.
        weight_KVH: ``[K, V, H]``.
        targets_NK: int64 ``[N, K]``, ``options.ignore_index`` where there is no target.
        scale_K: float ``[K]``: weight of a codebook's summed loss in the returned scalar.
        frame_weight_N: float ``[N]``, 1 if absent; weighs the objective, not the logged sums.
        chunk_bytes: most bytes of logits alive at a time.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if hidden.dim() not in (2, 3) or hidden.shape[-1] != weight_KVH.shape[-1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} does not fit weight {tuple(weight_KVH.shape)}: want [N, H] or [N, K, H]")
    expected = (hidden.shape[0], weight_KVH.shape[0])
    if tuple(targets_NK.shape) != expected or (hidden.dim() == 3 and hidden.shape[1] != expected[1]):
        raise ValueError(f"targets {tuple(targets_NK.shape)} and hidden {tuple(hidden.shape)}: want {expected} targets, N x K")
    if frame_weight_N is None:
        frame_weight_N = hidden.new_ones(hidden.shape[0], dtype=torch.float32)
    loss, sum_K, correct_K = ChunkedCodecHead.apply(hidden, weight_KVH, targets_NK, scale_K, frame_weight_N, options, chunk_bytes)
    return HeadLoss(loss, sum_K, (targets_NK != options.ignore_index).sum(0), correct_K)
