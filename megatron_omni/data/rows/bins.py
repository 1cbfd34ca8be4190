"""Vector bin packing: samples with several demands into as few rows of fixed capacities as possible.

Samples are dealt out like cards, largest first, one to each row per round. A round looks along the one direction, over
all resources, in which the rows differ most by now, and gives the row that has least the sample that brings most. So
rows stay alike in every resource at once, which is what fills them when two are scarce. What does not fit in the end
goes where it fits best. Where rows hold so few samples that dealing wastes room, best-fit-decreasing (Panigrahy et al.
2011, "Heuristics for Vector Bin Packing") is tried too, and the shorter plan wins.

Every decision compares integers: floating-point sums differ between processors, and ranks must agree on every row.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left

import numpy as np

_ONE = 1 << 16
"""A full row, in the fixed-point numbers that loads are compared in."""
_WASTE = 200
"""Dealing is good enough where it leaves fewer than one row in so many more than the demands alone would need."""

Row = list[int]
"""Sample numbers."""


def pack(demands: np.ndarray, limits: np.ndarray) -> list[np.ndarray]:
    """Packs every sample into one row.

    Args:
        demands: int [n, resources]; no sample exceeds ``limits``.
        limits: int [resources], capacities of a row.

    Returns:
        Rows as int64 arrays of sample numbers, none empty.
    """
    if len(demands) == 0:
        return []
    demands = demands.astype(np.int64)
    total = demands.sum(0)
    fewest = max(1, int((-(-total // limits)).max()))
    shares = [int(t) * _ONE // (int(limit) * fewest) for t, limit in zip(total, limits, strict=True)]
    binding = int(np.argmax(shares))
    scarcity = np.array([(share * 256 // max(shares[binding], 1)) ** 2 for share in shares], np.int64)
    load = demands * _ONE // limits * scarcity >> 16
    largest_first = np.argsort(-load.sum(1), kind="stable")
    demands = demands[largest_first]
    rows = _dealt(demands, load[largest_first], limits, fewest, binding)
    if (len(rows) - fewest) * _WASTE > fewest:
        fitted: list[Row] = []
        _best_fit(demands, range(len(demands)), limits, binding, fitted)
        rows = min(rows, fitted, key=len)
    return [largest_first[row] for row in rows if row]


def _dealt(demands: np.ndarray, load: np.ndarray, limits: np.ndarray, num_rows: int, binding: int) -> list[Row]:
    """Deals the samples, largest first, to ``num_rows`` rows; those that overflow are fitted in afterwards."""
    row_of = np.empty(len(load), np.int64)
    used = np.zeros((num_rows, load.shape[1]), np.int64)
    for start in range(0, len(load), num_rows):
        hand = load[start : start + num_rows]
        direction = _widest(used)
        taking = np.argsort(used.sum(1), kind="stable")[: len(hand)] if len(hand) < num_rows else np.arange(num_rows)
        taking = taking[np.argsort(used[taking] @ direction, kind="stable")]
        giving = np.argsort(-(hand @ direction), kind="stable")
        row_of[start + giving] = taking
        used[taking] += hand[giving]
    by_row = np.argsort(row_of, kind="stable")
    starts = np.searchsorted(row_of[by_row], np.arange(num_rows + 1))
    running = np.vstack([np.zeros_like(demands[:1]), demands[by_row].cumsum(0)])
    fits = (running[1:] - running[starts[row_of[by_row]]] <= limits).all(1)
    rows = [by_row[start:stop][fits[start:stop]].tolist() for start, stop in itertools.pairwise(starts)]
    _best_fit(demands, np.sort(by_row[~fits]).tolist(), limits, binding, rows)
    return rows


def _widest(used: np.ndarray) -> np.ndarray:
    """The direction, int64 [resources], in which rows differ most: about the first principal component of ``used``."""
    centred = used - used.sum(0) // len(used)
    covariance: list[list[int]] = (centred.T @ centred).tolist()
    vector = [float(value) for value in max(covariance, key=lambda line: max(map(abs, line)))]
    for _ in range(4):  # power iteration, as Python floats: the same on every processor
        largest = max(map(abs, vector)) or 1.0
        vector = [sum(value / largest * other for value, other in zip(vector, line, strict=True)) for line in covariance]
    largest = max(map(abs, vector)) or 1.0
    return np.array([int(value / largest * 1024) for value in vector], np.int64)


def _best_fit(demands: np.ndarray, samples: range | list[int], limits: np.ndarray, binding: int, rows: list[Row]) -> None:
    """Adds ``samples`` in turn, each to the row with the least of the ``binding`` resource left that holds it, or to a new one.

    A plain loop over integers: per sample one bisection of the rows, sorted by what they have left, and one comparison
    of all resources at once. For that the resources stand side by side in one integer, 32 bits each, topped by a guard
    bit that a subtraction clears exactly if that resource does not suffice.
    """
    shifts = [33 * number for number in range(len(limits))]
    guards = sum(1 << (shift + 32) for shift in shifts)

    def packed(vector: list[int]) -> int:
        return sum(value << shift for value, shift in zip(vector, shifts, strict=True))

    room_of = [(limits - demands[row].sum(0)).tolist() for row in rows] if samples else []
    free = [packed(room) | guards for room in room_of]  # by row
    ascending = sorted((room[binding], row) for row, room in enumerate(room_of))
    left = [room for room, _ in ascending]  # of the binding resource, ascending
    row_at = [row for _, row in ascending]  # the row that has it
    empty = packed(limits.tolist()) | guards
    for sample in samples:
        vector: list[int] = demands[sample].tolist()
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
            rows.append([])
        free[row] -= need
        rows[row].append(sample)
        place = bisect_left(left, room)
        left.insert(place, room)
        row_at.insert(place, row)
