"""Mixtures: exact shares in every window, no sample favoured; long samples refused, dropped or split by name."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_omni.config.model import CodecConfig
from megatron_omni.config.recipe import MixtureConfig
from megatron_omni.data.render import demand, render
from megatron_omni.data.rows.demands import Demands, measure_one
from megatron_omni.data.rows.mixture import Mixture, Span, Stratum
from megatron_omni.data.rows.plan import RowPlan
from megatron_omni.data.rows.selection import SplitSamples, _mixture, select
from megatron_omni.runtime.errors import InputError
from megatron_omni.schema import TASKS, Message, Part, RowShape, Sample, SampleArrays

NOTHING = np.empty(0, np.int64)
FOLDERS = [("a", 600), ("b", 300), ("c", 100)]
SHAPE = RowShape(seq=256, codec=64, encoder=64, spoken=64, supervised=128)


def demands_of(counts: int, seed: int = 0) -> Demands:
    random = np.random.default_rng(seed)
    table = np.zeros((counts, 5), np.int32)
    table[:, 0] = random.integers(5, 60, counts)
    return Demands(table, 0, random.integers(0, 3, counts).astype(np.int32))


def mixed(**settings: object) -> tuple[Mixture, Demands]:
    demands = demands_of(1000)
    return _mixture(FOLDERS, demands, MixtureConfig.model_validate(settings), NOTHING, NOTHING), demands


def tokens_by_folder(mixture: Mixture, demands: Demands, windows: int, ordinals: range) -> np.ndarray:
    drawn = np.concatenate([mixture.drawn(0, windows, ordinal) for ordinal in ordinals])
    ends = np.cumsum([size for _, size in FOLDERS])
    return np.bincount(np.searchsorted(ends, drawn, side="right"), demands.table[drawn, 0], minlength=3)


@settings(max_examples=50, deadline=None)
@given(start=st.integers(0, 20), size=st.integers(1, 40), seed=st.integers(0, 1000))
def test_a_span_counts_what_is_left(start: int, size: int, seed: int) -> None:
    every = np.arange(start, start + size)
    without = every[np.random.default_rng(seed).random(size) < 0.4]
    span = Span(start, start + size, without)
    assert span[np.arange(len(span))].tolist() == np.setdiff1d(every, without).tolist()


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 50), draws=st.integers(1, 170), windows=st.integers(1, 9), seed=st.integers(0, 99))
def test_draws_favour_no_sample_and_fill_every_window_alike(size: int, draws: int, windows: int, seed: int) -> None:
    stratum = Stratum("k", "k", np.arange(100, 100 + size), draws, np.zeros(5, np.int64))
    per_window = [stratum.drawn(seed, windows, ordinal) for ordinal in range(3 * windows)]
    assert {len(drawn) for drawn in per_window} <= {draws // windows, draws // windows + 1}
    seen = Counter(np.concatenate(per_window).tolist())
    assert sum(seen.values()) == 3 * draws
    counts = [seen[number] for number in range(100, 100 + size)]
    assert max(counts) - min(counts) <= 1


def test_without_a_mixture_every_sample_is_drawn_once_an_epoch() -> None:
    mixture, _ = mixed()
    assert mixture.fingerprint == ""
    assert len(mixture.strata) == 1
    for epoch in range(2):
        drawn = np.concatenate([mixture.drawn(3, 7, epoch * 7 + window) for window in range(7)])
        assert sorted(drawn.tolist()) == list(range(1000))


def test_amounts_by_epochs_are_passes() -> None:
    mixture, _ = mixed(datasets={"b": 2, "c": 0.5})
    drawn = np.concatenate([mixture.drawn(0, 4, window) for window in range(8)])  # two epochs
    counts = np.bincount(drawn, minlength=1000)
    assert (counts[:600] == 2).all()
    assert (counts[600:900] == 4).all()
    assert (counts[900:] == 1).all()
    assert [(share.name, share.passes) for share in mixture.shares()] == [("a", 1), ("b", 2), ("c", 0.5)]


def test_amounts_by_tokens_are_shares_in_every_window() -> None:
    mixture, demands = mixed(by="tokens", datasets={"a": 5e9, "b": 3e9, "c": 2e9})
    assert [share.tokens for share in mixture.shares()] == pytest.approx([0.5, 0.3, 0.2], abs=0.002)
    tokens = tokens_by_folder(mixture, demands, 5, range(50))
    assert (tokens / tokens.sum()).tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.005)
    one = tokens_by_folder(mixture, demands, 5, range(7, 8))
    assert (one / one.sum()).tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.05)
    assert mixture.demand[0] == pytest.approx(demands.total[0], rel=0.01)  # an epoch stays as long


def test_tasks_are_weighed_within_every_data_set() -> None:
    first, second, third = TASKS[:3]
    mixture, demands = mixed(tasks={first: 3, third: 0})
    assert demands.tasks is not None
    drawn = np.concatenate([mixture.drawn(0, 6, window) for window in range(6)])
    counts = np.bincount(drawn, minlength=1000)
    assert (counts[demands.tasks == 0] == 3).all()
    assert (counts[demands.tasks == 1] == 1).all()
    assert (counts[demands.tasks == 2] == 0).all()
    assert {share.name for share in mixture.shares()} == {f"{name}:{task}" for name in "abc" for task in (first, second)}
    by_tokens, _ = mixed(by="tokens", tasks={first: 3, third: 0}, datasets={"a": 1, "b": 1, "c": 0})
    shares = {share.name: share.tokens for share in by_tokens.shares()}
    assert shares[f"a:{first}"] + shares[f"a:{second}"] == pytest.approx(0.5, abs=0.01)


def test_temperature_evens_out() -> None:
    even, demands = mixed(temperature=1e9)
    assert [share.tokens for share in even.shares()] == pytest.approx([1 / 3] * 3, abs=0.002)
    root, _ = mixed(temperature=2)
    sizes = np.array([demands.table[:600, 0].sum(), demands.table[600:900, 0].sum(), demands.table[900:, 0].sum()]) ** 0.5
    assert [share.tokens for share in root.shares()] == pytest.approx((sizes / sizes.sum()).tolist(), abs=0.003)


def test_a_mixture_is_part_of_the_plan_and_says_what_is_wrong() -> None:
    assert len({mixed(datasets={"b": amount})[0].fingerprint for amount in (1.5, 2, 3)}) == 3
    assert mixed(datasets={"b": 2})[0].fingerprint == mixed(datasets={"b": 2})[0].fingerprint
    with pytest.raises(InputError, match=r"names bb, which data\.train does not: it has a, b, c; did you mean b\?"):
        mixed(datasets={"bb": 2})
    with pytest.raises(InputError, match="leaves no samples"):
        mixed(datasets={"a": 0, "b": 0, "c": 0})


def test_rows_of_a_mixture_hold_it_and_fit() -> None:
    mixture, demands = mixed(by="tokens", datasets={"a": 1, "b": 1, "c": 1})
    plan = RowPlan(demands.table, SHAPE, seed=1, window_rows=16, mixture=mixture)
    assert plan.windows_per_epoch > 3
    rows = [row for ordinal in range(plan.windows_per_epoch) for row in plan.window(ordinal)]
    assert sum(map(len, rows)) == sum(stratum.draws for stratum in mixture.strata)
    assert all(demands.table[row, 0].sum() <= SHAPE.seq for row in rows)
    again = RowPlan(demands.table, SHAPE, seed=1, window_rows=16, mixture=mixture)
    assert [row.tolist() for row in again.window(9)] == [row.tolist() for row in plan.window(9)]


# --------------------------------------------------------------------------- long samples


@dataclass(frozen=True)
class Talks:
    """Conversations of 1, 2, 3, ... exchanges, each with a clip; the arrays tell which exchange they belong to."""

    size: int
    codec: CodecConfig | None = CodecConfig(num_codebooks=2, card=64, frame_rate=12.5, sample_rate=24000)
    fingerprint = "talks"

    def __len__(self) -> int:
        return self.size

    def sample(self, number: int) -> Sample:
        messages = [Message("system", (Part("text", "be kind"),))]
        for turn in range(number + 1):
            messages.append(Message("user", (Part("audio", f"audio{turn}"),)))
            messages.append(Message("assistant", (Part("text", "today"), Part("codes", f"codes{turn}"))))
        lengths = {f"audio{turn}": 4000 for turn in range(number + 1)}
        return Sample(f"talk{number}", "converse", "test", tuple(messages), lengths, {f"codes{turn}": 3 for turn in range(number + 1)})

    def arrays(self, number: int) -> SampleArrays:
        sample = self.sample(number)
        return SampleArrays(
            {name: np.full(size, int(name[5:]), np.float32) for name, size in sample.num_samples.items()},
            {name: np.full((2, size), int(name[5:]), np.uint16) for name, size in sample.num_frames.items()},
        )


def measured(samples: Talks, tokenizer, geometry) -> Demands:
    rows = [measure_one(samples.sample(number), tokenizer, geometry, 0) for number in range(len(samples))]
    return Demands(np.array(rows, np.int32), 16)


def test_long_samples_are_refused_dropped_or_split(tokenizer, geometry, caplog: pytest.LogCaptureFixture) -> None:
    talks = Talks(6)
    demands = measured(talks, tokenizer, geometry)
    shape = RowShape(*(demands.table[1] + [0, 0, 0, 0, 0]).tolist())  # two exchanges
    arguments = (talks, demands, shape, tokenizer, geometry, 0)
    with pytest.raises(InputError, match=r"4 of 6 samples .*talk2 .*talk5 .*data\.long_samples"):
        select(*arguments)
    dropped = select(*arguments, "drop")
    assert dropped.dropped.tolist() == [2, 3, 4, 5]
    assert "talk5" in caplog.text and "data.long_samples=drop" in caplog.text
    assert sorted(np.concatenate(RowPlan(demands.table, shape, 0, 512, dropped.mixture).window(0)).tolist()) == [0, 1]

    split = select(*arguments, "split")
    assert isinstance(split.samples, SplitSamples)
    assert split.split.tolist() == [2, 3, 4, 5]
    drawn = np.concatenate(RowPlan(split.demands.table, shape, 0, 512, split.mixture).window(0))
    heard: Counter[tuple[str, str]] = Counter()
    for number in drawn.tolist():
        part, arrays = split.samples.sample(number), split.samples.arrays(number)
        assert part.messages[0].role == "system"
        assert set(arrays.audio) == set(part.num_samples) and set(arrays.codes) == set(part.num_frames)
        heard.update((part.id.partition("#")[0], name) for name in arrays.audio)
        rendered = render(part, tokenizer, geometry)
        need = dataclasses.astuple(demand(part, rendered, geometry, 0))
        assert list(need) == split.demands.table[number].tolist()
    assert heard == Counter((f"talk{number}", f"audio{turn}") for number in range(6) for turn in range(number + 1))

    with pytest.raises(InputError, match=r"talk0: the exchange that begins with message 1 of 3 alone does not fit"):
        select(talks, demands, dataclasses.replace(shape, seq=10), tokenizer, geometry, 0, "split")
