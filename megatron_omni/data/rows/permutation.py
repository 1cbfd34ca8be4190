"""Shuffled orders of any length that are never written down: place in, number out, in constant memory.

A Feistel network permutes a square domain that is just large enough, and what falls outside the wanted numbers is
permuted again until it falls inside ("Ciphers with Arbitrary Finite Domains", Black and Rogaway, CT-RSA 2002). It is a
shuffle, not a secret: its rounds are hashes. An order of 100,000,000 samples starts at once and takes no memory.
"""

from __future__ import annotations

import math

import numpy as np

from megatron_omni.runtime.seeds import stable_seed

_ROUNDS = 8


def shuffled(places: np.ndarray, size: int, *seed: str | int) -> np.ndarray:
    """Numbers at ``places`` of the order of ``0 .. size - 1`` that ``seed`` names.

    Args:
        places: int [n], each from 0 to before ``size``.
        seed: strings and integers, as ``runtime.seeds.rng`` takes them.

    Returns:
        int64 [n]; over all places each number comes once.
    """
    root = math.isqrt(max(size - 1, 0)) + 1
    side = np.uint64(root + root % 2)  # over an odd side all rounds together would be an even permutation, always
    keys = [np.uint64(stable_seed("shuffled", number, *seed)) for number in range(_ROUNDS)]
    numbers = _feistel(places.astype(np.uint64), side, keys)
    while len(outside := np.flatnonzero(numbers >= size)):
        numbers[outside] = _feistel(numbers[outside], side, keys)
    return numbers.astype(np.int64)


def hashed(numbers: np.ndarray, *seed: str | int) -> np.ndarray:
    """uint64 [n]: evenly spread bits for each of ``numbers`` (int [n]), others under another ``seed``."""
    return _mixed(numbers.astype(np.uint64) ^ np.uint64(stable_seed("hashed", *seed)))


def _feistel(numbers: np.ndarray, side: np.uint64, keys: list[np.uint64]) -> np.ndarray:
    """A permutation of ``0 .. side**2 - 1``, uint64 [n] to uint64 [n]: one digit shifts the other, round after round."""
    left, right = np.divmod(numbers, side)
    for key in keys:
        left, right = right, (left + _mixed(right ^ key) % side) % side
    mixed: np.ndarray = left * side + right
    return mixed


def _mixed(bits: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele et al. 2014): each input bit changes each output bit half of the time."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
