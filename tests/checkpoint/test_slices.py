import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_omni.checkpoint.slices import Piece, plan
from megatron_omni.parallel.layout import TensorLayout
from megatron_omni.runtime.errors import WorkError


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], int, list[int]]:
    """A shape, the dimension that is cut, and its fused parts, each divisible by 4."""
    parts = draw(st.lists(st.integers(1, 3).map(lambda n: 4 * n), min_size=1, max_size=3))
    before = draw(st.lists(st.integers(1, 4), max_size=2))
    after = draw(st.lists(st.integers(1, 4), max_size=2))
    return (*before, sum(parts), *after), len(before), parts


def ranks(cut: tuple[tuple[int, ...], int, list[int]], data: int, tensor: int) -> list[tuple[TensorLayout, int, int]]:
    """(layout, start, length) of every rank: ZeRO-3's equal shares of each tensor-parallel part."""
    shape, dim, parts = cut
    held = []
    for rank in range(tensor):
        layout = TensorLayout(shape) if tensor == 1 else TensorLayout.sharded(shape, dim, parts, rank, tensor)
        n = math.ceil(layout.local_numel / data)
        held += [(layout, start, min(n, layout.local_numel - start)) for start in range(0, layout.local_numel, n)]
    return held


@settings(max_examples=150, deadline=None)
@given(cuts(), *[st.sampled_from([1, 2, 3, 4, 7])] * 2, *[st.sampled_from([1, 2, 4])] * 2)
def test_any_topology_to_any_other(cut: tuple, data: int, new_data: int, tensor: int, new_tensor: int) -> None:
    full = torch.arange(math.prod(cut[0])).view(cut[0])
    files = {}
    pieces = []
    for number, (layout, start, length) in enumerate(ranks(cut, data, tensor)):
        files[str(number)] = layout.cut(full).flatten()[start : start + length]
        pieces.append(Piece(layout, start, length, str(number), 0, torch.float32))
    for layout, start, length in ranks(cut, new_data, new_tensor):
        filled = torch.full((length,), -1)
        for run in plan(layout, start, length, pieces):
            filled[run.target : run.target + run.count] = files[run.piece.file][run.source : run.source + run.count]
        assert torch.equal(filled, layout.cut(full).flatten()[start : start + length])


def test_neighbouring_rows_become_one_run() -> None:
    shape = (6, 8)
    halves = [TensorLayout.sharded(shape, 0, [6], rank, 2) for rank in range(2)]
    pieces = [Piece(half, 0, 24, "f", 0, torch.float32) for half in halves]
    assert [(run.source, run.target, run.count) for run in plan(TensorLayout(shape), 0, 48, pieces)] == [(0, 0, 24), (0, 24, 24)]


@pytest.mark.parametrize("ranges", [[(0, 5), (6, 4)], [(0, 6), (5, 5)], [(0, 9)], [(1, 9)], [], [(0, 10), (0, 10)]])
def test_holes_and_overlaps_are_refused(ranges: list[tuple[int, int]]) -> None:
    layout = TensorLayout((10,))
    pieces = [Piece(layout, start, length, "f", 0, torch.float32) for start, length in ranges]
    with pytest.raises(WorkError, match="exactly once"):
        plan(layout, 0, 10, pieces)


def test_nothing_wanted_reads_nothing() -> None:
    assert plan(TensorLayout((10,)), 3, 0, []) == []
