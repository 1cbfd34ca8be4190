"""The training stream: plan -> rows -> micro-batches, the same rows in the same order on any number of ranks and workers.

1. Windows of the plan, counted across epochs, belong to ``V`` virtual streams in turn: window ``w`` to stream ``w % V``.
   A stream is the rows of its windows, one after another.
2. Global row ``n`` is the next row of stream ``n % V``. Step ``t`` takes the next ``G`` global rows.
3. Data-parallel rank ``r`` of ``D`` takes the rows with ``n % D == r``. ``D`` divides ``V``, so these are whole
   streams, and a rank plans its own only.
4. Planning runs in the rank's process, ahead of the workers and, from the middle of a window on, in a thread beside the
   training; reading, features and collation run in workers.

The position after a step is two integers per stream. Ranks of one tensor-parallel group build equal streams.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_omni.data.rows.demands import Demands
from megatron_omni.data.rows.packer import Address, PackedRows, RowPacker, Skipped
from megatron_omni.data.rows.plan import RESOURCES, Fill, Plan, PlanFingerprint, RowPlan, require_fit
from megatron_omni.data.rows.ring import Ring
from megatron_omni.runtime.errors import InputError, WorkError
from megatron_omni.runtime.logs import get_logger

logger = get_logger(__name__)

_FEW_SAMPLES = 10_000
"""The share of damaged samples is taken of at least so many, or the first one of a run would end it."""


@dataclass(frozen=True)
class StreamState:
    """Where the stream stands: plain numbers, from which any world size goes on."""

    fingerprint: PlanFingerprint
    virtual_streams: int
    row: int
    """Number of the next global row."""
    positions: dict[int, tuple[int, int]]
    """By stream: window and row within it that come next. A rank's own streams only, until ``merge``."""

    @classmethod
    def start(cls, fingerprint: PlanFingerprint, virtual_streams: int) -> StreamState:
        return cls(fingerprint, virtual_streams, 0, {stream: (stream, 0) for stream in range(virtual_streams)})

    @classmethod
    def merge(cls, states: Sequence[StreamState]) -> StreamState:
        """The whole state from those of the data-parallel ranks after the same step."""
        first = states[0]
        if any(dataclasses.replace(state, positions=first.positions) != first for state in states):
            raise InputError(f"states of different steps or plans cannot be merged: they stand at rows {[state.row for state in states]}")
        positions = {stream: place for state in states for stream, place in state.positions.items()}
        return dataclasses.replace(first, positions=dict(sorted(positions.items())))

    def to_json(self) -> dict[str, Any]:
        """At most 32 bytes per stream, and what the fingerprint takes."""
        places = {str(stream): list(place) for stream, place in self.positions.items()}
        return {**dataclasses.asdict(self), "positions": places}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> StreamState:
        positions = {int(stream): (int(window), int(row)) for stream, (window, row) in data["positions"].items()}
        return cls(PlanFingerprint(**data["fingerprint"]), int(data["virtual_streams"]), int(data["row"]), positions)


@dataclass(frozen=True)
class StepRows:
    """One step's share of one rank."""

    micro_batches: tuple[PackedRows, ...]
    """Their tensors stay as they are until the step after the next is asked for."""
    row_numbers: tuple[int, ...]
    """Global numbers of its rows, in their order."""
    fill: Fill
    """Of its rows."""
    state: StreamState
    """After the step."""

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Samples that were planned and could not be read."""
        return tuple(skipped for packed in self.micro_batches for skipped in packed.skipped)


@dataclass(frozen=True)
class _PlannedStep:
    row_numbers: tuple[int, ...]
    fill: Fill
    state: StreamState


class RowStream:
    """Iterates over the steps of one rank, without end; ``iter`` starts at ``state``."""

    def __init__(
        self,
        packer: RowPacker,
        plan: Plan,
        fingerprint: PlanFingerprint,
        *,
        virtual_streams: int,
        dp_rank: int,
        dp_size: int,
        micro_rows: int,
        micro_batches: int,
        num_workers: int = 0,
        state: StreamState | None = None,
        damaged_samples: float = 0.0,
        pinned: bool = False,
    ) -> None:
        """A step has ``micro_rows * micro_batches * dp_size`` global rows.

        Args:
            fingerprint: of ``plan``.
            damaged_samples: largest share of the rank's samples that ``packer`` may skip; beyond it ``iter`` raises ``WorkError``.
            pinned: batches lie in memory from which copies to a GPU run beside the computation (with workers only).

        Raises:
            InputError: no samples; ``dp_size`` does not divide ``virtual_streams``; or a state of another plan, or of some
                ranks only.
        """
        if len(plan.demands) == 0:
            raise InputError("the training data hold no samples")
        if virtual_streams % dp_size:
            choices = [size for size in range(1, virtual_streams + 1) if virtual_streams % size == 0]
            raise InputError(
                f"a data-parallel size of {dp_size} does not divide data.virtual_streams={virtual_streams}; choose one of {choices}"
            )
        if state is None:
            state = StreamState.start(fingerprint, virtual_streams)
        state.fingerprint.require(fingerprint, "the recorded data position")
        if state.virtual_streams != virtual_streams:
            raise InputError(
                f"the recorded data position has {state.virtual_streams} virtual streams, the recipe {virtual_streams}; "
                f"set data.virtual_streams={state.virtual_streams}"
            )
        own = range(dp_rank, virtual_streams, dp_size)
        if missing := [stream for stream in own if stream not in state.positions]:
            raise InputError(f"the recorded data position lacks the streams {missing}: merge the states of all data-parallel ranks")
        self.packer, self.plan = packer, plan
        self._dp_rank, self._dp_size, self._num_workers = dp_rank, dp_size, num_workers
        self._micro_rows, self.micro_batches = micro_rows, micro_batches
        self._damaged_samples, self._pinned = damaged_samples, pinned
        self._start = dataclasses.replace(state, positions={stream: state.positions[stream] for stream in own})

    def ring(self, steps: int) -> Ring:
        """Memory for the micro-batches of ``steps`` steps."""
        return Ring(self.packer.layout(self._micro_rows), steps * self.micro_batches, self._pinned)

    def __iter__(self) -> Iterator[StepRows]:
        planned: deque[_PlannedStep] = deque()
        rows = self._planned_rows(planned)
        packed = self.packer.pack_all(rows, self._micro_rows, self._num_workers, self.micro_batches, self._pinned)
        read = skipped = 0
        while True:
            micro_batches = tuple(next(packed) for _ in range(self.micro_batches))
            step = planned.popleft()
            here = StepRows(micro_batches, step.row_numbers, step.fill, step.state)
            read += sum(len(row) for one in micro_batches for row in one.keys)
            skipped += len(here.skipped)
            for sample in here.skipped:
                logger.warning("sample number %d is left out: %s", sample.number, sample.reason)
            if skipped > self._damaged_samples * max(read + skipped, _FEW_SAMPLES):
                raise WorkError(
                    f"{skipped} of {read + skipped} samples could not be read, the last one: {here.skipped[-1].reason}; build their "
                    f"shards again, or raise data.damaged_samples={self._damaged_samples} to go on without them"
                )
            yield here

    def _planned_rows(self, planned: deque[_PlannedStep]) -> Iterator[list[Address]]:
        """The rank's micro-batches; with the last one of a step, the step goes to ``planned``."""
        positions = dict(self._start.positions)
        windows = _Windows(self.plan, self._start.virtual_streams)
        row_number = self._start.row
        while True:
            rows: list[Address] = []
            demand = np.zeros(len(RESOURCES), np.int64)
            first = row_number + (self._dp_rank - row_number) % self._dp_size
            row_number += self._micro_rows * self.micro_batches * self._dp_size
            numbers = tuple(range(first, row_number, self._dp_size))
            for number in numbers:
                stream = number % self._start.virtual_streams
                window, row = positions[stream]
                samples, last = windows.row(window, row)
                positions[stream] = (window + self._start.virtual_streams, 0) if last else (window, row + 1)
                played = self.plan.played(window, samples)
                demand += played.demands.sum(0)
                rows.append(Address(window, samples, played.speeds))
                if number == numbers[-1]:
                    state = dataclasses.replace(self._start, row=row_number, positions=dict(positions))
                    planned.append(_PlannedStep(numbers, Fill.of(demand, self.plan.shape, len(rows)), state))
                if len(rows) % self._micro_rows == 0:
                    yield rows[-self._micro_rows :]


class _Windows:
    """One window per stream in memory, and from the middle of it on the next one, planned in a thread."""

    def __init__(self, plan: Plan, step: int) -> None:
        """``step``: from a window of a stream to its next."""
        self._plan, self._step = plan, step
        self._here: dict[int, list[np.ndarray]] = {}
        self._coming: dict[int, Future[list[np.ndarray]]] = {}
        self._thread = ThreadPoolExecutor(1, "planning")

    def row(self, window: int, row: int) -> tuple[np.ndarray, bool]:
        """Row ``row`` of ``window``, and whether it is the last one; then the window is forgotten."""
        if window not in self._here:
            coming = self._coming.pop(window, None)
            self._here[window] = self._plan.window(window) if coming is None else coming.result()
        rows = self._here[window]
        if 2 * row >= len(rows) and (after := window + self._step) not in self._coming:
            self._coming[after] = self._thread.submit(self._plan.window, after)
        if last := row + 1 == len(rows):
            del self._here[window]
        return rows[row], last


def evaluation_batches(
    packer: RowPacker, demands: Demands, *, dp_rank: int, dp_size: int, micro_rows: int, num_workers: int = 0
) -> Iterator[PackedRows]:
    """Every sample once over all ranks; each rank gets as many batches as the others, the last rows empty where needed.

    With workers, a batch stays as it is until the one after the next is taken.

    Raises:
        InputError: a sample that no row holds.
    """
    require_fit(demands.table, packer.shape, lambda number: packer.samples.sample(number).id)
    plan = RowPlan(demands.table, packer.shape, seed=0)
    rows = [Address(window, row) for window in range(plan.windows_per_epoch) for row in plan.window(window)]
    batches = -(-len(rows) // (micro_rows * dp_size))
    rows += [Address(0, np.empty(0, np.int64))] * (batches * micro_rows * dp_size - len(rows))
    mine = rows[dp_rank::dp_size]
    starts = range(0, len(mine), micro_rows)
    yield from packer.pack_all((mine[start : start + micro_rows] for start in starts), micro_rows, num_workers)
