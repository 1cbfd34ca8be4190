"""Delay and undelay are inverses, and every place of the delayed codes is what the layout says."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_omni.audio.delay import NO_CODE, delay_codes, num_steps, undelay_codes


@pytest.mark.parametrize("delay", [0, 1, 2, 5])
@pytest.mark.parametrize("frames", [0, 1, 4])
def test_layout_and_inverse(frames: int, delay: int) -> None:
    codes = np.random.default_rng(0).integers(0, 2048, (8, frames), dtype=np.uint16)
    delayed = delay_codes(codes, delay)
    assert delayed.shape == (8, num_steps(frames, delay)) == (8, max(frames + 1, frames + delay))
    for k in range(8):
        for step in range(delayed.shape[1]):
            frame = step if k == 0 else step - delay
            assert delayed[k, step] == (codes[k, frame] if 0 <= frame < frames else NO_CODE)
    assert (undelay_codes(delayed, delay) == codes).all()
