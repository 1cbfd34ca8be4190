"""Attention on packed rows: a position sees its own segment only, and only its past where ``causal``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["Segments", "attention"]


class Segments:
    """Which positions of each row belong together: ``ids_BT`` int32, equal ids see each other, -1 is padding.

    Padding forms a segment of its own, so that no row of the attention matrix is empty. What a backend needs is
    derived once per forward pass and shared by all layers.
    """

    def __init__(self, ids_BT: torch.Tensor) -> None:
        self.ids_BT = ids_BT
        self._masks: dict[bool, torch.Tensor] = {}

    def mask_B1TT(self, causal: bool) -> torch.Tensor:
        """bool ``[B, 1, T, T]``, True where the query (row) sees the key (column)."""
        if causal not in self._masks:
            mask = self.ids_BT[:, :, None] == self.ids_BT[:, None, :]
            self._masks[causal] = (mask.tril() if causal else mask).unsqueeze(1)
        return self._masks[causal]


def attention(q_BTNH: torch.Tensor, k_BTGH: torch.Tensor, v_BTGH: torch.Tensor, segments: Segments, causal: bool) -> torch.Tensor:
    """Softmax attention ``[B, T, N, H]``; ``G`` key/value heads serve ``N / G`` query heads each (GQA, arXiv:2305.13245)."""
    out_BNTH = F.scaled_dot_product_attention(
        q_BTNH.transpose(1, 2),
        k_BTGH.transpose(1, 2),
        v_BTGH.transpose(1, 2),
        attn_mask=segments.mask_B1TT(causal),
        enable_gqa=q_BTNH.shape[2] != k_BTGH.shape[2],
    )
    return out_BNTH.transpose(1, 2)
