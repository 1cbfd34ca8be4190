"""Initial weights, in one place, as a function of (seed, parameter name): the same for every TP and ZeRO layout.

==========================================  ==============================================================
weight                                      distribution
==========================================  ==============================================================
norms                                       1 (bias 0); the projector's: the embedding's deviation
biases                                      0
``llm.embedding``, ``llm.head``             normal, deviation 1 / sqrt(D)
codebook embeddings, ``no_text``            normal, deviation 1 / sqrt(D)
linear and convolution weights, heads       normal, deviation 1 / sqrt(fan in)
``output``/``down`` of a stack of n blocks  the same, divided by sqrt(2 n), so that the residual stream keeps its size
==========================================  ==============================================================
"""

from __future__ import annotations

import math

import torch

from megatron_omni.config.model import ModelConfig, TransformerConfig
from megatron_omni.parallel.layout import TensorLayout
from megatron_omni.runtime.seeds import generator


def _stack_of(name: str, config: ModelConfig) -> TransformerConfig:
    head = config.audio_head
    stacks = {
        "encoder.": config.encoder.stack,
        "llm.": config.llm.stack,
        "audio_head.pre_nn.": head.pre_nn,
        "audio_head.decoder.": head.decoder,
        "audio_head.depformer.": head.depformer,
    }
    return next(stack for prefix, stack in stacks.items() if name.startswith(prefix))


def initial_value(name: str, layout: TensorLayout, config: ModelConfig, seed: int) -> torch.Tensor:
    """The logical (whole) float32 tensor of parameter ``name``."""
    shape = layout.shape
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if name == "projector.norm.weight":
        return torch.full(shape, 1 / math.sqrt(config.llm.stack.hidden_size))
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    fan_in = shape[1] * shape[2] if "convolutions" in name else shape[-1]
    deviation = 1 / math.sqrt(fan_in)
    if name.endswith((".attention.output.weight", ".mlp.down.weight")):
        deviation /= math.sqrt(2 * _stack_of(name, config).num_layers)
    return torch.randn(shape, generator=generator(seed, "init", name)) * deviation
