"""Sample numbers in, tensors out: all the work of a data worker."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from megatron_omni.audio.features import LogMel
from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.config.model import CodecConfig
from megatron_omni.data.render import render
from megatron_omni.data.rows.augment import Augmentation
from megatron_omni.data.rows.collate import Distort, Packed, collate, require_lengths
from megatron_omni.data.rows.demands import Samples
from megatron_omni.data.rows.layout import BatchLayout
from megatron_omni.data.rows.ring import Ring
from megatron_omni.data.rows.speed import arrays_at_speed, at_speed
from megatron_omni.data.rows.workers import ordered
from megatron_omni.data.shards.dataset import ShardedDataset
from megatron_omni.data.tokenizer import OmniTokenizer
from megatron_omni.runtime.errors import WorkError
from megatron_omni.schema import Batch, RowShape


class Address(NamedTuple):
    """One row of the plan."""

    window: int
    samples: np.ndarray
    """int64: sample numbers."""
    speeds: np.ndarray | None = None
    """float64: how fast each is to be played; None: at its own speed."""


@dataclass(frozen=True)
class Skipped:
    """A planned sample that turned out to be damaged: its place in the row stays empty."""

    number: int
    reason: str


@dataclass(frozen=True)
class PackedRows:
    """One micro-batch."""

    batch: Batch
    keys: tuple[tuple[str, ...], ...]
    """Sample ids by row."""
    skipped: tuple[Skipped, ...]
    block: torch.Tensor
    """uint8 [``BatchLayout.num_bytes``]: the memory that the batch lies in."""


class RowPacker:
    """Reads, augments, renders and collates the rows that it is given the addresses of."""

    def __init__(
        self,
        samples: Samples,
        tokenizer: OmniTokenizer,
        geometry: EncoderGeometry,
        log_mel: LogMel,
        codec: CodecConfig,
        shape: RowShape,
        acoustic_delay: int,
        tensor_parallel: int = 1,
        longest_clip: int | None = None,
        augmentation: Augmentation | None = None,
        skip_damaged: bool = False,
    ) -> None:
        """See ``collate`` for ``tensor_parallel`` and ``longest_clip``.

        Args:
            skip_damaged: leave out samples that cannot be read, and report them; else the first one raises ``WorkError``.
        """
        self.samples, self.tokenizer, self.geometry, self.log_mel, self.codec = samples, tokenizer, geometry, log_mel, codec
        self.shape, self.acoustic_delay, self.tensor_parallel, self.longest_clip = shape, acoustic_delay, tensor_parallel, longest_clip
        self.augmentation, self.skip_damaged = augmentation, skip_damaged

    def pack(self, rows: Sequence[Address], memory: memoryview | None = None) -> PackedRows:
        """One micro-batch, laid in ``memory`` if it is given (``layout(len(rows)).num_bytes`` bytes)."""
        memory = memoryview(bytearray(self.layout(len(rows)).num_bytes)) if memory is None else memory
        if isinstance(self.samples, ShardedDataset):  # remote shards of all rows side by side
            self.samples.prefetch(np.concatenate([row.samples for row in rows]).tolist())
        skipped: list[Skipped] = []
        loaded = [list(self._load(row, skipped)) for row in rows]
        batch = collate(
            loaded,
            self.shape,
            self.geometry,
            self.log_mel,
            self.codec,
            self.acoustic_delay,
            self.tokenizer.pad_id,
            self.tensor_parallel,
            self.longest_clip,
            self._distort(rows),
            memory,
        )
        keys = tuple(tuple(sample.id for sample, _, _ in row) for row in loaded)
        return PackedRows(batch, keys, tuple(skipped), torch.frombuffer(memory, dtype=torch.uint8))

    def pack_all(
        self, micro_batches: Iterator[Sequence[Address]], micro_rows: int, num_workers: int, at_once: int = 1, pinned: bool = False
    ) -> Iterator[PackedRows]:
        """Packs micro-batches of ``micro_rows`` rows in ``num_workers`` processes, in order; without them here, when asked for.

        With workers, ``at_once`` micro-batches are ready together, and the tensors of one stay as they are until
        ``2 * at_once`` more were taken; then their memory is used again (``Ring``).
        """
        if num_workers == 0:
            yield from map(self.pack, micro_batches)
            return
        ahead = max(2 * num_workers, at_once)
        ring = Ring(self.layout(micro_rows), ahead + 2 * at_once, pinned)

        def work(number: int, rows: Sequence[Address]) -> tuple[int, tuple[tuple[str, ...], ...], tuple[Skipped, ...]]:
            packed = self.pack(rows, ring.memory(number))
            return number, packed.keys, packed.skipped

        def describe(rows: Sequence[Address]) -> str:
            numbers = np.concatenate([row.samples for row in rows])
            return f"samples {', '.join(map(str, numbers[:8].tolist()))}{', ...' if len(numbers) > 8 else ''}"

        try:
            for number, keys, skipped in ordered(work, micro_batches, num_workers, ahead, describe):
                yield PackedRows(ring.batch(number), keys, skipped, ring.block(number))
        finally:
            ring.close()

    def layout(self, rows: int) -> BatchLayout:
        mel_bins = self.log_mel.config.num_mel_bins
        pad_id = self.tokenizer.pad_id
        return BatchLayout.of(rows, self.shape, self.geometry, mel_bins, self.codec, pad_id, self.tensor_parallel, self.longest_clip)

    def _load(self, row: Address, skipped: list[Skipped]) -> Iterator[Packed]:
        """The samples of a row; those that cannot be read go to ``skipped``."""
        speeds = np.ones(len(row.samples)) if row.speeds is None else row.speeds
        for number, speed in zip(row.samples.tolist(), speeds.tolist(), strict=True):
            try:
                sample, arrays = self.samples.sample(number), self.samples.arrays(number)
                rendered = render(sample, self.tokenizer, self.geometry)
                require_lengths(sample, rendered, arrays, self.codec)
            except WorkError as error:
                if not self.skip_damaged:
                    raise
                skipped.append(Skipped(number, str(error)))
                continue
            if speed != 1:
                sample, arrays = at_speed(sample, speed), arrays_at_speed(arrays, speed)
                rendered = render(sample, self.tokenizer, self.geometry)
            if self.augmentation is not None:
                clips = self.augmentation.of(row.window, sample.id)
                arrays = dataclasses.replace(arrays, audio={name: clips.wave(name, wave) for name, wave in arrays.audio.items()})
            yield sample, rendered, arrays

    def _distort(self, rows: Sequence[Address]) -> Distort | None:
        if (augmentation := self.augmentation) is None:
            return None
        return lambda row, sample, name, mel_AM: augmentation.of(rows[row].window, sample.id).mel(name, mel_AM)
