"""The cut of logical tensors: a rank's part and its flat runs agree, and all ranks together cover everything once."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_omni.parallel.layout import TensorLayout


@st.composite
def cuts(draw):
    world = draw(st.sampled_from([1, 2, 4]))
    parts = [world * n for n in draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))]
    dim, rank_of_tensor = draw(st.integers(0, 2)), draw(st.integers(1, 3))
    shape = [draw(st.integers(1, 4)) for _ in range(rank_of_tensor)]
    dim = min(dim, rank_of_tensor - 1)
    shape[dim] = sum(parts)
    return shape, dim, parts, world


@given(cuts(), st.data())
def test_runs_address_the_logical_tensor(cut, data):
    shape, dim, parts, world = cut
    full = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for rank in range(world):
        layout = TensorLayout.sharded(shape, dim, parts, rank, world)
        local = layout.cut(full).flatten()
        assert layout.local_shape == tuple(layout.cut(full).shape)
        start = data.draw(st.integers(0, local.numel()))
        length = data.draw(st.integers(0, local.numel() - start))
        seen = []
        for offset, at, count in layout.runs(start, length):
            assert torch.equal(full.flatten()[offset : offset + count], local[at : at + count])
            seen += range(at, at + count)
        assert seen == list(range(start, start + length))


@given(cuts())
def test_ranks_cover_every_element_once(cut):
    shape, dim, parts, world = cut
    covered = torch.zeros(torch.Size(shape).numel(), dtype=torch.int64)
    for rank in range(world):
        layout = TensorLayout.sharded(shape, dim, parts, rank, world)
        for offset, _, count in layout.runs(0, layout.local_numel):
            covered[offset : offset + count] += 1
    assert covered.unique().tolist() == [1]


def test_fused_parts_are_cut_one_by_one():
    layout = TensorLayout.sharded((8, 2), 0, (4, 2, 2), rank=1, world=2)  # q|k|v of 4, 2 and 2 rows
    assert layout.cut(torch.arange(16).view(8, 2))[:, 0].tolist() == [4, 6, 10, 14]


def test_replicated_tensor_is_whole_everywhere():
    layout = TensorLayout((2, 3))
    assert list(layout.runs(1, 4)) == [(1, 1, 4)]
    assert layout.local_shape == (2, 3)
