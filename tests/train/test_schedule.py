"""The learning rate: its corners, and that it never leaves its bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_omni.config.recipe import OptimConfig
from megatron_omni.train.schedule import lr_at

OPTIM = OptimConfig(lr=2.0, warmup_steps=10, hold_fraction=0.3, final_fraction=0.1)


def test_corners():
    assert lr_at(0, OPTIM, 100) == pytest.approx(0.2)
    assert lr_at(9, OPTIM, 100) == 2.0
    assert lr_at(29, OPTIM, 100) == 2.0
    assert lr_at(65, OPTIM, 100) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert lr_at(100, OPTIM, 100) == pytest.approx(0.2)
    assert lr_at(1000, OPTIM, 100) == pytest.approx(0.2)


@given(st.integers(0, 300), st.integers(0, 50), st.floats(0, 1), st.floats(0, 1), st.integers(1, 200))
def test_bounds(step, warmup, hold, final, steps):
    optim = OptimConfig(lr=2.0, warmup_steps=warmup, hold_fraction=hold, final_fraction=final)
    assert 0.0 <= lr_at(step, optim, steps) <= 2.0


@given(st.integers(0, 50), st.floats(0, 1), st.integers(51, 200))
def test_never_rises_after_the_warm_up(warmup, hold, steps):
    optim = OptimConfig(lr=1.0, warmup_steps=warmup, hold_fraction=hold)
    rates = [lr_at(step, optim, steps) for step in range(warmup, steps + 1)]
    assert rates == sorted(rates, reverse=True)
