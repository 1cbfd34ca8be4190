"""Tensor-parallel ranks see the rows that their group's first rank reads, and hold them while they use them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
import xxhash

from megatron_omni.audio.features import LogMel
from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.config.model import CodecConfig
from megatron_omni.data.rows.demands import measure_one
from megatron_omni.data.rows.packer import RowPacker
from megatron_omni.data.rows.plan import PlanFingerprint, RowPlan
from megatron_omni.data.rows.stream import RowStream, StepRows
from megatron_omni.parallel.topology import Topology
from megatron_omni.runtime.errors import WorkError
from megatron_omni.schema import Sample, SampleArrays
from megatron_omni.train import shared_rows
from megatron_omni.train.shared_rows import SharedRows
from tests.factories import CODEC, SHAPE, model_config, random_sample, tokenizer
from tests.harness import run_ranks

STEPS = 6


class Samples:
    """``count`` random samples; on a rank that must not read, none; ``damaged`` cannot be read by anyone."""

    fingerprint = "random"
    codec: CodecConfig | None = CODEC

    def __init__(self, count: int, readable: bool, damaged: int | None = None) -> None:
        self.count, self.readable, self.damaged = count, readable, damaged

    def __len__(self) -> int:
        return self.count

    def sample(self, number: int, /) -> Sample:
        return random_sample(number)[0]

    def arrays(self, number: int, /) -> SampleArrays:
        assert self.readable, "only the first rank of a group reads"
        if number == self.damaged:
            raise WorkError("sample is damaged")
        return random_sample(number)[1]


def stream(rank: int, size: int, readable: bool, workers: int, micro_batches: int) -> RowStream:
    config, samples = model_config(), Samples(40, readable, damaged=3)
    geometry = EncoderGeometry.of(config)
    demands = np.array([measure_one(samples.sample(number), tokenizer(), geometry, 0) for number in range(40)])
    packer = RowPacker(samples, tokenizer(), geometry, LogMel(config.features), CODEC, SHAPE, 0, 2, skip_damaged=True)
    fingerprint = PlanFingerprint("random", "", "", "", 0, 0, 4)
    plan = RowPlan(demands, SHAPE, 0, window_rows=4)
    places = dict(virtual_streams=2, dp_rank=rank, dp_size=size, micro_rows=2, micro_batches=micro_batches, num_workers=workers)
    return RowStream(packer, plan, fingerprint, **places, damaged_samples=0.01)


def digest(rows: StepRows) -> tuple[str, tuple[object, ...]]:
    hashes = xxhash.xxh3_128()
    for packed in rows.micro_batches:
        for tensor in vars(packed.batch).values():
            hashes.update(tensor.numpy().tobytes())
    about = [(packed.keys, packed.skipped) for packed in rows.micro_batches]
    return hashes.hexdigest(), (tuple(about), rows.row_numbers, rows.fill, rows.state)


def seen(steps: Iterator[StepRows]) -> list[tuple[str, tuple[object, ...]]]:
    digests = []
    for rows in itertools.islice(steps, STEPS):
        first = digest(rows)
        total = torch.ones(1)
        dist.all_reduce(total)  # the model's collectives go on beside
        assert digest(rows) == first
        digests.append(first)
    return digests


def share(workers: int, head: int) -> list[tuple[str, tuple[object, ...]]]:
    shared_rows._HEAD = head
    topology = Topology(dist.get_world_size(), 2, dist.get_rank())
    own = stream(topology.data_rank, topology.data, topology.tensor_rank == 0, workers, 4 // topology.data)
    return seen(iter(SharedRows(own, topology)))


@pytest.mark.parametrize(("world", "workers", "head"), [(2, 1, 64), pytest.param(4, 0, 1 << 16, marks=pytest.mark.slow)])
def test_every_rank_of_a_group_sees_the_same_steps(world: int, workers: int, head: int) -> None:
    ranks = run_ranks(share, world, workers, head)
    for group in range(world // 2):
        expected = [digest(rows) for rows in itertools.islice(stream(group, world // 2, True, 0, 8 // world), STEPS)]
        assert ranks[2 * group] == expected
        assert ranks[2 * group + 1] == expected
    assert any(skipped for ranks_steps in ranks for _, (about, *_) in ranks_steps for _, skipped in about)  # type: ignore[misc]
