"""A stand-in for Mimi where no weights can be downloaded: the real ``MimiModel`` made small, with codebooks fitted to audio.

Nothing is trained. What makes the random encoder useful:

1. Each strided convolution but the first gets a random mix of channels times a Hann window. What ELU has rectified is
   thereby smoothed before it is sampled, and a latent follows the energy in random bands instead of the phase of the wave;
   with plain random kernels a shift by a millisecond gives unrelated latents.
2. Each convolution of the encoder is scaled to unit variance per channel on real audio, in order (LSUV, Mishkin and
   Matas, arXiv:1511.06422), so that no layer collapses or saturates.
3. The projections of the quantizer are principal components; its codebooks are residual k-means of the projected latents.

The decoder stays random up to its loudness: decoded audio has the rhythm of the speech, not its words.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn
from transformers import MimiConfig, MimiModel
from transformers.models.mimi.modeling_mimi import MimiEuclideanCodebook, MimiResidualVectorQuantizer

from megatron_omni.audio.codec import Mimi
from megatron_omni.audio.waveform import read_audio, resample
from megatron_omni.runtime.errors import InputError, WorkError
from megatron_omni.runtime.seeds import generator, rng, stable_seed

GAIN = 2.0
"""Standard deviation in front of each ELU: large enough to rectify."""
FIT_SECONDS = 900.0
"""Audio that the codebooks are fitted to, at most."""
SCALE_SECONDS = 30.0
"""Audio that the convolutions are scaled on, at most."""
KMEANS_STEPS = 15


def small_mimi() -> MimiConfig:
    """Mimi's structure (24 kHz, 12.5 frames a second, one semantic and seven acoustic codebooks), 8 filters wide, 256 entries."""
    return MimiConfig(
        num_filters=8,
        hidden_size=64,
        num_hidden_layers=1,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=4,
        upsample_groups=64,
        num_quantizers=8,
        codebook_size=256,
        codebook_dim=32,
        vector_quantization_hidden_dimension=32,
    )


def fit_codec(wave_files: Sequence[Path], out: Path, seed: int = 0, config: MimiConfig | None = None) -> Path:
    """Writes a small Mimi, fitted to the given recordings, as a Hugging Face folder; returns ``out``.

    A folder that lies there is replaced. ``config`` is the codec's shape, ``small_mimi()`` by default.

    Raises:
        InputError: The recordings hold too little sound for codebooks, or one cannot be read.
        WorkError: What was written does not load as the same codec.
    """
    config = config or small_mimi()
    waves = _read(wave_files, config.sampling_rate, seed)
    torch.manual_seed(stable_seed("codec", seed))
    model = MimiModel(config)
    model.requires_grad_(False)
    model.train(False)
    _smooth(model, seed)
    _scale_encoder(model, _join(waves, SCALE_SECONDS, config.sampling_rate))
    latents_ND = torch.cat(Mimi(model).latents(waves)).clone()  # a clone: inference tensors cannot be trained on
    if len(latents_ND) < 4 * config.codebook_size:
        raise InputError(f"{len(latents_ND)} frames are too few for codebooks of {config.codebook_size}; give 4 or more an entry")
    _fit_quantizer(model, latents_ND, seed)
    _scale_decoder(model, waves)
    return _save(model, out, waves[:4])


def _read(wave_files: Sequence[Path], rate: int, seed: int) -> list[np.ndarray]:
    """A random choice of the recordings, at most ``FIT_SECONDS`` long, each float32 [W]."""
    waves, seconds = [], 0.0
    for index in rng("codec waves", seed).permutation(len(wave_files)):
        if seconds >= FIT_SECONDS:
            break
        waves.append(resample(*read_audio(wave_files[index]), rate))
        seconds += len(waves[-1]) / rate
    return waves


def _join(waves: Sequence[np.ndarray], seconds: float, rate: int) -> torch.Tensor:
    """One long clip, float32 [1, 1, W]."""
    return torch.from_numpy(np.concatenate(waves)[: round(seconds * rate)])[None, None]


def _smooth(model: MimiModel, seed: int) -> None:
    """Replaces the kernels of the strided convolutions but the first (which hears the bands) by mix [O, I, 1] * window [width]."""
    strided = [module for module in model.modules() if isinstance(module, nn.Conv1d) and module.stride[0] > 1]
    random = generator("codec smooth", seed)
    for conv in strided[1:]:
        out, into, width = conv.weight.shape
        window = torch.hann_window(width + 2, periodic=False)[1:-1]
        conv.weight.copy_(torch.randn(out, into, 1, generator=random) / math.sqrt(into) * window)


def _scale_encoder(model: MimiModel, wave: torch.Tensor) -> None:
    """One pass over ``wave`` in which each convolution is scaled as soon as it has run, before the next one hears it."""

    def unit_variance(conv: nn.Conv1d, _inputs: tuple[torch.Tensor], output_BDT: torch.Tensor) -> torch.Tensor:
        mean_D = output_BDT.mean((0, 2)) if conv.bias is not None else torch.zeros(output_BDT.shape[1])
        scale_D = GAIN / (output_BDT.std((0, 2)) + 1e-6)
        conv.weight.mul_(scale_D[:, None, None])
        if conv.bias is not None:
            # thresholds differ between channels: what was the centre of a channel is now up to a deviation off
            shift_D = conv.bias.sign() * GAIN / 2
            conv.bias.sub_(mean_D).mul_(scale_D).add_(shift_D)
            return (output_BDT - mean_D[:, None]) * scale_D[:, None] + shift_D[:, None]
        return output_BDT * scale_D[:, None]

    _hooked(model, (nn.Conv1d,), unit_variance, lambda: model.encode(wave, num_quantizers=1))


def _scale_decoder(model: MimiModel, waves: Sequence[np.ndarray]) -> None:
    """The same for the decoder, whose last convolution gets the loudness of the recordings."""
    mimi = Mimi(model)
    codes = torch.from_numpy(mimi.encode([np.concatenate(waves)[: 10 * mimi.sample_rate]])[0].astype(np.int64))[None]
    loudness = float(np.concatenate(waves).std())

    def unit_variance(conv: nn.Conv1d | nn.ConvTranspose1d, _inputs: tuple[torch.Tensor], output_BDT: torch.Tensor) -> torch.Tensor:
        scale = (loudness if output_BDT.shape[1] == 1 else 1.0) / (float(output_BDT.std()) + 1e-6)
        conv.weight.mul_(scale)
        if conv.bias is not None:
            conv.bias.mul_(scale)
        return output_BDT * scale

    _hooked(model, (nn.Conv1d, nn.ConvTranspose1d), unit_variance, lambda: model.decode(codes))


def _hooked(
    model: MimiModel, kinds: tuple[type[nn.Module], ...], hook: Callable[..., torch.Tensor | None], run: Callable[[], object]
) -> None:
    """Runs with a forward hook on each convolution outside the quantizer (versions of transformers differ in the names of the parts)."""
    handles = [
        module.register_forward_hook(hook)
        for name, module in model.named_modules()
        if isinstance(module, kinds) and not name.startswith("quantizer")
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()


def _fit_quantizer(model: MimiModel, latents_ND: torch.Tensor, seed: int) -> None:
    """Sets projections and codebooks: the semantic part hears the principal components as they are, the acoustic part half whitened."""
    quantizer = model.quantizer
    _, _, components_PD = torch.linalg.svd(latents_ND - latents_ND.mean(0), full_matrices=False)
    for part, whitening in ((quantizer.semantic_residual_vector_quantizer, 0.0), (quantizer.acoustic_residual_vector_quantizer, 0.5)):
        project, back = _projections(part)
        basis_PD = components_PD[: project.out_channels]
        weights_P = (latents_ND @ basis_PD.T).std(0) ** -whitening
        project.weight.copy_((basis_PD * weights_P[:, None])[:, :, None])
        # the decoder hears the sum of both parts
        back.weight.copy_((basis_PD / weights_P[:, None]).T[:, :, None] / 2)
        residual_NP = latents_ND @ (basis_PD * weights_P[:, None]).T
        for level, layer in enumerate(part.layers):
            centroids_VP = kmeans(residual_NP, model.config.codebook_size, generator("codec kmeans", seed, str(whitening), level))
            codebook = cast(MimiEuclideanCodebook, layer.codebook)
            codebook.embed_sum.copy_(centroids_VP)
            codebook.cluster_usage.fill_(1.0)
            codebook._embed = None  # or the model would go on with what it had computed from the old sums
            residual_NP = residual_NP - centroids_VP[_nearest(residual_NP, centroids_VP)]


def _projections(part: MimiResidualVectorQuantizer) -> tuple[nn.Conv1d, nn.Conv1d]:
    """Into and out of the quantizer's space; ``small_mimi`` has both."""
    assert part.input_proj is not None and part.output_proj is not None
    return part.input_proj, part.output_proj


def kmeans(points_ND: torch.Tensor, count: int, random: torch.Generator) -> torch.Tensor:
    """Lloyd's algorithm from random points; a centroid that no point is nearest to starts again at one. float32 [count, D]."""
    centroids_VD = points_ND[torch.randperm(len(points_ND), generator=random)[:count]].clone()
    for _ in range(KMEANS_STEPS):
        nearest_N = _nearest(points_ND, centroids_VD)
        sizes_V = torch.bincount(nearest_N, minlength=count)
        sums_VD = torch.zeros_like(centroids_VD).index_add_(0, nearest_N, points_ND)
        fresh_VD = points_ND[torch.randint(len(points_ND), (count,), generator=random)]
        centroids_VD = torch.where(sizes_V[:, None] > 0, sums_VD / sizes_V.clamp(min=1)[:, None], fresh_VD)
    return centroids_VD


def _nearest(points_ND: torch.Tensor, centroids_VD: torch.Tensor) -> torch.Tensor:
    """int64 [N]."""
    return torch.cat([torch.cdist(chunk, centroids_VD).argmin(1) for chunk in torch.split(points_ND, 16384)])


def _save(model: MimiModel, out: Path, waves: Sequence[np.ndarray]) -> Path:
    """Writes the folder under another name, loads it, compares, and gives it its name."""
    partial = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    written, expected = Mimi.from_pretrained(partial), Mimi(model)
    same = all(np.array_equal(a, b) for a, b in zip(written.encode(waves), expected.encode(waves), strict=True))
    if not same or written.weights_hash != expected.weights_hash:
        raise WorkError(f"codec {out}: it does not give the same codes once it was written and loaded again")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)
    return out
