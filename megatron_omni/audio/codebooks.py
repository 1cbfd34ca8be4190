"""The residual codebooks of Mimi, searched in float64, and the question whether two searches differ by more than rounding.

A code is an argmin, and near ties fall either way with the last bit of a distance. ``torch.cdist`` in float32 rounds by the
shape of its batch; in float64 the search itself never decides a tie, so codes depend on the latents alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

CHUNK = 4096
"""Vectors searched at once: 64 MiB of distances with 2048 entries."""

TIE = 1e-5
"""Two entries tie if a move of the latent by this share of its norm can turn the choice round. Rounding in float32 moves latents by
some 1e-7 of their norm (another batch) to 1e-6 (another number of threads, another implementation)."""


@dataclass(frozen=True)
class CodeDifferences:
    """What separates two encodings of the same clips."""

    frames: int
    """Compared."""
    codes: int
    """Compared: frames times codebooks."""
    differing: int
    """Codes that are not equal."""
    differing_frames: int
    ties: int
    """Frames whose first difference is a tie; what follows it in the frame encodes another residual."""

    @property
    def beyond_ties(self) -> int:
        """Frames that differ for another reason than rounding."""
        return self.differing_frames - self.ties

    @property
    def rate(self) -> float:
        """Share of codes that differ."""
        return self.differing / max(self.codes, 1)


@dataclass(frozen=True, eq=False)
class ResidualCodebooks:
    """One projection and the codebooks that follow each other on its residual."""

    project_PD: torch.Tensor | None
    """float64; None: the latents are searched as they are."""
    entries_KVP: Sequence[torch.Tensor]
    """float64 [V, P] by codebook."""

    def search(self, latents_ND: torch.Tensor, count: int) -> torch.Tensor:
        """int64 [count, N]: the nearest entry, codebook after codebook."""
        codes = [self._search(chunk.double(), count) for chunk in torch.split(latents_ND, CHUNK)]
        return torch.cat(codes, dim=1)

    def project(self, latents_ND: torch.Tensor) -> torch.Tensor:
        return latents_ND if self.project_PD is None else latents_ND @ self.project_PD.T

    def _search(self, latents_ND: torch.Tensor, count: int) -> torch.Tensor:
        residual_NP = self.project(latents_ND)
        codes = []
        for entries_VP in self.entries_KVP[:count]:
            # |r - c|^2 without |r|^2, which all entries share
            distances_NV = torch.addmm(entries_VP.square().sum(1), residual_NP, entries_VP.T, alpha=-2.0)
            codes.append(distances_NV.argmin(1))
            residual_NP = residual_NP - entries_VP[codes[-1]]
        return torch.stack(codes)


@dataclass(frozen=True)
class SplitCodebooks:
    """Mimi's two parts, which search the same latents: semantic codebooks first, then acoustic ones."""

    semantic: ResidualCodebooks
    acoustic: ResidualCodebooks

    def search(self, latents_ND: torch.Tensor, num_codebooks: int) -> torch.Tensor:
        """int64 [num_codebooks, N]."""
        first = len(self.semantic.entries_KVP)
        codes = self.semantic.search(latents_ND, min(first, num_codebooks))
        if num_codebooks <= first:
            return codes
        return torch.cat([codes, self.acoustic.search(latents_ND, num_codebooks - first)])

    def differences(self, latents_ND: torch.Tensor, one_KN: np.ndarray, other_KN: np.ndarray) -> CodeDifferences:
        """Compares two encodings of the frames whose latents are given."""
        differs_KN = one_KN != other_KN
        first = len(self.semantic.entries_KVP)
        ties = sum(
            self._is_tie(latents_ND[frame].double(), int(differs_KN[:, frame].argmax()), one_KN[:, frame], other_KN[:, frame], first)
            for frame in np.flatnonzero(differs_KN.any(0)).tolist()
        )
        return CodeDifferences(one_KN.shape[1], one_KN.size, int(differs_KN.sum()), int(differs_KN.any(0).sum()), ties)

    def _is_tie(self, latent_D: torch.Tensor, codebook: int, one_K: np.ndarray, other_K: np.ndarray, first: int) -> bool:
        part, start = (self.semantic, 0) if codebook < first else (self.acoustic, first)
        latent_P = residual_P = part.project(latent_D[None])[0]
        for entries_VP, code in zip(part.entries_KVP, one_K[start:codebook].tolist(), strict=False):
            residual_P = residual_P - entries_VP[code]
        entries_VP = part.entries_KVP[codebook - start]
        a_P, b_P = entries_VP[int(one_K[codebook])], entries_VP[int(other_K[codebook])]
        # | |r - a|^2 - |r - b|^2 | / 2|a - b| is the way from the residual to the plane between the two entries
        gap = (residual_P - a_P).square().sum() - (residual_P - b_P).square().sum()
        return bool(gap.abs() <= 2 * (a_P - b_P).norm() * TIE * latent_P.norm())
