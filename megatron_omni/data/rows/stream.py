"""The training stream: plan -> rows -> micro-batches, the same rows in the same order on any number of ranks and workers.

1. Windows of the plan, counted across epochs, belong to ``V`` virtual streams in turn: window ``w`` to stream ``w % V``.
   A stream is the rows of its windows, one after another.
2. Global row ``n`` is the next row of stream ``n % V``. Step ``t`` takes the next ``G`` global rows.
3. Data-parallel rank ``r`` of ``D`` takes the rows with ``n % D == r``. ``D`` divides ``V``, so these are whole
   streams, and a rank plans its own only.
4. Planning runs in the rank's process, ahead of the workers; reading, features and collation run in workers.

The position after a step is two integers per stream. Ranks of one tensor-parallel group build equal streams.
"""

from __future__ import annotations

import dataclasses
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron_omni.audio.features import LogMel
from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.config.model import CodecConfig
from megatron_omni.data.render import render
from megatron_omni.data.rows.augment import Augmentation
from megatron_omni.data.rows.collate import Distort, Packed, collate
from megatron_omni.data.rows.demands import Demands, Samples, plan_fingerprint
from megatron_omni.data.rows.plan import WINDOW_ROWS, Fill, PlanFingerprint, RowPlan, require_fit
from megatron_omni.data.tokenizer import OmniTokenizer
from megatron_omni.runtime.errors import InputError
from megatron_omni.schema import Batch, RowShape


class Address(NamedTuple):
    """One row of the plan."""

    window: int
    samples: np.ndarray
    """int64: sample numbers."""


@dataclass(frozen=True)
class PackedRows:
    """One micro-batch."""

    batch: Batch
    keys: tuple[tuple[str, ...], ...]
    """Sample ids by row."""


class RowPacker(Dataset[PackedRows]):
    """Sample numbers in, tensors out: all the work of a data worker. ``packer[rows]`` packs one micro-batch."""

    def __init__(
        self,
        samples: Samples,
        tokenizer: OmniTokenizer,
        geometry: EncoderGeometry,
        log_mel: LogMel,
        codec: CodecConfig,
        shape: RowShape,
        acoustic_delay: int,
        tensor_parallel: int = 1,
        longest_clip: int | None = None,
        augmentation: Augmentation | None = None,
    ) -> None:
        """See ``collate`` for ``tensor_parallel`` and ``longest_clip``."""
        self.samples, self.tokenizer, self.geometry, self.log_mel, self.codec = samples, tokenizer, geometry, log_mel, codec
        self.shape, self.acoustic_delay, self.tensor_parallel, self.longest_clip = shape, acoustic_delay, tensor_parallel, longest_clip
        self.augmentation = augmentation

    def __getitem__(self, rows: Sequence[Address]) -> PackedRows:
        packed = [[self._load(row.window, number) for number in row.samples.tolist()] for row in rows]
        batch = collate(
            packed,
            self.shape,
            self.geometry,
            self.log_mel,
            self.codec,
            self.acoustic_delay,
            self.tokenizer.pad_id,
            self.tensor_parallel,
            self.longest_clip,
            self._distort(rows),
        )
        return PackedRows(batch, tuple(tuple(sample.id for sample, _, _ in row) for row in packed))

    def _load(self, window: int, number: int) -> Packed:
        sample, arrays = self.samples.sample(number), self.samples.arrays(number)
        if self.augmentation is not None:
            clips = self.augmentation.of(window, sample.id)
            arrays = dataclasses.replace(arrays, audio={name: clips.wave(name, wave) for name, wave in arrays.audio.items()})
        return sample, render(sample, self.tokenizer, self.geometry), arrays

    def _distort(self, rows: Sequence[Address]) -> Distort | None:
        if (augmentation := self.augmentation) is None:
            return None
        return lambda row, sample, name, mel_AM: augmentation.of(rows[row].window, sample.id).mel(name, mel_AM)

    def fingerprint(self, seed: int, window_rows: int = WINDOW_ROWS) -> PlanFingerprint:
        return plan_fingerprint(self.samples, self.tokenizer, self.geometry, self.shape, self.acoustic_delay, seed, window_rows)


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
    row_numbers: tuple[int, ...]
    """Global numbers of its rows, in their order."""
    fill: Fill
    """Of its rows."""
    state: StreamState
    """After the step."""


@dataclass(frozen=True)
class _PlannedStep:
    micro_batches: list[list[Address]]
    row_numbers: tuple[int, ...]
    fill: Fill
    state: StreamState


class RowStream:
    """Iterates over the steps of one rank, without end; ``iter`` starts at ``state``."""

    def __init__(
        self,
        packer: RowPacker,
        demands: Demands,
        *,
        seed: int,
        virtual_streams: int,
        dp_rank: int,
        dp_size: int,
        micro_rows: int,
        micro_batches: int,
        num_workers: int = 0,
        window_rows: int = WINDOW_ROWS,
        state: StreamState | None = None,
    ) -> None:
        """A step has ``micro_rows * micro_batches * dp_size`` global rows.

        Raises:
            InputError: no samples; a sample that no row holds; ``dp_size`` does not divide ``virtual_streams``; or a
                state of another plan, or of some ranks only.
        """
        if len(packer.samples) == 0:
            raise InputError("the training data hold no samples")
        if virtual_streams % dp_size:
            choices = [size for size in range(1, virtual_streams + 1) if virtual_streams % size == 0]
            raise InputError(
                f"a data-parallel size of {dp_size} does not divide data.virtual_streams={virtual_streams}; choose one of {choices}"
            )
        require_fit(demands.table, packer.shape, lambda number: packer.samples.sample(number).id)
        fingerprint = packer.fingerprint(seed, window_rows)
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
        self.packer = packer
        self.plan = RowPlan(demands.table, packer.shape, seed, window_rows)
        self._dp_rank, self._dp_size, self._num_workers = dp_rank, dp_size, num_workers
        self._micro_rows, self._micro_batches = micro_rows, micro_batches
        self._start = dataclasses.replace(state, positions={stream: state.positions[stream] for stream in own})

    def __iter__(self) -> Iterator[StepRows]:
        planned: deque[_PlannedStep] = deque()

        def addresses() -> Iterator[list[Address]]:
            for step in self._plan_steps():
                planned.append(step)
                yield from step.micro_batches

        packed = iter(_loader(self.packer, addresses(), self._num_workers))
        while True:
            micro_batches = tuple(next(packed) for _ in range(self._micro_batches))
            step = planned.popleft()
            yield StepRows(micro_batches, step.row_numbers, step.fill, step.state)

    def _plan_steps(self) -> Iterator[_PlannedStep]:
        """The rank's rows, step after step; holds one window per stream in memory."""
        positions = dict(self._start.positions)
        windows: dict[int, list[np.ndarray]] = {}
        row_number = self._start.row
        while True:
            rows = []
            first = row_number + (self._dp_rank - row_number) % self._dp_size
            row_number += self._micro_rows * self._micro_batches * self._dp_size
            numbers = range(first, row_number, self._dp_size)
            for number in numbers:
                stream = number % self._start.virtual_streams
                window, row = positions[stream]
                if stream not in windows:
                    windows[stream] = self.plan.window(window)
                rows.append(Address(window, windows[stream][row]))
                if row + 1 < len(windows[stream]):
                    positions[stream] = (window, row + 1)
                else:
                    positions[stream] = (window + self._start.virtual_streams, 0)
                    del windows[stream]
            demand = self.plan.demands[np.concatenate([row.samples for row in rows])].sum(0)
            yield _PlannedStep(
                [rows[start : start + self._micro_rows] for start in range(0, len(rows), self._micro_rows)],
                tuple(numbers),
                Fill.of(demand, self.plan.shape, len(rows)),
                dataclasses.replace(self._start, row=row_number, positions=dict(positions)),
            )


def evaluation_batches(
    packer: RowPacker, demands: Demands, *, dp_rank: int, dp_size: int, micro_rows: int, num_workers: int = 0
) -> Iterator[PackedRows]:
    """Every sample once over all ranks; each rank gets as many batches as the others, the last rows empty where needed.

    Raises:
        InputError: a sample that no row holds.
    """
    require_fit(demands.table, packer.shape, lambda number: packer.samples.sample(number).id)
    plan = RowPlan(demands.table, packer.shape, seed=0)
    rows = [Address(window, row) for window in range(plan.windows_per_epoch) for row in plan.window(window)]
    batches = -(-len(rows) // (micro_rows * dp_size))
    rows += [Address(0, np.empty(0, np.int64))] * (batches * micro_rows * dp_size - len(rows))
    mine = rows[dp_rank::dp_size]
    yield from _loader(packer, [mine[start : start + micro_rows] for start in range(0, len(mine), micro_rows)], num_workers)


def _loader(packer: RowPacker, addresses: Iterable[Sequence[Address]], num_workers: int) -> DataLoader[PackedRows]:
    """One item of ``addresses`` is one item out, in order, whatever the number of workers.

    Workers are forked: they share the data set's memory maps and start at once. They run no GPU code.
    """
    return DataLoader(
        packer,
        sampler=addresses,
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=_quiet_worker,
        generator=torch.Generator().manual_seed(0),  # or it would draw from the global one, and resuming would shift dropout
    )


def _quiet_worker(_: int) -> None:
    """A signal to the process group is the rank's to handle: it finishes its step, and for that it needs its workers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
