"""How the next code is chosen from its logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Choose = Callable[[torch.Tensor, int], torch.Tensor]
"""``(logits float32 [N, V], codebook) -> int64 [N]``."""


def greedy(logits_NV: torch.Tensor, codebook: int) -> torch.Tensor:
    return logits_NV.argmax(-1)


@dataclass(frozen=True)
class Sampler:
    """Samples from the ``top_k`` most probable codes at ``temperature``, by a generator of its own."""

    temperature: float
    """Of every codebook; 0 is greedy."""
    top_k: int
    """0: all codes."""
    generator: torch.Generator
    acoustic_temperature: float | None = None
    """Of codebooks 1.., if they differ from codebook 0."""

    def __call__(self, logits_NV: torch.Tensor, codebook: int) -> torch.Tensor:
        temperature = self.temperature if codebook == 0 or self.acoustic_temperature is None else self.acoustic_temperature
        if temperature == 0:
            return greedy(logits_NV, codebook)
        if 0 < self.top_k < logits_NV.shape[-1]:
            least = logits_NV.topk(self.top_k).values[:, -1:]
            logits_NV = logits_NV.masked_fill(logits_NV < least, -torch.inf)
        probabilities = (logits_NV / temperature).softmax(-1).to(self.generator.device)
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0].to(logits_NV.device)
