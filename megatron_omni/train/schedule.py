"""The learning rate as a pure function of the step, so that a resumed run needs no schedule state."""

from __future__ import annotations

from megatron_omni.config.recipe import OptimConfig


def lr_at(step: int, optim: OptimConfig, steps: int) -> float:
    """Learning rate of ``step`` (from 0) of a run of ``steps``.

    Linear warm-up over ``warmup_steps`` (the first step already moves), ``lr`` until ``hold_fraction`` of the run,
    then a linear fall that would reach ``final_fraction * lr`` at step ``steps``.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    fall_from = max(optim.hold_fraction * steps, optim.warmup_steps)
    if step < fall_from:
        return optim.lr
    left = max(steps - step, 0) / max(steps - fall_from, 1.0)
    return optim.lr * (optim.final_fraction + (1 - optim.final_fraction) * min(left, 1.0))
