"""The row plan: which samples share which row, in which order; pure functions of numbers, no audio, no processes.

An epoch is a seeded permutation of the samples, cut into windows of at least ``window_rows`` rows' worth of them.
A window is packed by best-fit-decreasing over all capacities of a row (Panigrahy et al. 2011, "Heuristics for Vector
Bin Packing"), which puts like samples together. Its rows then follow each other by a golden-ratio sequence over the
ranks of their costs: rows at the same place of two windows cost about the same, so streams that walk in step are
balanced, while any few rows in a row cover cheap and dear ones alike, so no step trains on one kind of sample only.
Windows do not know of each other: any rank plans any window alone.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import orjson
import xxhash

from megatron_omni.runtime.errors import InputError
from megatron_omni.runtime.files import atomic_open, atomic_write
from megatron_omni.runtime.seeds import rng
from megatron_omni.schema import RowShape

PLANNER_VERSION = 1
"""Raised whenever the same inputs would give other rows."""

RESOURCES = tuple(field.name for field in dataclasses.fields(RowShape))
"""The columns of every table of demands: seq, codec, encoder, spoken, supervised."""

WINDOW_ROWS = 512
GOLDEN_RATIO = (5**0.5 - 1) / 2
"""Its multiples modulo 1 are spread evenly, however many of them are taken."""
_NAMED = 20  # how many offenders a message lists


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


def require_fit(demands: np.ndarray, shape: RowShape, key: Callable[[int], str]) -> None:
    """``InputError`` that lists the samples (``key(i)`` names one) which no row can hold, with what they need."""
    over = demands > capacity(shape)
    offenders = np.flatnonzero(over.any(1))
    if len(offenders) == 0:
        return
    lines = []
    for sample in offenders[:_NAMED].tolist():
        needs = ", ".join(f"{RESOURCES[d]} {demands[sample, d]}" for d in np.flatnonzero(over[sample]))
        lines.append(f"{key(sample)} ({needs})")
    largest = ", ".join(f"{name} {value}" for name, value in zip(RESOURCES, demands.max(0).tolist(), strict=True))
    more = f" and {len(offenders) - _NAMED} more" if len(offenders) > _NAMED else ""
    raise InputError(
        f"{len(offenders)} of {len(demands)} samples do not fit into a row of {dataclasses.asdict(shape)}: {'; '.join(lines)}{more}; "
        f"the largest demands are {largest}: enlarge the row, or remove these samples"
    )


def plan_window(demands: np.ndarray, shape: RowShape) -> list[np.ndarray]:
    """Packs the samples of one window.

    Args:
        demands: int [n, 5]; each sample fits into a row (``require_fit``).

    Returns:
        Rows as int64 arrays of sample numbers within the window, in training order.
    """
    load = demands / capacity(shape)
    scarcity = load.sum(0) / max(load.sum(0).max(), 1e-12)
    rows = _best_fit_decreasing(demands, capacity(shape), int(np.argmax(scarcity)), load @ scarcity**2)
    # The row's shape is fixed, so its cost varies with attention: quadratic in LLM, codec decoder and encoder.
    cost_of_sample = (load[:, :3] ** 2).sum(1)
    ranked = np.argsort([cost_of_sample[row].sum() for row in rows], kind="stable")
    quantile = np.arange(len(rows)) * GOLDEN_RATIO % 1
    return [rows[number] for number in ranked[quantile.argsort().argsort()]]


def _best_fit_decreasing(demands: np.ndarray, limits: np.ndarray, binding: int, size: np.ndarray) -> list[np.ndarray]:
    """Largest sample first, each into the row with the least of the ``binding`` resource left that still holds it.

    A plain loop over integers: per sample one bisection of the rows, sorted by what they have left, and one comparison
    of all resources at once. For that the resources stand side by side in one integer, 32 bits each, topped by a guard
    bit that a subtraction clears exactly if that resource does not suffice.
    """
    shifts = [33 * number for number in range(len(limits))]
    guards = sum(1 << (shift + 32) for shift in shifts)

    def packed(vector: list[int]) -> int:
        return sum(value << shift for value, shift in zip(vector, shifts, strict=True))

    empty = packed(limits.tolist()) | guards
    free: list[int] = []  # by row
    members: list[list[int]] = []  # by row
    left: list[int] = []  # of the binding resource, ascending
    row_at: list[int] = []  # the row that has it
    order = np.argsort(-size, kind="stable")
    for sample, vector in zip(order.tolist(), demands[order].tolist(), strict=True):
        need = packed(vector)
        for place in range(bisect_left(left, vector[binding]), len(left)):
            row = row_at[place]
            if (free[row] - need) & guards == guards:
                room = left.pop(place) - vector[binding]
                row_at.pop(place)
                break
        else:
            row, room = len(free), int(limits[binding]) - vector[binding]
            free.append(empty)
            members.append([])
        free[row] -= need
        members[row].append(sample)
        place = bisect_left(left, room)
        left.insert(place, room)
        row_at.insert(place, row)
    return [np.array(row, np.int64) for row in members]


@dataclass(frozen=True, eq=False)
class RowPlan:
    """The endless sequence of windows, counted across epochs. Samples that no row holds must be refused before."""

    demands: np.ndarray
    """int [samples, 5]."""
    shape: RowShape
    seed: int
    window_rows: int = WINDOW_ROWS

    @cached_property
    def windows_per_epoch(self) -> int:
        rows = (self.demands.sum(0) / capacity(self.shape)).max()
        return max(1, int(rows) // self.window_rows)

    def window(self, ordinal: int) -> list[np.ndarray]:
        """Rows of sample numbers; each sample is in exactly one row of one window of each epoch."""
        epoch, number = divmod(ordinal, self.windows_per_epoch)
        start, stop = (len(self.demands) * edge // self.windows_per_epoch for edge in (number, number + 1))
        samples = _epoch_order(self.seed, epoch, len(self.demands))[start:stop]
        return [samples[row] for row in plan_window(self.demands[samples], self.shape)]

    def epoch(self, epoch: int) -> EpochPlan:
        first = epoch * self.windows_per_epoch
        return EpochPlan.of([self.window(ordinal) for ordinal in range(first, first + self.windows_per_epoch)])


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    return rng(seed, "epoch", epoch).permutation(num_samples)


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """One epoch's rows as three flat arrays, as they are saved."""

    samples: np.ndarray
    """int64: sample numbers, row after row."""
    rows: np.ndarray
    """int64 [rows + 1]: where each row begins in ``samples``."""
    windows: np.ndarray
    """int64 [windows + 1]: where each window begins in ``rows``."""

    @classmethod
    def of(cls, windows: Sequence[Sequence[np.ndarray]]) -> EpochPlan:
        rows = [row for window in windows for row in window]
        return cls(
            np.concatenate([np.empty(0, np.int64), *rows]),
            np.cumsum([0, *map(len, rows)], dtype=np.int64),
            np.cumsum([0, *map(len, windows)], dtype=np.int64),
        )

    def window(self, number: int) -> list[np.ndarray]:
        """The rows of a window, as ``RowPlan.window`` gives them."""
        first, last = self.windows[number : number + 2]
        return [self.samples[start:stop] for start, stop in zip(self.rows[first:last], self.rows[first + 1 : last + 1], strict=True)]

    def save(self, folder: Path, fingerprint: PlanFingerprint, epoch: int) -> None:
        """Writes three .npy files and, last, ``plan.json``: without it there is no plan."""
        (folder / "plan.json").unlink(missing_ok=True)
        for name, array in self._arrays().items():
            with atomic_open(folder / f"{name}.npy") as file:
                np.save(file, array, allow_pickle=False)
        hashes = {name: xxhash.xxh3_128_hexdigest(array.tobytes()) for name, array in self._arrays().items()}
        description = {"fingerprint": dataclasses.asdict(fingerprint), "epoch": epoch, "xxh3": hashes}
        atomic_write(folder / "plan.json", orjson.dumps(description, option=orjson.OPT_INDENT_2))

    @classmethod
    def load(cls, folder: Path, fingerprint: PlanFingerprint) -> EpochPlan:
        """``InputError`` where no whole plan is, or one of another ``fingerprint``."""
        try:
            description = orjson.loads((folder / "plan.json").read_bytes())
            arrays = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in description["xxh3"]}
        except (OSError, ValueError) as error:
            raise InputError(f"no row plan in {folder}: {error}; write one with tools/pack_sequences.py") from error
        for name, array in arrays.items():
            if xxhash.xxh3_128_hexdigest(array.tobytes()) != description["xxh3"][name]:
                raise InputError(f"{folder / name}.npy is not what plan.json describes; write the plan again with tools/pack_sequences.py")
        PlanFingerprint(**description["fingerprint"]).require(fingerprint, str(folder))
        return cls(**arrays)

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"samples": self.samples, "rows": self.rows, "windows": self.windows}
