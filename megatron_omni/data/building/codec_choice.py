"""Which codec encodes, and where."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path

import torch

from megatron_omni.audio.codec import Backend, Mimi, Precision, load_codec
from megatron_omni.data.building.shard import Group, encoded


@dataclass(frozen=True)
class CodecChoice:
    """The codec and where it runs."""

    folder_or_id: str | Path
    backend: Backend = "transformers"
    num_codebooks: int | None = None
    devices: tuple[str, ...] = ("cpu",)
    """One encoding process each; with a single one this process encodes."""
    dtype: Precision = "float32"
    threads: int = 1
    """Of its arithmetic on a CPU."""

    def load(self, device: str) -> Mimi:
        torch.set_num_threads(self.threads)
        return load_codec(self.folder_or_id, self.backend, self.num_codebooks, device, self.dtype)

    @property
    def name(self) -> str:
        """The Hub id, or the name of the folder: where it lies on this machine is no part of the data set."""
        return Path(self.folder_or_id).name if Path(self.folder_or_id).exists() else str(self.folder_or_id)


_codec: Mimi
"""Of an encoding process."""


def start_encoding(choice: CodecChoice, devices: Queue[str]) -> None:
    """Each process takes one device."""
    global _codec
    _codec = choice.load(devices.get())


def encode_group(numbered: tuple[int, Group]) -> tuple[int, Group]:
    return numbered[0], encoded(numbered[1], _codec)
