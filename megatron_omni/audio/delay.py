"""The acoustic delay: codebooks 1.. lag codebook 0 by ``delay`` frames; one more step lets codebook 0 end the speech.

With ``T`` frames there are ``S = max(T + 1, T + delay)`` steps. Codebook 0 of frame ``t`` is at step ``t``, the others
at step ``t + delay``; every other place holds ``NO_CODE``, which no embedding accepts, so a masking bug cannot hide.
"""

from __future__ import annotations

import numpy as np

NO_CODE = -1


def num_steps(num_frames: int, delay: int) -> int:
    return num_frames + max(1, delay)


def delay_codes(codes_KT: np.ndarray, delay: int) -> np.ndarray:
    """int64 ``[K, S]`` from codes ``[K, T]`` of any integer type."""
    K, T = codes_KT.shape
    delayed_KS = np.full((K, num_steps(T, delay)), NO_CODE, np.int64)
    delayed_KS[0, :T] = codes_KT[0]
    delayed_KS[1:, delay : delay + T] = codes_KT[1:]
    return delayed_KS


def undelay_codes(delayed_KS: np.ndarray, delay: int) -> np.ndarray:
    """The inverse: ``[K, S]`` to ``[K, T]``, the type kept."""
    T = delayed_KS.shape[1] - max(1, delay)
    return np.concatenate([delayed_KS[:1, :T], delayed_KS[1:, delay : delay + T]])
