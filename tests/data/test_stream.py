"""The stream: the same global rows whatever the ranks, workers and stops; nothing lost, nothing repeated."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import xxhash

from megatron_omni.audio.features import LogMel
from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.data.render import demand, render
from megatron_omni.data.rows.demands import Demands, measure, plan_fingerprint
from megatron_omni.data.rows.packer import PackedRows, RowPacker
from megatron_omni.data.rows.plan import PlanFingerprint, RowPlan
from megatron_omni.data.rows.stream import RowStream, StepRows, StreamState, evaluation_batches
from megatron_omni.data.tokenizer import OmniTokenizer
from megatron_omni.runtime.errors import InputError, WorkError
from megatron_omni.schema import Batch, RowShape

SHAPE = RowShape(seq=160, codec=96, encoder=320, spoken=64, supervised=128)
WINDOW_ROWS = 4
V, GLOBAL_ROWS = 4, 12


@pytest.fixture(scope="module")
def packer(memory_samples, tokenizer: OmniTokenizer, geometry: EncoderGeometry, log_mel: LogMel) -> RowPacker:
    samples = memory_samples(90)
    return RowPacker(samples, tokenizer, geometry, log_mel, samples.codec, SHAPE, acoustic_delay=1)


@pytest.fixture(scope="module")
def demands(packer: RowPacker, tmp_path_factory: pytest.TempPathFactory) -> Demands:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return measure(packer.samples, packer.tokenizer, packer.geometry, packer.acoustic_delay)


def with_tp(packer: RowPacker, demands: Demands, tp: int) -> RowPacker:
    parts = (packer.samples, packer.tokenizer, packer.geometry, packer.log_mel, packer.codec, packer.shape, packer.acoustic_delay)
    return RowPacker(*parts, tp, demands.longest_clip)


def fingerprint(packer: RowPacker, seed: int = 0) -> PlanFingerprint:
    return plan_fingerprint(packer.samples, packer.tokenizer, packer.geometry, packer.shape, packer.acoustic_delay, seed, WINDOW_ROWS)


def stream(packer: RowPacker, demands: Demands, rank: int = 0, size: int = 1, workers: int = 0, seed: int = 0, **changes) -> RowStream:
    options = dict(virtual_streams=V, micro_rows=GLOBAL_ROWS // size // 2, micro_batches=2)
    plan = RowPlan(demands.table, packer.shape, seed, WINDOW_ROWS)
    place = dict(dp_rank=rank, dp_size=size, num_workers=workers)
    return RowStream(packer, plan, fingerprint(packer, seed), **place, **{**options, **changes})


@dataclasses.dataclass(frozen=True)
class World:
    """How the same stream may be spread out."""

    data: int
    workers: int
    tensor: int


def run(
    packer: RowPacker, demands: Demands, world: World, steps: int, state: StreamState | None
) -> tuple[dict[int, tuple[object, ...]], StreamState]:
    """All ranks of a world, in this process: the global rows they see by number, and the merged state after ``steps`` steps.

    A row is its sample ids and its tensors; of the encoder's rows, which tensor parallelism deals out, their sum.
    """
    rows: dict[int, tuple[object, ...]] = {}
    states = []
    share = GLOBAL_ROWS // world.data
    micro = share // 2 if share % 2 == 0 else share
    for rank in range(world.data):
        place = dict(virtual_streams=GLOBAL_ROWS, micro_rows=micro, micro_batches=share // micro)
        own = stream(with_tp(packer, demands, world.tensor), demands, rank, world.data, world.workers, state=state, **place)
        step: StepRows | None = None
        for step in itertools.islice(own, steps):
            seen = [row for packed in step.micro_batches for row in contents(packed, micro)]
            assert len(seen) == share
            assert not rows.keys() & set(step.row_numbers)
            rows |= dict(zip(step.row_numbers, seen, strict=True))
        assert step is not None
        states.append(step.state)
    merged = StreamState.merge(states)
    return rows, StreamState.from_json(json.loads(json.dumps(merged.to_json())))


def contents(packed: PackedRows, micro: int) -> Iterator[tuple[object, ...]]:
    """Of each row: ids, a hash of the tensors that do not depend on tensor parallelism, and what it hears."""
    batch = packed.batch
    for row, keys in enumerate(packed.keys):
        hashes = xxhash.xxh3_128()
        for name, tensor in vars(batch).items():
            if name.endswith(("_BT", "_BU", "_BS", "_BF", "_BKF")) and name != "audio_source_BT":
                hashes.update(tensor[row].numpy().tobytes())
        heard = (batch.mel_RAM[row::micro].double().sum().item(), int(batch.mel_valid_RA[row::micro].sum()))
        yield keys, hashes.hexdigest(), round(heard[0], 6), heard[1], int((batch.audio_source_BT[row] > 0).sum())


@pytest.fixture(scope="module")
def reference(packer: RowPacker, demands: Demands) -> dict[int, tuple[object, ...]]:
    return run(packer, demands, World(1, 0, 1), STOPS.stop + AFTER, None)[0]


STOPS, AFTER = range(1, 12), 2
WORLDS = [World(*place) for place in itertools.product([1, 2, 3, 4, 6], [0, 1, 2, 3], [1, 2])]
PAIRS = np.random.default_rng(0).permutation(len(WORLDS) ** 2)[:200].tolist()
"""Of all ordered pairs."""


def check_pair(pair: int, packer: RowPacker, demands: Demands, reference: dict[int, tuple[object, ...]]) -> None:
    here, there = WORLDS[pair // len(WORLDS)], WORLDS[pair % len(WORLDS)]
    stop = int(np.random.default_rng(pair).integers(STOPS.start, STOPS.stop))
    before, state = run(packer, demands, here, stop, None)
    assert state.row == stop * GLOBAL_ROWS
    after, _ = run(packer, demands, there, AFTER, state)
    assert before == {number: reference[number] for number in range(stop * GLOBAL_ROWS)}, here
    assert after == {number: reference[number] for number in range(stop * GLOBAL_ROWS, (stop + AFTER) * GLOBAL_ROWS)}, (here, there)


@pytest.mark.parametrize("pair", PAIRS[:12])
def test_order_and_resume_on_another_world(pair: int, packer: RowPacker, demands: Demands, reference: dict) -> None:
    check_pair(pair, packer, demands, reference)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_order_and_resume_over_the_whole_grid(packer: RowPacker, demands: Demands, reference: dict) -> None:
    for pair in PAIRS:
        check_pair(pair, packer, demands, reference)


def test_an_epoch_has_every_sample_once(packer: RowPacker, demands: Demands) -> None:
    one = stream(packer, demands, virtual_streams=1, micro_rows=1, micro_batches=1)
    windows = one.plan.windows_per_epoch
    assert windows > 2
    rows = sum(len(one.plan.window(window)) for window in range(windows))
    seen = Counter(key for step in itertools.islice(one, rows) for packed in step.micro_batches for row in packed.keys for key in row)
    assert seen == Counter(f"s{number}" for number in range(90))


def test_streams_walk_their_windows_without_loss_or_repetition(packer: RowPacker, demands: Demands) -> None:
    """Whatever the step: what the streams have passed are exactly the rows of whole windows and of the begun ones."""
    own = stream(packer, demands)
    seen: Counter[str] = Counter()
    for step in itertools.islice(own, 15):
        seen.update(key for packed in step.micro_batches for row in packed.keys for key in row)
        passed: Counter[str] = Counter()
        for number, (window, row) in step.state.positions.items():
            for earlier in range(number, window, V):
                passed.update(f"s{sample}" for sample in np.concatenate(own.plan.window(earlier)))
            passed.update(f"s{sample}" for begun in own.plan.window(window)[:row] for sample in begun)
        assert seen == passed


def test_batches_are_equal_with_and_without_workers(packer: RowPacker, demands: Demands) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    for alone, helped in itertools.islice(zip(stream(packer, demands), stream(packer, demands, workers=2), strict=True), 3):
        assert alone.state == helped.state
        assert alone.fill == helped.fill
        for left, right in zip(alone.micro_batches, helped.micro_batches, strict=True):
            for field in dataclasses.fields(Batch):
                assert torch.equal(getattr(left.batch, field.name), getattr(right.batch, field.name)), field.name
    assert torch.equal(torch.rand(1), expected)  # the stream leaves the global generator alone


def test_the_state_is_small_and_says_what_differs(packer: RowPacker, demands: Demands) -> None:
    own = stream(packer, demands)
    state = next(iter(own)).state
    with pytest.raises(InputError, match=r"recorded data position .*seed: 0 there, 1 now"):
        stream(packer, demands, seed=1, state=state)
    with pytest.raises(InputError, match=r"data\.virtual_streams=4"):
        stream(packer, demands, virtual_streams=8, state=state)
    part = next(iter(stream(packer, demands, 0, 2))).state
    with pytest.raises(InputError, match=r"lacks the streams \[1, 3\]: merge"):
        stream(packer, demands, 1, 2, state=part)
    with pytest.raises(InputError, match="different steps"):
        StreamState.merge([state, dataclasses.replace(state, row=99)])
    large = StreamState.start(fingerprint(packer), 64).to_json()
    large["positions"] = {str(number): [10**9 + number, 9999] for number in range(64)}  # 10**9 windows are 10**12 rows
    assert len(json.dumps(large["positions"], separators=(",", ":"))) <= 32 * 64
    assert len(json.dumps(large)) <= 4096


def test_refusals(packer: RowPacker, demands: Demands, memory_samples) -> None:
    with pytest.raises(InputError, match=r"size of 3 does not divide data\.virtual_streams=4; choose one of \[1, 2, 4\]"):
        stream(packer, demands, size=3)
    tiny = with_tp(packer, demands, 1)
    tiny.shape = dataclasses.replace(SHAPE, codec=8)
    with pytest.raises(InputError, match=r"do not fit into a row.*s\d+ \(codec \d+\)"):
        next(evaluation_batches(tiny, demands, dp_rank=0, dp_size=1, micro_rows=1))
    nothing = with_tp(packer, demands, 1)
    nothing.samples = memory_samples(0)
    with pytest.raises(InputError, match="hold no samples"):
        stream(nothing, Demands(demands.table[:0], 0))


def test_measuring_is_cached_by_what_it_depends_on(packer: RowPacker, monkeypatch: pytest.MonkeyPatch, tmp_path, memory_samples) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small = memory_samples(5)
    first = measure(small, packer.tokenizer, packer.geometry, 1)
    sample = small.sample(3)
    expected = demand(sample, render(sample, packer.tokenizer, packer.geometry), packer.geometry, 1)
    assert first.table[3].tolist() == list(dataclasses.astuple(expected))
    monkeypatch.setattr(type(small), "sample", None)  # from here on only the cache can answer
    again = measure(small, packer.tokenizer, packer.geometry, 1)
    assert again.table.tolist() == first.table.tolist()
    assert again.longest_clip == first.longest_clip
    with pytest.raises(TypeError):
        measure(small, packer.tokenizer, packer.geometry, 2)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_evaluation_sees_each_sample_once_in_equal_numbers_of_batches(size: int, packer: RowPacker, demands: Demands) -> None:
    ranks = [list(evaluation_batches(packer, demands, dp_rank=rank, dp_size=size, micro_rows=2)) for rank in range(size)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = Counter(key for batches in ranks for packed in batches for row in packed.keys for key in row)
    assert seen == Counter(f"s{number}" for number in range(90))
    assert len({packed.batch.tokens_BT.shape for batches in ranks for packed in batches}) == 1


def test_workers_outlive_the_signals_of_a_shutdown_but_not_their_stream(packer: RowPacker, demands: Demands) -> None:
    steps = iter(stream(packer, demands, workers=1))
    next(steps)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid, number)
    expected = itertools.islice(stream(packer, demands), 1, 8)
    assert [step.row_numbers for step in itertools.islice(steps, 7)] == [step.row_numbers for step in expected]
    assert worker.is_alive()
    steps.close()
    worker.join(10)
    assert not worker.is_alive()


@dataclasses.dataclass(frozen=True)
class Damaged:
    """``base``, some of whose samples cannot be read."""

    base: object
    bad: frozenset[int]

    def __getattr__(self, name: str) -> object:
        return getattr(self.base, name)

    def __len__(self) -> int:
        return len(self.base)

    def sample(self, number: int):
        return self.base.sample(number)

    def arrays(self, number: int):
        if number in self.bad:
            raise WorkError(f"shard-000001.tar: s{number}.audio0.flac at offset 512: damaged")
        return self.base.arrays(number)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_sample_leaves_a_hole_and_changes_nothing_else(workers: int, packer: RowPacker, demands: Demands) -> None:
    bad = frozenset({5, 17, 60})
    damaged = with_tp(packer, demands, 1)
    damaged.samples, damaged.skip_damaged = Damaged(packer.samples, bad), True
    holes = []
    both = zip(stream(packer, demands), stream(damaged, demands, workers=workers, damaged_samples=0.01), strict=True)
    for whole, holed in itertools.islice(both, 10):
        assert (whole.state, whole.row_numbers, whole.fill) == (holed.state, holed.row_numbers, holed.fill)
        for left, right in zip(whole.micro_batches, holed.micro_batches, strict=True):
            names = [f"s{number}" for number in bad]
            assert right.keys == tuple(tuple(key for key in row if key not in names) for row in left.keys)
            missing = [key for row in left.keys for key in row if key in names]
            assert [f"s{sample.number}" for sample in right.skipped] == missing
            if not missing:
                assert torch.equal(left.batch.tokens_BT, right.batch.tokens_BT)
        holes += holed.skipped
    assert len(holes) >= 3
    assert all("at offset 512: damaged" in hole.reason for hole in holes)


def test_too_many_damaged_samples_end_the_run_by_name(packer: RowPacker, demands: Demands) -> None:
    damaged = with_tp(packer, demands, 1)
    damaged.samples, damaged.skip_damaged = Damaged(packer.samples, frozenset(range(30))), True
    with pytest.raises(WorkError, match=r"samples could not be read, the last one: shard-000001.*raise data\.damaged_samples=0\.001"):
        for _ in stream(damaged, demands, damaged_samples=0.001):
            pass
    with pytest.raises(WorkError, match=r"\d+ of \d+ samples could not be read"):
        for _ in stream(damaged, demands):
            pass
    damaged.skip_damaged = False  # as in evaluation
    with pytest.raises(WorkError, match=r"s\d+\.audio0\.flac at offset 512"):
        list(evaluation_batches(damaged, demands, dp_rank=0, dp_size=1, micro_rows=2, num_workers=1))
