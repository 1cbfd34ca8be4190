"""The row plan: which samples share which row, in which order; pure functions of numbers, no audio, no processes.

A window is at least ``window_rows`` rows' worth of the samples that the mixture draws, packed (``bins``). Its rows follow
each other by a golden-ratio sequence over the ranks of their costs: rows at the same place of two windows cost about the
same, so streams that walk in step are balanced, while any few rows in a row cover cheap and dear ones alike, so no step
trains on one kind of sample only. Windows do not know of each other: any rank plans any window alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from megatron_omni.data.rows.bins import pack
from megatron_omni.data.rows.mixture import Mixture
from megatron_omni.data.rows.speed import Speeds
from megatron_omni.runtime.errors import InputError
from megatron_omni.schema import RowShape

PLANNER_VERSION = 3
"""Raised whenever the same inputs would give other rows."""

RESOURCES = tuple(field.name for field in dataclasses.fields(RowShape))
"""The columns of every table of demands: seq, codec, encoder, spoken, supervised."""

WINDOW_ROWS = 512
GOLDEN_RATIO = (5**0.5 - 1) / 2
"""Its multiples modulo 1 are spread evenly, however many of them are taken."""
_NAMED = 20  # how many offenders a message lists
_FULL = 1 << 12  # a full row in the integers that costs are compared in: ranks with other processors must agree


@dataclass(frozen=True)
class Fill:
    """Demand over capacity, 0 to 1, by resource; ``binding`` is that of the scarcest one."""

    tokens: float
    codec: float
    encoder: float
    spoken: float
    supervised: float
    binding: float
    scarcest: str

    @classmethod
    def of(cls, demand: np.ndarray, shape: RowShape, num_rows: int) -> Fill:
        """``demand``: int [5], summed over the samples of ``num_rows`` rows."""
        tokens, codec, encoder, spoken, supervised = fill = (demand / np.maximum(capacity(shape) * num_rows, 1)).tolist()
        return cls(tokens, codec, encoder, spoken, supervised, max(fill), RESOURCES[int(np.argmax(fill))])


@dataclass(frozen=True)
class PlanFingerprint:
    """Everything that the rows of an epoch depend on. Two plans are the same exactly when these are."""

    data: str
    tokenizer: str
    geometry: str
    row: str
    acoustic_delay: int
    seed: int
    window_rows: int
    mixture: str = ""
    """``Mixture.fingerprint``."""
    long_samples: str = "refuse"
    speeds: str = "1.0"
    planner: int = PLANNER_VERSION

    def require(self, other: PlanFingerprint, whose: str) -> None:
        """``InputError`` that names what differs between ``self``, recorded in ``whose``, and the present ``other``."""
        here = dataclasses.asdict(other)
        differences = [
            f"{name}: {value} there, {here[name]} now" for name, value in dataclasses.asdict(self).items() if value != here[name]
        ]
        if differences:
            raise InputError(
                f"{whose} belongs to another row plan ({'; '.join(differences)}); give back what it was made with, or start anew without it"
            )


def capacity(shape: RowShape) -> np.ndarray:
    """int64 [5], in the order of ``RESOURCES``."""
    return np.array(dataclasses.astuple(shape), np.int64)


def too_long(demands: np.ndarray, shape: RowShape) -> np.ndarray:
    """int64: the samples of ``demands`` (int [n, 5]) that no row holds, ascending."""
    limits, step = capacity(shape), 1 << 20  # a slice at a time: the table may be mapped and large
    found = [start + np.flatnonzero((demands[start : start + step] > limits).any(1)) for start in range(0, len(demands), step)]
    return np.concatenate([np.empty(0, np.int64), *found])


def require_fit(demands: np.ndarray, shape: RowShape, key: Callable[[int], str]) -> None:
    """``InputError`` that lists the samples (``key(i)`` names one) which no row can hold, with what they need."""
    offenders = too_long(demands, shape)
    if len(offenders):
        raise InputError(
            f"{describe_too_long(demands, offenders, shape, key)}; enlarge the row, or set data.long_samples to drop or split them"
        )


def describe_too_long(demands: np.ndarray, offenders: np.ndarray, shape: RowShape, key: Callable[[int], str]) -> str:
    """Names the first of the ``offenders`` with what they need, and the largest demands among them."""
    needs = demands[offenders]
    over = needs > capacity(shape)
    lines = []
    for number, need, exceeds in zip(offenders[:_NAMED].tolist(), needs, over, strict=False):
        lines.append(f"{key(number)} ({', '.join(f'{RESOURCES[d]} {need[d]}' for d in np.flatnonzero(exceeds))})")
    largest = ", ".join(f"{name} {value}" for name, value in zip(RESOURCES, needs.max(0).tolist(), strict=True))
    more = f" and {len(offenders) - _NAMED} more" if len(offenders) > _NAMED else ""
    return (
        f"{len(offenders)} of {len(demands)} samples do not fit into a row of {dataclasses.asdict(shape)}: {'; '.join(lines)}{more}; "
        f"the largest demands are {largest}"
    )


def plan_window(demands: np.ndarray, shape: RowShape) -> list[np.ndarray]:
    """Packs the samples of one window.

    Args:
        demands: int [n, 5]; each sample fits into a row (``require_fit``).

    Returns:
        Rows as int64 arrays of sample numbers within the window, in training order.
    """
    rows = pack(demands, capacity(shape))
    # The row's shape is fixed, so its cost varies with attention: quadratic in LLM, codec decoder and encoder.
    load = demands[:, :3].astype(np.int64) * _FULL // capacity(shape)[:3]
    cost_of_sample = (load**2).sum(1)
    ranked = np.argsort([cost_of_sample[row].sum() for row in rows], kind="stable")
    quantile = np.arange(len(rows)) * GOLDEN_RATIO % 1
    return [rows[number] for number in ranked[quantile.argsort().argsort()]]


class Played(NamedTuple):
    """Samples at the speed at which they are heard."""

    demands: np.ndarray
    """int [n, 5]: what they take of a row."""
    speeds: np.ndarray
    """float64 [n]; 1: as they were recorded."""


class Plan(Protocol):
    """An endless sequence of windows of rows: computed (``RowPlan``), saved (``SavedPlan``) or with the samples themselves
    (``MaterializedRows``)."""

    @property
    def demands(self) -> np.ndarray: ...

    @property
    def shape(self) -> RowShape: ...

    @property
    def windows_per_epoch(self) -> int: ...

    def window(self, ordinal: int) -> list[np.ndarray]: ...

    def played(self, ordinal: int, samples: np.ndarray) -> Played:
        """How ``samples`` (int64 [n]) of a window are played in it."""
        ...


@dataclass(frozen=True, eq=False)
class RowPlan:
    """The endless sequence of windows, counted across epochs. Samples that no row holds must be refused before."""

    demands: np.ndarray
    """int [samples, 5]; may be mapped."""
    shape: RowShape
    seed: int
    window_rows: int = WINDOW_ROWS
    mixture: Mixture | None = None
    """None: every sample once per epoch."""
    perturbed: Speeds | None = None
    """None: every sample at its own speed."""

    @cached_property
    def windows_per_epoch(self) -> int:
        rows = int((self._mixture.demand // capacity(self.shape)).max())
        return max(1, rows // self.window_rows)

    def window(self, ordinal: int) -> list[np.ndarray]:
        """Rows of sample numbers; the windows of an epoch together hold each sample as often as the mixture draws it."""
        samples = self._mixture.drawn(self.seed, self.windows_per_epoch, ordinal)
        return [samples[row] for row in plan_window(self.played(ordinal, samples).demands, self.shape)]

    def played(self, ordinal: int, samples: np.ndarray) -> Played:
        """How ``samples`` (int64 [n]) of a window are played in it; those that no row would hold then, as they are."""
        own = Played(self.demands[samples], np.ones(len(samples)))
        if self.perturbed is None:
            return own
        drawn = self.perturbed.draw(samples, self.seed, ordinal)
        demands, speeds = self.perturbed.at(samples, drawn), np.array(self.perturbed.factors)[drawn]
        fits = np.all(demands <= capacity(self.shape), axis=1)
        return Played(np.where(fits[:, None], demands, own.demands), np.where(fits, speeds, own.speeds))

    @cached_property
    def _mixture(self) -> Mixture:
        if self.mixture is not None:
            return self.mixture
        return Mixture.whole(len(self.demands), self.demands.sum(0, dtype=np.int64))
