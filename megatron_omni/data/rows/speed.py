"""Speed perturbation (Ko et al., Interspeech 2015), planned: it changes how long clips are, so the row plan draws it.

A sample's speed in a window is a hash of seed, window and number, like the order of samples: any rank knows it, nothing is
stored, packing stays exact. A sample that no row would hold at its drawn speed keeps its own. Speech that the model is to
say stays as it is.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import soxr

from megatron_omni.data.rows.permutation import hashed
from megatron_omni.schema import Sample, SampleArrays

_SOXR_RATE = 16_000
"""Only the ratio of rates matters."""


@dataclass(frozen=True, eq=False)
class Speeds:
    """The speeds of a plan, each drawn as often as the others, and what samples take of a row at each."""

    factors: tuple[float, ...]
    demands: tuple[np.ndarray, ...]
    """int [samples, 5] each; may be mapped."""

    def draw(self, samples: np.ndarray, seed: int, window: int) -> np.ndarray:
        """int64 [n]: places in ``factors`` of the samples (int64 [n]) of a window."""
        return (hashed(samples, "speed", seed, window) % np.uint64(len(self.factors))).astype(np.int64)

    def at(self, samples: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """int [n, 5]: demands of the samples at the drawn speeds."""
        return np.select([(drawn == place)[:, None] for place in range(len(self.factors))], [table[samples] for table in self.demands])


def at_speed(sample: Sample, factor: float) -> Sample:
    """The sample with the lengths that its clips have at ``factor`` times their speed."""
    return dataclasses.replace(sample, num_samples={name: sped_length(length, factor) for name, length in sample.num_samples.items()})


def arrays_at_speed(arrays: SampleArrays, factor: float) -> SampleArrays:
    return dataclasses.replace(arrays, audio={name: change_speed(wave, factor) for name, wave in arrays.audio.items()})


def sped_length(samples: int, factor: float) -> int:
    return max(1, round(samples / factor))


def change_speed(wave: np.ndarray, factor: float) -> np.ndarray:
    """float32 [W] to float32 [``sped_length(W, factor)``]: tempo and pitch change together."""
    sped: np.ndarray = soxr.resample(wave, _SOXR_RATE * factor, _SOXR_RATE, quality="HQ")
    wanted = sped_length(len(wave), factor)
    return np.pad(sped[:wanted], (0, max(0, wanted - len(sped))))  # soxr rounds as it likes, by a sample
