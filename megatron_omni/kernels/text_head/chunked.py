"""The text head in chunks of positions with torch operations."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_omni.kernels.losses import GradientsFormedForward, LossOptions


def _combine(stats_u5: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """All ranks' statistics ``[tp, u, 5]`` by one collective."""
    if group is None:
        return stats_u5.unsqueeze(0)
    world = dist.get_world_size(group)
    out = stats_u5.new_empty(world * stats_u5.shape[0], 5)
    dist.all_gather_into_tensor(out, stats_u5.contiguous(), group=group)
    return out.view(world, *stats_u5.shape)


class ChunkedTextHead(GradientsFormedForward):
    """(hidden, weight shard, ...) -> (scaled loss, plain sum, correct); gradients to hidden and weight only."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_UD: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_U: torch.Tensor,
        scale: torch.Tensor,
        group: dist.ProcessGroup | None,
        options: LossOptions,
        chunk_bytes: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        U, V = hidden_UD.shape[0], weight_VD.shape[0]
        rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        first, whole = rank * V, world * V
        device = hidden_UD.device
        grad_hidden = torch.zeros_like(hidden_UD) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        loss, total = torch.zeros((), device=device), torch.zeros((), device=device)
        correct = torch.zeros((), dtype=torch.int64, device=device)
        rows = max(1, chunk_bytes // (4 * V))
        for start in range(0, U, rows):
            hidden, targets = hidden_UD[start : start + rows], targets_U[start : start + rows]
            logits_uV = (hidden @ weight_VD.T).float()
            valid = targets != options.ignore_index
            mine = valid & (targets >= first) & (targets < first + V)
            local = (targets - first).where(mine, 0).unsqueeze(-1)
            best, at = logits_uV.max(-1)
            at_target = logits_uV.gather(-1, local).squeeze(-1) * mine
            stats = torch.stack([best, (logits_uV - best[:, None]).exp().sum(-1), at_target, at.float() + first, logits_uV.sum(-1)], -1)
            best_r, sum_r, target_r, at_r, total_r = _combine(stats, group).unbind(-1)
            top, winner = best_r.max(0)
            lse = top + ((best_r - top).exp() * sum_r).sum(0).log()
            plain = (lse - target_r.sum(0)) * valid
            smooth = (lse - total_r.sum(0) / whole) * valid
            epsilon = options.label_smoothing
            objective = (1 - epsilon) * plain + epsilon * smooth + options.z_loss * lse**2 * valid
            loss += objective.sum() * scale
            total += plain.sum()
            correct += ((at_r.gather(0, winner[None])[0].long() == targets) & valid).sum()
            # logits become their gradient; the formula is forward_backward's in losses.py, for a part of the classes
            weight = (scale * valid).unsqueeze(-1)
            lse = lse.unsqueeze(-1)
            grad_uV = logits_uV.sub_(lse).exp_().mul_(weight * (1 + 2 * options.z_loss * lse))
            if epsilon:
                grad_uV.sub_(weight * (epsilon / whole))
            grad_uV.scatter_add_(-1, local, -(1 - epsilon) * weight * mine.unsqueeze(-1))
            grad = grad_uV.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = grad @ weight_VD
            if grad_weight is not None:
                grad_weight += (grad.T @ hidden).float()
        if grad_hidden is not None and group is not None:
            dist.all_reduce(grad_hidden, group=group)
        ChunkedTextHead.keep(ctx, grad_hidden, grad_weight, weight_VD.dtype)
        ctx.mark_non_differentiable(total, correct)
        return loss, total, correct
