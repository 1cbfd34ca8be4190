"""Where a process stands among the others, as numbers; no process group is needed to know it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_omni.runtime.errors import InputError


@dataclass(frozen=True)
class World:
    """One process of a run: its global rank, the number of processes, and its number on its own node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.local_rank <= self.rank < self.size):
            raise InputError(
                f"RANK={self.rank} WORLD_SIZE={self.size} LOCAL_RANK={self.local_rank} is not a place in a world: "
                "expected 0 <= LOCAL_RANK <= RANK < WORLD_SIZE; start ranks with deepspeed or torchrun"
            )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> World:
        """What ``deepspeed`` and ``torchrun`` export; a plain process is rank 0 of 1."""
        rank, size = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
        return cls(rank, size, int(environment.get("LOCAL_RANK", "0")))

    @property
    def is_first(self) -> bool:
        """Rank 0: the one that prints, logs and writes what is written once."""
        return self.rank == 0
