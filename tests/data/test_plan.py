"""The planner: every sample once, no row over its capacities, full rows, the same plan everywhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_omni.data.rows.bins import pack
from megatron_omni.data.rows.plan import Fill, PlanFingerprint, RowPlan, capacity, plan_window, require_fit
from megatron_omni.data.rows.saved import SavedPlan
from megatron_omni.runtime.errors import InputError
from megatron_omni.schema import RowShape

SHAPE = RowShape(seq=256, codec=128, encoder=512, spoken=64, supervised=128)
FINGERPRINT = PlanFingerprint("data", "tokenizer", "geometry", "row", acoustic_delay=0, seed=1, window_rows=512)


def random_demands(count: int, seed: int, largest: float = 0.5) -> np.ndarray:
    random = np.random.default_rng(seed)
    demands = (random.random((count, 5)) * largest * capacity(SHAPE)).astype(np.int32)
    demands[random.random(count) < 0.4, 1] = 0
    return demands


def speech_like(count: int, seconds: np.ndarray, seed: int = 0) -> np.ndarray:
    """Transcription of clips of these lengths: 12.5 embeddings and about 3.3 text tokens a second."""
    random = np.random.default_rng(seed)
    text = np.maximum(1, seconds * random.normal(3.3, 0.5, count)).astype(int)
    embeddings = np.ceil(seconds * 12.5).astype(int)
    return np.stack([embeddings + text + 8, 0 * text, 4 * (embeddings + 1), 0 * text, text + 1], 1).astype(np.int32)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 200), seed=st.integers(0, 2**31), largest=st.sampled_from([0.05, 0.3, 1.0]))
def test_rows_hold_every_sample_once_and_never_overflow(count: int, seed: int, largest: float) -> None:
    demands = random_demands(count, seed, largest)
    rows = plan_window(demands, SHAPE)
    assert sorted(np.concatenate([np.empty(0, int), *rows]).tolist()) == list(range(count))
    for row in rows:
        assert (demands[row].sum(0) <= capacity(SHAPE)).all()
        assert len(row) > 0


def test_best_fit_finds_the_perfect_packing() -> None:
    demands = np.zeros((6, 5), np.int32)
    demands[:, 0] = [80, 70, 50, 25, 15, 0]  # 80 + 25 + 15, 70 + 50
    rows = plan_window(demands, dataclasses.replace(SHAPE, seq=120))
    assert sorted(demands[row, 0].sum() for row in rows) == [120, 120]


def test_fill_of_speech_like_lengths() -> None:
    seconds = np.random.default_rng(0).uniform(2, 16, 20_000)
    demands = speech_like(20_000, seconds)
    shape = RowShape(seq=8192, codec=4096, encoder=28672, spoken=2048, supervised=2048)
    rows = RowPlan(demands, shape, seed=0).window(0)
    fill = Fill.of(demands.sum(0), shape, len(rows))
    assert fill.scarcest == "seq"
    assert fill.binding == fill.tokens >= 0.99
    assert fill.codec == 0


def test_any_few_rows_in_a_row_cover_cheap_and_dear_ones() -> None:
    demands = speech_like(5000, np.random.default_rng(0).uniform(0.5, 16, 5000))
    shape = RowShape(seq=1024, codec=64, encoder=4096, spoken=64, supervised=512)
    load = demands / capacity(shape)
    costs = np.array([(load[row, :3] ** 2).sum() for row in plan_window(demands, shape)])
    runs = np.lib.stride_tricks.sliding_window_view(costs.argsort().argsort() / len(costs), 8)
    assert (runs.min(1) < 0.2).all()
    assert (runs.max(1) > 0.8).all()
    assert np.abs(runs.mean(1) - 0.5).max() < 0.1


def test_windows_in_step_meet_rows_of_about_the_same_cost() -> None:
    random = np.random.default_rng(1)
    shape = RowShape(seq=1000, codec=1000, encoder=1000, spoken=1000, supervised=1000)
    ranks = []
    for count in (3000, 3100):
        demands = random.integers(5, 200, (count, 5))
        costs = np.array([((demands[row, :3] / 1000) ** 2).sum() for row in plan_window(demands, shape)])
        ranks.append(costs.argsort().argsort() / len(costs))
    common = min(map(len, ranks))
    assert np.abs(ranks[0][:common] - ranks[1][:common]).max() < 0.05


def test_windows_cut_an_epoch_and_epochs_differ() -> None:
    plan = RowPlan(random_demands(3000, 0), SHAPE, seed=3, window_rows=64)
    assert plan.windows_per_epoch > 3
    orders = []
    for epoch in range(2):
        windows = [plan.window(epoch * plan.windows_per_epoch + number) for number in range(plan.windows_per_epoch)]
        assert all(len(window) >= 64 for window in windows)
        orders.append(np.concatenate([row for window in windows for row in window]))
        assert sorted(orders[-1].tolist()) == list(range(3000))
    assert orders[0].tolist() != orders[1].tolist()
    again = RowPlan(random_demands(3000, 0), SHAPE, seed=3, window_rows=64)
    assert np.concatenate(again.window(5)).tolist() == np.concatenate(plan.window(5)).tolist()
    other = RowPlan(random_demands(3000, 0), SHAPE, seed=4, window_rows=64)
    assert np.concatenate(other.window(5)).tolist() != np.concatenate(plan.window(5)).tolist()


def test_a_small_epoch_is_one_window() -> None:
    plan = RowPlan(random_demands(50, 0), SHAPE, seed=0)
    assert plan.windows_per_epoch == 1
    assert len(np.concatenate(plan.window(7))) == 50


def test_a_sample_too_long_is_refused_by_name() -> None:
    demands = random_demands(10, 0)
    demands[7, 2] = 1000
    with pytest.raises(InputError, match=r"1 of 10 samples .*utt7 \(encoder 1000\).*enlarge the row"):
        require_fit(demands, SHAPE, lambda number: f"utt{number}")
    require_fit(demands[:7], SHAPE, lambda number: f"utt{number}")


@pytest.mark.parametrize(("competing", "fill"), [(1.25, 0.99), (1.05, 0.99), (1.02, 0.99), (1.0, 0.98)])
def test_rows_are_full_where_several_resources_are_scarce(competing: float, fill: float) -> None:
    """Half transcription, half spoken answers; every other resource is provided for almost, or just, as tightly as positions."""
    random = np.random.default_rng(2)
    demands = speech_like(30_000, random.uniform(1, 12, 30_000))
    spoken = random.random(30_000) < 0.5
    demands[spoken, 3] = demands[spoken, 4]
    demands[spoken, 1] = demands[spoken, 4] + (random.uniform(1, 12, spoken.sum()) * 12.5).astype(np.int32)
    limits = np.ceil(8192 * demands.sum(0) / demands[:, 0].sum() * competing).astype(int)
    shape = RowShape(8192, *limits[1:].tolist())
    rows = plan_window(demands, shape)
    assert Fill.of(demands.sum(0), shape, len(rows)).binding >= fill


def test_rows_cost_about_the_same() -> None:
    demands = speech_like(20_000, np.random.default_rng(0).uniform(2, 16, 20_000))
    shape = RowShape(seq=8192, codec=4096, encoder=28672, spoken=2048, supervised=2048)
    costs = np.array([(demands[row, 0].astype(float) ** 2).sum() for row in plan_window(demands, shape)])
    assert costs.std() / costs.mean() < 0.1


def test_few_samples_per_row_are_packed_by_best_fit() -> None:
    """Where dealing cannot fill rows: pairs that only fit with their partner."""
    large = np.random.default_rng(0).integers(501, 900, 300)
    demands = np.zeros((600, 5), np.int32)
    demands[:, 0] = np.concatenate([large, 1000 - large])
    assert len(pack(demands, np.array([1000, 1, 1, 1, 1]))) <= 303


def test_samples_without_any_demand_and_of_whole_rows() -> None:
    demands = np.zeros((5, 5), np.int32)
    assert [len(row) for row in pack(demands, capacity(SHAPE))] == [5]
    whole = np.tile(capacity(SHAPE), (3, 1))
    assert sorted(len(row) for row in pack(np.concatenate([whole, demands]), capacity(SHAPE)))[-1] <= 6
    assert len(pack(whole, capacity(SHAPE))) == 3


def test_a_saved_plan_is_the_lazy_one(tmp_path: Path) -> None:
    lazy = RowPlan(random_demands(2000, 0), SHAPE, seed=0, window_rows=64)
    SavedPlan.compute(lazy, range(1, 3)).save(tmp_path, FINGERPRINT)
    saved = SavedPlan.load(tmp_path, FINGERPRINT, lazy)
    assert len(saved.windows) == 2 * lazy.windows_per_epoch + 1
    forgetful = dataclasses.replace(saved, lazy=dataclasses.replace(lazy, seed=99))
    for ordinal in range(4 * lazy.windows_per_epoch):
        expected = [row.tolist() for row in lazy.window(ordinal)]
        assert [row.tolist() for row in saved.window(ordinal)] == expected
        inside = lazy.windows_per_epoch <= ordinal < 3 * lazy.windows_per_epoch
        assert ([row.tolist() for row in forgetful.window(ordinal)] == expected) == inside  # it was read, not computed


def test_a_foreign_or_damaged_plan_is_refused(tmp_path: Path) -> None:
    lazy = RowPlan(random_demands(20, 0), SHAPE, seed=0)
    with pytest.raises(InputError, match="no row plan in"):
        SavedPlan.load(tmp_path, FINGERPRINT, lazy)
    SavedPlan.compute(lazy, range(1)).save(tmp_path, FINGERPRINT)
    with pytest.raises(InputError, match="seed: 1 there, 2 now"):
        SavedPlan.load(tmp_path, dataclasses.replace(FINGERPRINT, seed=2), lazy)
    with pytest.raises(InputError, match="mixture:  there, abc now"):
        SavedPlan.load(tmp_path, dataclasses.replace(FINGERPRINT, mixture="abc"), lazy)
    data = bytearray((tmp_path / "samples.npy").read_bytes())
    data[-3] ^= 1
    (tmp_path / "samples.npy").write_bytes(data)
    with pytest.raises(InputError, match=r"samples\.npy is not what"):
        SavedPlan.load(tmp_path, FINGERPRINT, lazy)
