"""The shuffled order: a permutation of any length, as even as chance, and as cheap at 100,000,000 as at ten."""

from __future__ import annotations

import itertools
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from megatron_omni.data.rows.permutation import shuffled


@pytest.mark.parametrize("size", [*range(1, 40), 99, 100, 101, 1000, 4096, 65_537])
def test_every_number_comes_once(size: int) -> None:
    order = shuffled(np.arange(size), size, 0, "epoch", 0)
    assert np.array_equal(np.sort(order), np.arange(size))
    pieces = [shuffled(np.arange(start, min(start + 7, size)), size, 0, "epoch", 0) for start in range(0, min(size, 700), 7)]
    assert np.array_equal(np.concatenate(pieces), order[: sum(map(len, pieces))])


def test_it_is_fixed_forever() -> None:
    """Recorded positions of running trainings depend on it."""
    assert shuffled(np.arange(8), 8, 0, "epoch", "", 0).tolist() == [6, 0, 3, 2, 4, 1, 5, 7]
    assert shuffled(np.arange(5), 10**8, 1, "epoch", "", 3).tolist() == [47613505, 36098672, 98905794, 62464724, 28850595]


@pytest.mark.parametrize("size", [4, 5])
def test_small_orders_are_equally_likely(size: int) -> None:
    draws, kinds = 12_000, len(list(itertools.permutations(range(size))))
    seen = Counter(tuple(shuffled(np.arange(size), size, seed).tolist()) for seed in range(draws))
    expected = draws / kinds
    chi_squared = sum((seen[order] - expected) ** 2 / expected for order in itertools.permutations(range(size)))
    assert abs(chi_squared - (kinds - 1)) < 5 * (2 * (kinds - 1)) ** 0.5


def test_numbers_and_neighbours_are_spread_as_by_chance() -> None:
    size = 10_007
    order = shuffled(np.arange(size), size, 5)
    cells = np.histogram2d(np.arange(size), order, bins=20)[0]
    expected = size / 400
    assert abs(((cells - expected) ** 2 / expected).sum() - 361) < 5 * (2 * 361) ** 0.5
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04
    assert abs(np.corrcoef(order, shuffled(np.arange(size), size, 6))[0, 1]) < 0.04


def test_a_window_of_a_huge_order_is_cheap() -> None:
    shuffled(np.arange(10), 10, 0)
    tracemalloc.start()
    started = time.perf_counter()
    window = shuffled(np.arange(50_000_000, 50_050_000), 100_000_000, 7)
    seconds, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(np.unique(window)) == 50_000 and window.min() >= 0 and window.max() < 100_000_000
    assert peak < 8_000_000
    assert seconds < 1
