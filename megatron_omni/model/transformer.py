"""One transformer block for every part: pre-norm, GQA attention on packed rows, SwiGLU or GELU MLP, tensor parallel or not."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from megatron_omni.config.model import TransformerConfig
from megatron_omni.kernels.attention import Segments, attention
from megatron_omni.parallel.layers import ColumnParallelLinear, RowParallelLinear, new_parameter
from megatron_omni.parallel.layout import TensorLayout
from megatron_omni.parallel.topology import TensorParallel


class Norm(nn.Module):
    """RMSNorm (arXiv:1910.07467) or LayerNorm over the last dimension."""

    def __init__(self, width: int, kind: str, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = new_parameter(TensorLayout((width,)))
        self.bias = new_parameter(TensorLayout((width,))) if kind == "layer" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def rotary_table(positions_BT: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin ``[B, T, 1, head_dim]`` of RoPE (arXiv:2104.09864), halves rotated as Hugging Face's Llama does."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions_BT.device, dtype=torch.float32) / head_dim)
    angle = (positions_BT.float().unsqueeze(-1) * inverse).unsqueeze(2)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate(x_BTNH: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cos, sin = table
    low, high = x_BTNH.chunk(2, -1)
    return (x_BTNH * cos + torch.cat([-high, low], -1) * sin).type_as(x_BTNH)


def sinusoids(positions_BT: torch.Tensor, width: int) -> torch.Tensor:
    """Whisper's fixed position vectors ``[B, T, width]``: sines, then cosines, wavelengths up to 10,000."""
    half = width // 2
    step = torch.log(torch.tensor(10000.0)) / (half - 1)
    inverse = torch.exp(-step * torch.arange(half, device=positions_BT.device))
    angle = positions_BT.float().unsqueeze(-1) * inverse
    return torch.cat([angle.sin(), angle.cos()], -1)


@dataclass
class KeyValueCache:
    """Keys and values of the positions seen so far, per layer; for decoding unpacked sequences of one length."""

    layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def append(self, layer: int, k_BTGH: torch.Tensor, v_BTGH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer in self.layers:
            k_old, v_old = self.layers[layer]
            k_BTGH, v_BTGH = torch.cat([k_old, k_BTGH], 1), torch.cat([v_old, v_BTGH], 1)
        self.layers[layer] = (k_BTGH, v_BTGH)
        return k_BTGH, v_BTGH

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[1] if self.layers else 0


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.head_dim = config.width_of_head
        self.causal = config.causal
        wide, narrow = config.num_heads * self.head_dim, config.kv_heads * self.head_dim
        # without rotation a key's bias shifts all scores of a query alike, so the softmax does not see it; Whisper has none
        biased = (config.bias, config.bias and config.positions == "rope", config.bias)
        self.qkv = ColumnParallelLinear(config.hidden_size, (wide, narrow, narrow), tp, biased)
        self.output = RowParallelLinear(wide, config.hidden_size, tp, config.bias)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        segments: Segments | None,
        cache: KeyValueCache | None,
        layer: int,
    ) -> torch.Tensor:
        q_BTNH, k_BTGH, v_BTGH = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv(x_BTD))
        if rotary is not None:
            q_BTNH, k_BTGH = rotate(q_BTNH, rotary), rotate(k_BTGH, rotary)
        if cache is not None:
            k_BTGH, v_BTGH = cache.append(layer, k_BTGH, v_BTGH)
        if segments is not None:
            out = attention(q_BTNH, k_BTGH, v_BTGH, segments, self.causal)
        else:  # whole rows: decoding, and the Depformer's few positions
            causal = self.causal and q_BTNH.shape[1] > 1
            gqa = q_BTNH.shape[2] != k_BTGH.shape[2]
            q, k, v = q_BTNH.transpose(1, 2), k_BTGH.transpose(1, 2), v_BTGH.transpose(1, 2)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa).transpose(1, 2)
        return self.output(out.flatten(2))


class Mlp(nn.Module):
    def __init__(self, config: TransformerConfig, tp: TensorParallel) -> None:
        super().__init__()
        width = config.intermediate_size
        self.gated = config.mlp == "swiglu"
        parts = (width, width) if self.gated else (width,)
        self.up = ColumnParallelLinear(config.hidden_size, parts, tp, [config.bias] * len(parts))
        self.down = RowParallelLinear(width, config.hidden_size, tp, config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gated:
            gate, up = self.up(x)
            return self.down(F.silu(gate) * up)
        (up,) = self.up(x)
        return self.down(F.gelu(up))


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``. A leaf of ZeRO-3: its weights are gathered in one go."""

    def __init__(self, config: TransformerConfig, tp: TensorParallel, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.dropout = config.dropout
        self.attention_norm = Norm(config.hidden_size, config.norm, config.norm_eps)
        self.attention = Attention(config, tp)
        self.mlp_norm = Norm(config.hidden_size, config.norm, config.norm_eps)
        self.mlp = Mlp(config, tp)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        segments: Segments | None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        # dropout falls on the replicated residual branches only, so tensor-parallel ranks with equal seeds agree
        branch = self.attention(self.attention_norm(x_BTD), rotary, segments, cache, self.layer)
        x_BTD = x_BTD + F.dropout(branch, self.dropout, self.training)
        return x_BTD + F.dropout(self.mlp(self.mlp_norm(x_BTD)), self.dropout, self.training)


class Transformer(nn.Module):
    """A stack of blocks and its final norm."""

    def __init__(self, config: TransformerConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Block(config, tp, layer) for layer in range(config.num_layers))
        self.norm = Norm(config.hidden_size, config.norm, config.norm_eps)

    def forward(
        self,
        x_BTD: torch.Tensor,
        positions_BT: torch.Tensor,
        segments: Segments | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """``[B, T, D] -> [B, T, D]``. Without ``segments`` rows are whole; ``cache`` holds what was seen before."""
        config = self.config
        rotary = None
        if config.positions == "rope":
            rotary = rotary_table(positions_BT, config.width_of_head, config.rope_theta)
        elif config.positions == "sinusoidal":
            x_BTD = x_BTD + sinusoids(positions_BT, config.hidden_size).to(x_BTD.dtype)
        for layer in self.layers:
            x_BTD = layer(x_BTD, rotary, segments, cache)
        return self.norm(x_BTD)
