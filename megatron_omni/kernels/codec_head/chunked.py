"""The codec head in chunks of frames with torch operations: the CPU path, and the path wherever Triton is absent."""

from __future__ import annotations

from typing import Any

import torch

from megatron_omni.kernels.losses import GradientsFormedForward, LossOptions, forward_backward


def _logits(hidden: torch.Tensor, weight_KVH: torch.Tensor) -> torch.Tensor:
    """``[K, n, V]`` in float32: one batched matmul for all heads."""
    hidden_Knh = hidden.unsqueeze(0) if hidden.dim() == 2 else hidden.transpose(0, 1)
    return torch.matmul(hidden_Knh, weight_KVH.transpose(1, 2)).float()


class ChunkedCodecHead(GradientsFormedForward):
    """(hidden, weight, ...) -> (scaled loss, plain sums [K], correct [K]); gradients to hidden and weight only."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight_KVH: torch.Tensor,
        targets_NK: torch.Tensor,
        scale_K: torch.Tensor,
        frame_weight_N: torch.Tensor,
        options: LossOptions,
        chunk_bytes: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        K, V, _ = weight_KVH.shape
        N = hidden.shape[0]
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight_KVH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        sum_K = torch.zeros(K, dtype=torch.float32, device=hidden.device)
        correct_K = torch.zeros(K, dtype=torch.int64, device=hidden.device)
        rows = max(1, chunk_bytes // (4 * K * V))
        for start in range(0, N, rows):
            part = slice(start, start + rows)
            targets_Kn = targets_NK[part].T
            weight_Kn = scale_K.unsqueeze(1) * frame_weight_N[part]
            logits_KnV = _logits(hidden[part], weight_KVH)
            objective_Kn, plain_Kn, correct_Kn = forward_backward(logits_KnV, targets_Kn, weight_Kn, options)
            loss += (objective_Kn * weight_Kn).sum()
            sum_K += plain_Kn.sum(1)
            correct_K += correct_Kn.sum(1)
            grad_KnV = logits_KnV.to(hidden.dtype)
            if grad_hidden is not None:
                grad_KnH = torch.bmm(grad_KnV, weight_KVH)
                grad_hidden[part] = grad_KnH.sum(0) if hidden.dim() == 2 else grad_KnH.transpose(0, 1)
            if grad_weight is not None:
                chunk = hidden[part]
                hidden_KnH = chunk.unsqueeze(0).expand(K, -1, -1) if hidden.dim() == 2 else chunk.transpose(0, 1)
                grad_weight += torch.bmm(grad_KnV.transpose(1, 2), hidden_KnH).float()
        ChunkedCodecHead.keep(ctx, grad_hidden, grad_weight, weight_KVH.dtype)
        ctx.mark_non_differentiable(sum_K, correct_K)
        return loss, sum_K, correct_K
