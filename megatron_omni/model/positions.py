"""Moving vectors between positions of packed rows by the index lists of ``schema.Batch``."""

from __future__ import annotations

import torch


def take(x_BTD: torch.Tensor, index_BX: torch.Tensor) -> torch.Tensor:
    """``[B, X, D]``: of each row the vectors at its positions ``index_BX`` (int64; negative ones give position 0)."""
    return x_BTD.gather(1, index_BX.clamp(min=0).unsqueeze(-1).expand(-1, -1, x_BTD.shape[-1]))


def place_audio(embeddings_BTD: torch.Tensor, audio_XD: torch.Tensor, source_BT: torch.Tensor) -> torch.Tensor:
    """Token embeddings with row ``source - 1`` of ``audio_XD`` where ``source_BT`` is positive (``Batch.audio_source_BT``)."""
    return torch.where((source_BT > 0).unsqueeze(-1), audio_XD[(source_BT - 1).clamp(min=0)], embeddings_BTD)
