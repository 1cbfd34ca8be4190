"""Audio in: the Whisper-family encoder on packed clips, and the projector to the LLM's width.

Whisper: arXiv:2212.04356. Clips lie side by side in a row with invalid frames between them (``EncoderGeometry.slot``);
activations are zeroed there after every convolution, so each clip sees zeros beyond its ends, as if alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron_omni.config.model import EncoderConfig, FeatureConfig, ProjectorConfig
from megatron_omni.kernels.attention import Segments
from megatron_omni.model.transformer import Norm, Transformer
from megatron_omni.parallel.layers import Linear, new_parameter
from megatron_omni.parallel.layout import TensorLayout
from megatron_omni.parallel.topology import TensorParallel


class Convolution(nn.Module):
    """Width 3 over time, zero padding of one frame, with bias. ``weight [out, in, 3]``."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.weight = new_parameter(TensorLayout((out_channels, in_channels, 3)))
        self.bias = new_parameter(TensorLayout((out_channels,)))

    def forward(self, x_RCA: torch.Tensor) -> torch.Tensor:
        return F.conv1d(x_RCA, self.weight, self.bias, self.stride, padding=1)


class AudioEncoder(nn.Module):
    """Log-mel rows to encoder frames; weights whole on every rank, rows dealt out by the caller."""

    def __init__(self, config: EncoderConfig, features: FeatureConfig) -> None:
        super().__init__()
        width = config.stack.hidden_size
        channels = [features.num_mel_bins] + [width] * len(config.conv_strides)
        self.convolutions = nn.ModuleList(
            Convolution(before, width, stride) for before, stride in zip(channels[:-1], config.conv_strides, strict=True)
        )
        self.stack = Transformer(config.stack, TensorParallel.single())

    def forward(self, mel_RAM: torch.Tensor, valid_RA: torch.Tensor, segments_RA: torch.Tensor, positions_RA: torch.Tensor) -> torch.Tensor:
        """``[R, A * stride, M] -> [R, A, D]``; what lies in gaps is meaningless."""
        x_RCA = mel_RAM.transpose(1, 2)
        for convolution in self.convolutions:
            valid_RA = valid_RA[:, :: convolution.stride]
            x_RCA = F.gelu(convolution(x_RCA)) * valid_RA.unsqueeze(1)
        return self.stack(x_RCA.transpose(1, 2), positions_RA, Segments(segments_RA))


class Projector(nn.Module):
    """Stacks ``stride`` encoder frames into one embedding of the LLM's width: linear, GELU, linear, RMSNorm.

    Frames beyond a clip's end are zeroed first: the last embedding of a clip may hold fewer than ``stride``.
    """

    def __init__(self, config: ProjectorConfig, encoder_width: int, llm_width: int) -> None:
        super().__init__()
        self.stride = config.stride
        self.up = Linear(encoder_width * config.stride, config.hidden_size, bias=True)
        self.down = Linear(config.hidden_size, llm_width, bias=True)
        self.norm = Norm(llm_width, "rms", 1e-6)

    def forward(self, frames_RAD: torch.Tensor, segments_RA: torch.Tensor) -> torch.Tensor:
        """``[R, A, D] -> [R, A / stride, D_llm]``."""
        rows, frames, width = frames_RAD.shape
        frames_RAD = frames_RAD * (segments_RA >= 0).unsqueeze(-1)
        stacked = frames_RAD.reshape(rows, frames // self.stride, width * self.stride)
        return self.norm(self.down(F.gelu(self.up(stacked))))
