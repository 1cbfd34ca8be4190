"""How many frames and embeddings a clip becomes: the one place that planner, processor and model ask."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_omni.config.model import ModelConfig


@dataclass(frozen=True)
class EncoderGeometry:
    """Rates of the path wave -> mel frames -> encoder frames -> projected embeddings."""

    hop_length: int
    conv_strides: tuple[int, ...]
    stack: int
    """Encoder frames per projected embedding."""

    @classmethod
    def of(cls, config: ModelConfig) -> EncoderGeometry:
        return cls(config.features.hop_length, config.encoder.conv_strides, config.projector.stride)

    @property
    def conv_stride(self) -> int:
        """Mel frames per encoder frame."""
        return math.prod(self.conv_strides)

    def mel_frames(self, num_samples: int) -> int:
        """As WhisperFeatureExtractor without padding: one frame per hop; a clip shorter than a hop gives one."""
        return max(1, num_samples // self.hop_length)

    def encoder_frames(self, num_samples: int) -> int:
        return -(-self.mel_frames(num_samples) // self.conv_stride)

    def num_audio_embeddings(self, num_samples: int) -> int:
        """How often ``<audio>`` is repeated for a clip of ``num_samples`` wave samples."""
        return -(-self.encoder_frames(num_samples) // self.stack)

    def slot(self, num_samples: int) -> int:
        """Encoder frames that a clip occupies in a packed encoder row, its gap included; a multiple of ``stack``.

        Clips lie side by side without touching: before every convolution but the last has seen them, at least one
        invalid (zero) frame must part neighbours, or a clip would hear the next one.
        """
        gap = math.prod(self.conv_strides[:-1])
        unit = self.conv_stride * self.stack
        return -(-(self.mel_frames(num_samples) + gap) // unit) * self.stack
