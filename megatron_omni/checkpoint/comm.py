"""The three collectives that saving and loading need, so that both can be tested in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from megatron_omni.runtime.errors import WorkError

Value = TypeVar("Value")


class Comm(Protocol):
    """A group of ranks that passes small Python values."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def gather(self, value: Value) -> list[Value] | None:
        """All ranks' values on rank 0, None elsewhere."""

    def broadcast(self, value: Value) -> Value:
        """Rank 0's value on every rank."""

    def barrier(self) -> None: ...


@dataclass(frozen=True)
class Alone:
    """One process."""

    rank: int = 0
    size: int = 1

    def gather(self, value: Value) -> list[Value] | None:
        return [value]

    def broadcast(self, value: Value) -> Value:
        return value

    def barrier(self) -> None:
        pass


class Distributed:
    """The ranks of ``group`` (default: all); pass a gloo group where the default group only moves GPU tensors."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.first = dist.get_global_rank(group, 0) if group is not None else 0

    def gather(self, value: Value) -> list[Value] | None:
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=self.first, group=self.group)
        return values

    def broadcast(self, value: Value) -> Value:
        box = [value]
        dist.broadcast_object_list(box, src=self.first, group=self.group)
        return box[0]

    def barrier(self) -> None:
        dist.barrier(self.group)


def default_comm() -> Comm:
    """All ranks, or this process alone where there is no process group."""
    return Distributed() if dist.is_available() and dist.is_initialized() else Alone()


def on_all(comm: Comm, doing: str, action: Callable[[], Value]) -> list[Value] | None:
    """Runs ``action`` on every rank; rank 0 gets the results. A failure on any rank is a ``WorkError`` on all of them."""
    failure, result, cause = None, None, None
    try:
        result = action()
    except Exception as error:  # whatever it was, the others must not wait for this rank
        failure, cause = _describe(error), error
    outcomes = comm.gather((failure, result))
    failures = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(outcomes) if text] if outcomes else None
    failures = comm.broadcast(failures)
    if failures:
        more = f" (and {len(failures) - 3} more ranks)" if len(failures) > 3 else ""
        raise WorkError(f"{doing} failed on {'; '.join(failures[:3])}{more}") from cause
    return [value for _, value in outcomes] if outcomes else None  # type: ignore[misc]


def on_first(comm: Comm, doing: str, action: Callable[[], Value]) -> Value:
    """Runs ``action`` on rank 0 and gives every rank its result, or its failure as a ``WorkError``."""
    outcome: tuple[str | None, Value | None] = (None, None)
    cause = None
    if comm.rank == 0:
        try:
            outcome = (None, action())
        except Exception as error:
            outcome, cause = (_describe(error), None), error
    failure, result = comm.broadcast(outcome)
    if failure:
        raise WorkError(f"{doing} failed on rank 0: {failure}") from cause
    return result  # type: ignore[return-value]


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, WorkError) else f"{type(error).__name__}: {error}"
