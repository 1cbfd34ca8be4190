"""Where the tensors of a micro-batch lie in one block of memory: the same block for every micro-batch of a run.

Shapes are static, so a data worker can lay a batch straight into memory that the rank has mapped, and a GPU can copy from
it without another copy in between.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from megatron_omni.audio.delay import NO_CODE
from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.config.model import CodecConfig
from megatron_omni.runtime.errors import InputError
from megatron_omni.schema import IGNORE, Batch, RowShape

_ALIGNMENT = 64
"""Bytes: of a cache line, and of the widest vector loads."""


@dataclass(frozen=True)
class _Place:
    shape: tuple[int, ...]
    dtype: type[np.generic]
    padding: int
    """What positions hold that no sample takes."""
    offset: int


@dataclass(frozen=True)
class BatchLayout:
    """Shapes of a ``schema.Batch``; ``dealt`` encoder rows of ``frames`` frames serve one row."""

    rows: int
    shape: RowShape
    dealt: int
    frames: int
    conv_stride: int
    mel_bins: int
    codebooks: int
    pad_id: int

    @classmethod
    def of(
        cls,
        rows: int,
        shape: RowShape,
        geometry: EncoderGeometry,
        mel_bins: int,
        codec: CodecConfig,
        pad_id: int,
        tensor_parallel: int = 1,
        longest_clip: int | None = None,
    ) -> BatchLayout:
        """The layout of ``rows`` rows; see ``collate``.

        Raises:
            InputError: ``shape`` does not suit the geometry.
        """
        if shape.encoder % geometry.stack or shape.supervised % 128:
            raise InputError(
                f"row.encoder={shape.encoder} must be a multiple of the projector's stride {geometry.stack}, "
                f"row.supervised={shape.supervised} a multiple of 128"
            )
        dealt = tensor_parallel if rows % tensor_parallel else 1
        frames = shape.encoder
        if dealt > 1:
            share = -(-shape.encoder // (dealt * geometry.stack)) * geometry.stack
            frames = min(frames, share + (shape.encoder if longest_clip is None else longest_clip))
        return cls(rows, shape, dealt, frames, geometry.conv_stride, mel_bins, codec.num_codebooks, pad_id)

    @cached_property
    def _places(self) -> dict[str, _Place]:
        B, R, K, shape = self.rows, self.rows * self.dealt, self.codebooks, self.shape
        mel_frames = self.frames * self.conv_stride
        tensors: dict[str, tuple[tuple[int, ...], type[np.generic], int]] = {
            "tokens_BT": ((B, shape.seq), np.int64, self.pad_id),
            "segments_BT": ((B, shape.seq), np.int32, -1),
            "positions_BT": ((B, shape.seq), np.int64, 0),
            "audio_source_BT": ((B, shape.seq), np.int64, 0),
            "supervised_BU": ((B, shape.supervised), np.int64, 0),
            "targets_BU": ((B, shape.supervised), np.int64, IGNORE),
            "mel_RAM": ((R, mel_frames, self.mel_bins), np.float32, 0),
            "mel_valid_RA": ((R, mel_frames), np.bool_, False),
            "clip_segments_RA": ((R, self.frames), np.int32, -1),
            "clip_positions_RA": ((R, self.frames), np.int64, 0),
            "spoken_BS": ((B, shape.spoken), np.int64, 0),
            "spoken_segments_BS": ((B, shape.spoken), np.int32, -1),
            "spoken_positions_BS": ((B, shape.spoken), np.int64, 0),
            "prefix_BF": ((B, shape.codec), np.int64, -1),
            "codes_BKF": ((B, K, shape.codec), np.int64, NO_CODE),
            "codec_segments_BF": ((B, shape.codec), np.int32, -1),
            "codec_positions_BF": ((B, shape.codec), np.int64, 0),
            "codec_targets_BKF": ((B, K, shape.codec), np.int64, IGNORE),
        }
        places, offset = {}, 0
        for name, (dims, dtype, padding) in tensors.items():
            places[name] = _Place(dims, dtype, padding, offset)
            offset += -(-math.prod(dims) * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT
        return places

    @cached_property
    def num_bytes(self) -> int:
        last = list(self._places.values())[-1]
        size = last.offset + math.prod(last.shape) * np.dtype(last.dtype).itemsize
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    def batch(self, memory: memoryview | None = None) -> Batch:
        """The tensors that lie in ``memory`` (``num_bytes`` writable bytes; None: fresh ones), as they are."""
        block = bytearray(self.num_bytes) if memory is None else memory
        return Batch(
            **{
                name: torch.from_numpy(np.frombuffer(block, place.dtype, math.prod(place.shape), place.offset).reshape(place.shape))
                for name, place in self._places.items()
            }
        )

    def blank(self, memory: memoryview | None = None) -> Batch:
        """``batch``, all of it padding."""
        batch = self.batch(memory)
        for name, place in self._places.items():
            getattr(batch, name).fill_(place.padding)
        return batch
