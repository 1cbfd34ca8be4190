"""One reader per tensor-parallel group: its ranks need the same rows, so the first one reads and broadcasts them.

Rows travel ahead: while a step runs, those of the next one are on their way, through host memory and a process group of
their own, so that no rank waits for them and they meet no collective of the model. What travels is the memory that the
batches lie in, as it is.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_omni.data.rows.packer import PackedRows, Skipped
from megatron_omni.data.rows.stream import RowStream, StepRows
from megatron_omni.parallel.topology import Topology

_HEAD = 1 << 16
"""Bytes that go ahead with a step beside its tensors: sample ids, state. What is longer follows when the step is due."""

Finish = Callable[[], StepRows]
"""Waits until a step is here."""


@dataclass(frozen=True)
class _About:
    """A step without its tensors."""

    rows: StepRows
    packed: tuple[tuple[tuple[tuple[str, ...], ...], tuple[Skipped, ...]], ...]
    """By micro-batch: keys, and what was skipped."""

    @classmethod
    def of(cls, rows: StepRows) -> _About:
        return cls(dataclasses.replace(rows, micro_batches=()), tuple((packed.keys, packed.skipped) for packed in rows.micro_batches))


class SharedRows:
    """Iterates as ``stream`` does, on every rank of the group; only the group's first rank reads and packs."""

    def __init__(self, stream: RowStream, topology: Topology) -> None:
        """Every rank of the world calls it: it makes the groups."""
        self._stream, self._reads = stream, topology.tensor_rank == 0
        self._group: dist.ProcessGroup | None = None
        if topology.tensor > 1:
            self._group, _ = dist.new_subgroups_by_enumeration(topology.tensor_groups(), backend="gloo")

    def __iter__(self) -> Iterator[StepRows]:
        if self._group is None:
            yield from self._stream
            return
        begun = self._send() if self._reads else self._receive()
        coming = next(begun)
        while True:
            here = coming()
            coming = next(begun)
            yield here

    def _send(self) -> Iterator[Finish]:
        for rows in self._stream:
            about = pickle.dumps(_About.of(rows))
            framed = torch.frombuffer(bytearray(len(about).to_bytes(8, "little") + about), dtype=torch.uint8)
            head = torch.zeros(_HEAD, dtype=torch.uint8)
            head[: len(framed)] = framed[:_HEAD]
            works = self._broadcast([head, *(packed.block for packed in rows.micro_batches)])

            def finish(rows: StepRows = rows, rest: torch.Tensor = framed[_HEAD:], works: Sequence[dist.Work] = works) -> StepRows:
                _wait(works)
                if len(rest):
                    _wait(self._broadcast([rest]))
                return rows

            yield finish

    def _receive(self) -> Iterator[Finish]:
        slots = 2  # the step in use and the one that comes
        ring = self._stream.ring(slots)
        step = 0
        while True:
            numbers = range(step * self._stream.micro_batches, (step + 1) * self._stream.micro_batches)
            head = torch.zeros(_HEAD, dtype=torch.uint8)
            works = self._broadcast([head, *(ring.block(number) for number in numbers)])

            def finish(head: torch.Tensor = head, numbers: range = numbers, works: Sequence[dist.Work] = works) -> StepRows:
                _wait(works)
                length = int.from_bytes(head[:8].numpy().tobytes(), "little")
                rest = torch.zeros(max(0, 8 + length - _HEAD), dtype=torch.uint8)
                if len(rest):
                    _wait(self._broadcast([rest]))
                about: _About = pickle.loads(torch.cat([head, rest])[8 : 8 + length].numpy().tobytes())
                batches = ((ring.batch(number), ring.block(number)) for number in numbers)
                packed = [PackedRows(batch, *known, block) for (batch, block), known in zip(batches, about.packed, strict=True)]
                return dataclasses.replace(about.rows, micro_batches=tuple(packed))

            yield finish
            step += 1

    def _broadcast(self, tensors: Sequence[torch.Tensor]) -> list[dist.Work]:
        """From the group's first rank, beside what else goes on."""
        works = [dist.broadcast(tensor, group=self._group, group_src=0, async_op=True) for tensor in tensors]
        return [work for work in works if work is not None]


def _wait(works: Sequence[dist.Work]) -> None:
    for work in works:
        work.wait()
