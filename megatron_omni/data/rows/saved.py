"""A row plan on disk: the windows of some epochs, as ``RowPlan`` computes them; training reads them instead of planning.

::

    DIR/plan.json      fingerprint, first window, hashes; written last, without it there is no plan
    DIR/samples.npy    int64: sample numbers, row after row
    DIR/rows.npy       int64 [rows + 1]: where each row begins in ``samples``
    DIR/windows.npy    int64 [windows + 1]: where each window begins in ``rows``
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import xxhash

from megatron_omni.data.rows.plan import PlanFingerprint, Played, RowPlan
from megatron_omni.runtime.cli import progress
from megatron_omni.runtime.errors import InputError
from megatron_omni.runtime.files import atomic_open, atomic_write
from megatron_omni.schema import RowShape

_ARRAYS = ("samples", "rows", "windows")


@dataclass(frozen=True, eq=False)
class SavedPlan:
    """Windows ``first`` to before ``first + len(windows) - 1``; any other is planned by ``lazy``, with the same result."""

    lazy: RowPlan
    first: int
    samples: np.ndarray
    rows: np.ndarray
    windows: np.ndarray

    @property
    def demands(self) -> np.ndarray:
        return self.lazy.demands

    @property
    def shape(self) -> RowShape:
        return self.lazy.shape

    @property
    def windows_per_epoch(self) -> int:
        return self.lazy.windows_per_epoch

    def window(self, ordinal: int) -> list[np.ndarray]:
        """As ``RowPlan.window``."""
        number = ordinal - self.first
        if not 0 <= number < len(self.windows) - 1:
            return self.lazy.window(ordinal)
        return [self.samples[start:stop] for start, stop in row_bounds(self.rows, self.windows, number)]

    def played(self, ordinal: int, samples: np.ndarray) -> Played:
        return self.lazy.played(ordinal, samples)

    @classmethod
    def compute(cls, plan: RowPlan, epochs: range) -> SavedPlan:
        """The windows of ``epochs``."""
        ordinals = range(epochs.start * plan.windows_per_epoch, epochs.stop * plan.windows_per_epoch)
        windows = [plan.window(ordinal) for ordinal in progress(ordinals, "planning rows")]
        rows = [row for window in windows for row in window]
        return cls(
            plan,
            ordinals.start,
            np.concatenate([np.empty(0, np.int64), *rows]),
            np.cumsum([0, *map(len, rows)], dtype=np.int64),
            np.cumsum([0, *map(len, windows)], dtype=np.int64),
        )

    def save(self, folder: Path, fingerprint: PlanFingerprint) -> None:
        (folder / "plan.json").unlink(missing_ok=True)
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        for name, array in arrays.items():
            with atomic_open(folder / f"{name}.npy") as file:
                np.save(file, array, allow_pickle=False)
        hashes = {name: xxhash.xxh3_128_hexdigest(array.data) for name, array in arrays.items()}
        description = {"fingerprint": dataclasses.asdict(fingerprint), "first": self.first, "xxh3": hashes}
        atomic_write(folder / "plan.json", orjson.dumps(description, option=orjson.OPT_INDENT_2))

    @classmethod
    def load(cls, folder: Path, fingerprint: PlanFingerprint, lazy: RowPlan) -> SavedPlan:
        """Maps the plan in ``folder``; ``InputError`` where no whole plan is, or one of another ``fingerprint``."""
        try:
            description = orjson.loads((folder / "plan.json").read_bytes())
            recorded, first = PlanFingerprint(**description["fingerprint"]), int(description["first"])
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
            hashes = {name: description["xxh3"][name] for name in _ARRAYS}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"no row plan in {folder}: {error!r}; write one with tools/pack_sequences.py") from error
        recorded.require(fingerprint, str(folder))
        for name, array in arrays.items():
            if xxhash.xxh3_128_hexdigest(array.data) != hashes[name]:
                raise InputError(f"{folder / name}.npy is not what plan.json describes; write the plan again with tools/pack_sequences.py")
        return cls(lazy, first, arrays["samples"], arrays["rows"], arrays["windows"])


def row_bounds(rows: np.ndarray, windows: np.ndarray, number: int) -> list[tuple[int, int]]:
    """First sample of each row of window ``number``, and the one after its last."""
    first, last = windows[number : number + 2].tolist()
    bounds = rows[first : last + 1].tolist()
    return list(itertools.pairwise(bounds))
