"""Memory for a few micro-batches, taken once and used in turn, that a rank shares with the workers it forks.

A worker lays a batch straight into it, so nothing but the sample ids is sent between processes; and where there is a GPU
the memory is pinned, so copies to the device run beside the computation. It is anonymous memory: the size of
``/dev/shm``, small in containers, does not limit it.
"""

from __future__ import annotations

import ctypes
import mmap

import torch

from megatron_omni.data.rows.layout import BatchLayout
from megatron_omni.runtime.logs import get_logger
from megatron_omni.schema import Batch

logger = get_logger(__name__)


class Ring:
    """``slots`` micro-batches; number ``n`` lies in slot ``n % slots``, until number ``n + slots`` is laid there."""

    def __init__(self, layout: BatchLayout, slots: int, pinned: bool = False) -> None:
        self._layout, self._slots = layout, slots
        self._memory = mmap.mmap(-1, max(1, layout.num_bytes * slots))
        self._pinned = pinned and self._pin()
        self._batches = [layout.batch(self.memory(number)) for number in range(slots)]

    def memory(self, number: int) -> memoryview:
        """Where micro-batch ``number`` is to be laid."""
        start = number % self._slots * self._layout.num_bytes
        return memoryview(self._memory)[start : start + self._layout.num_bytes]

    def batch(self, number: int) -> Batch:
        """Micro-batch ``number`` once it is laid; no copy."""
        return self._batches[number % self._slots]

    def block(self, number: int) -> torch.Tensor:
        """uint8: all of micro-batch ``number`` as it lies in memory."""
        return torch.frombuffer(self.memory(number), dtype=torch.uint8)

    def close(self) -> None:
        """Gives pinned memory back to the pageable; the batches stay readable."""
        if self._pinned:
            self._pinned = False
            torch.cuda.cudart().cudaHostUnregister(self._address)

    @property
    def _address(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def _pin(self) -> bool:
        error = int(torch.cuda.cudart().cudaHostRegister(self._address, len(self._memory), 0))
        if error:
            logger.warning("%d bytes of batch memory cannot be pinned (CUDA error %d): copies to the GPU wait", len(self._memory), error)
        return not error
