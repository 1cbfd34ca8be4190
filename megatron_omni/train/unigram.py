"""Unigram entropy of the codes trained on so far: the loss of a model that knows nothing but their frequencies."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_omni.schema import IGNORE, Batch


class UnigramEntropy:
    """Counts targets per codebook and class over the batches of this process and of its data-parallel peers."""

    def __init__(self, num_codebooks: int, classes: int, group: dist.ProcessGroup) -> None:
        self.group = group
        self._counts_KV = torch.zeros(num_codebooks, classes, dtype=torch.int64)

    def add(self, batch: Batch) -> None:
        """Counts one micro-batch of this rank."""
        for counts_V, targets_BF in zip(self._counts_KV, batch.codec_targets_BKF.unbind(1), strict=True):
            counts_V += torch.bincount(targets_BF[targets_BF != IGNORE], minlength=len(counts_V))

    def value(self, device: torch.device) -> tuple[float, ...]:
        """Entropy per codebook in nats over everything counted; 0 where nothing was. All ranks call this together."""
        counts_KV = self._counts_KV.to(device, torch.float64)
        dist.all_reduce(counts_KV, group=self.group)
        share_KV = counts_KV / counts_KV.sum(1, keepdim=True).clamp(min=1)
        return tuple((-torch.special.xlogy(share_KV, share_KV).sum(1)).tolist())
