"""A Mimi of any size that has learned nothing, for tests and benchmarks: random layers, but codes as diverse as those of speech.

Entries are latents (then residuals) of random frames of random sounds, moved a little, so that most of them are some frame's
nearest. With plain random entries a random encoder, whose latents hardly leave their mean, uses a handful of 2048.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from transformers import MimiConfig, MimiModel
from transformers.models.mimi.modeling_mimi import MimiEuclideanCodebook

from megatron_omni.audio.codec import Mimi
from megatron_omni.runtime.seeds import generator, rng, stable_seed

ATTENTION = 0.3
"""Scale of what each layer of a transformer adds (Mimi starts at 0.01): enough that a clip's padding would be noticed."""


def random_mimi(config: MimiConfig, seed: int = 0, fitted_seconds: float = 60.0) -> MimiModel:
    """Random weights, and codebooks drawn from the latents of that much sound."""
    torch.manual_seed(stable_seed("random mimi", seed))
    model = MimiModel(config)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale.scale"):
            parameter.fill_(ATTENTION)
    lengths = [2 * config.sampling_rate] * round(fitted_seconds / 2)
    latents_ND = torch.cat(Mimi(model).latents(sounds(lengths, config.sampling_rate, seed))).clone()
    random = generator("random mimi entries", seed)
    for part in (model.quantizer.semantic_residual_vector_quantizer, model.quantizer.acoustic_residual_vector_quantizer):
        assert part.input_proj is not None, "give vector_quantization_hidden_dimension another size than hidden_size"
        residual_NP = latents_ND @ part.input_proj.weight[:, :, 0].T
        for layer in part.layers:
            frames_V = torch.randint(len(residual_NP), (config.codebook_size,), generator=random)
            moves_VP = torch.randn(config.codebook_size, residual_NP.shape[1], generator=random)
            entries_VP = residual_NP[frames_V] + 0.5 * residual_NP.std(0) * moves_VP
            codebook = cast(MimiEuclideanCodebook, layer.codebook)
            codebook.embed_sum.copy_(entries_VP)
            codebook.cluster_usage.fill_(1.0)
            codebook._embed = None  # or the model would go on with what it had computed from the old sums
            residual_NP = residual_NP - entries_VP[torch.cdist(residual_NP, entries_VP).argmin(1)]
    return model


def sounds(lengths: Sequence[int], sample_rate: int = 24_000, seed: int = 0) -> list[np.ndarray]:
    """Float32 [length] each: gliding harmonics and noise, both coming and going some four times a second as in speech."""
    random = rng("sounds", seed)
    return [_sound(length, sample_rate, random) for length in lengths]


def _sound(length: int, sample_rate: int, random: np.random.Generator) -> np.ndarray:
    seconds = np.arange(length) / sample_rate
    knots = np.arange(0.0, length / sample_rate + 0.5, 0.25)

    def envelope() -> np.ndarray:
        return np.interp(seconds, knots, np.exp(random.normal(-3.0, 1.5, len(knots))).clip(max=0.5))

    pitch = np.interp(seconds, knots, random.uniform(80.0, 300.0, len(knots)))
    phase = 2 * np.pi * np.cumsum(pitch) / sample_rate
    voice = sum(random.uniform(0.0, 1.0) / harmonic * np.sin(harmonic * phase) for harmonic in range(1, 12))
    wave: np.ndarray = envelope() * voice + envelope() * random.standard_normal(length)
    return wave.clip(-1.0, 1.0).astype(np.float32)
