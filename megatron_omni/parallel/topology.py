"""The rank grid as a value, and the process groups that follow from it. ``ParallelGroups`` is DeepSpeed's ``mpu``."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megatron_omni.runtime.errors import InputError


@dataclass(frozen=True)
class Topology:
    """world = data x tensor; tensor-parallel ranks are adjacent, so that they share a node."""

    world: int
    tensor: int
    rank: int = 0

    def __post_init__(self) -> None:
        if self.world % self.tensor:
            choices = [n for n in range(1, self.world + 1) if self.world % n == 0]
            raise InputError(f"parallel.tensor={self.tensor} does not divide the {self.world} processes started; choose one of {choices}")

    @property
    def data(self) -> int:
        return self.world // self.tensor

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor

    def tensor_groups(self) -> list[list[int]]:
        return [list(range(start, start + self.tensor)) for start in range(0, self.world, self.tensor)]

    def data_groups(self) -> list[list[int]]:
        return [list(range(offset, self.world, self.tensor)) for offset in range(self.tensor)]


@dataclass(frozen=True)
class TensorParallel:
    """One rank's place in its tensor-parallel group; what the layers need to know."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def single(cls) -> TensorParallel:
        return cls()


class ParallelGroups:
    """Process groups of a topology, with the names that DeepSpeed asks its ``mpu`` for.

    It must not gain an attribute ``initialize_sequence_parallel``: ZeRO-3 would then ignore the model-parallel group.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self._tensor = self._own(topology.tensor_groups())
        self._data = self._own(topology.data_groups())

    def _own(self, groups: list[list[int]]) -> dist.ProcessGroup:
        own = None
        for ranks in groups:  # every rank creates every group: torch requires it
            group = dist.new_group(ranks)
            if self.topology.rank in ranks:
                own = group
        assert own is not None
        return own

    @property
    def tensor_parallel(self) -> TensorParallel:
        size = self.topology.tensor
        return TensorParallel(self.topology.tensor_rank, size, self._tensor if size > 1 else None)

    # DeepSpeed's names
    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tensor

    def get_model_parallel_world_size(self) -> int:
        return self.topology.tensor

    def get_model_parallel_rank(self) -> int:
        return self.topology.tensor_rank

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank

    def get_tensor_model_parallel_src_rank(self) -> int:
        return self.topology.rank - self.topology.tensor_rank

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data

    def get_data_parallel_world_size(self) -> int:
        return self.topology.data

    def get_data_parallel_rank(self) -> int:
        return self.topology.data_rank
