"""Seeds that are a pure function of names and numbers, the same on every machine and in every process."""

from __future__ import annotations

import numpy as np
import torch
import xxhash


def stable_seed(*parts: str | int) -> int:
    """A 63-bit seed from any mix of strings and integers; unlike ``hash()`` it does not change between processes."""
    return xxhash.xxh3_64_intdigest("\x1f".join(map(str, parts)).encode()) >> 1


def generator(*parts: str | int) -> torch.Generator:
    """A CPU generator seeded with ``stable_seed(*parts)``."""
    return torch.Generator().manual_seed(stable_seed(*parts))


def rng(*parts: str | int) -> np.random.Generator:
    """A numpy generator seeded with ``stable_seed(*parts)``."""
    return np.random.default_rng(stable_seed(*parts))
