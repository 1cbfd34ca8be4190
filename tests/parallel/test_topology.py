"""Rank arithmetic, and collectives with their gradients on two gloo ranks."""

import pytest
import torch

from megatron_omni.parallel import collectives
from megatron_omni.parallel.topology import ParallelGroups, Topology
from megatron_omni.runtime.errors import InputError
from tests.harness import run_ranks


def test_tensor_ranks_are_adjacent():
    topology = Topology(world=8, tensor=2, rank=5)
    assert (topology.data, topology.data_rank, topology.tensor_rank) == (4, 2, 1)
    assert topology.tensor_groups() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert topology.data_groups() == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_size_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match=r"parallel.tensor=3 does not divide the 4 processes"):
        Topology(world=4, tensor=3)


def test_deepspeed_would_ignore_the_model_parallel_group():
    assert not hasattr(ParallelGroups, "initialize_sequence_parallel")


def gradients() -> dict[str, tuple[list[float], list[float]]]:
    tp = ParallelGroups(Topology(2, 2, torch.distributed.get_rank())).tensor_parallel
    out = {}
    for name in ("copy_to_ranks", "sum_over_ranks", "split_rows", "gather_rows"):
        x = torch.tensor([1.0, 2.0]) + 10 * tp.rank
        x.requires_grad_()
        y = getattr(collectives, name)(x, tp)
        (y * (torch.arange(1.0, 1 + len(y)) * (1 + tp.rank))).sum().backward()
        out[name] = (y.tolist(), x.grad.tolist())
    return out


def test_collectives_and_their_gradients():
    first, second = run_ranks(gradients, 2)
    assert first["copy_to_ranks"] == ([1, 2], [3, 6])
    assert second["copy_to_ranks"] == ([11, 12], [3, 6])
    assert first["sum_over_ranks"] == ([12, 14], [1, 2])
    assert second["sum_over_ranks"] == ([12, 14], [2, 4])
    assert first["split_rows"] == ([1], [1, 2])
    assert second["split_rows"] == ([12], [1, 2])
    assert first["gather_rows"] == ([1, 2, 11, 12], [1, 2])
    assert second["gather_rows"] == ([1, 2, 11, 12], [6, 8])
