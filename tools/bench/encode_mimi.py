"""Mimi encoding of clips of mixed length: batched by our codec, and one clip at a time as loaders do it; the codes are compared."""

from __future__ import annotations

import statistics
from typing import Annotated

import numpy as np
import torch
import typer
from common import in_turns, median_ratio, write_result
from transformers import MimiConfig, MimiModel

from megatron_omni.audio.codec import Mimi
from megatron_omni.runtime import cli


def published_mimi(device: str = "cpu") -> Mimi:
    """Mimi's published architecture with 8 codebooks, random weights, and codebooks on the scale of its latents."""
    torch.manual_seed(0)
    model = MimiModel(MimiConfig(num_quantizers=8))
    for name, buffer in model.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_()
    codec = Mimi(model)
    wave = np.random.default_rng(0).normal(0, 0.1, 240_000).astype(np.float32)
    scale = float(codec.latents([wave])[0].std())
    with torch.no_grad():
        for part in (model.quantizer.semantic_residual_vector_quantizer, model.quantizer.acoustic_residual_vector_quantizer):
            part.input_proj.weight.div_(scale * float(part.input_proj.weight.std()) * model.config.hidden_size**0.5)
    return Mimi(model, device=device)


def main(
    clips: Annotated[int, typer.Option(help="to encode")] = 40,
    shortest: Annotated[float, typer.Option(help="seconds")] = 0.5,
    longest: Annotated[float, typer.Option(help="seconds")] = 6.0,
    rounds: int = 3,
    device: str = "cpu",
    threads: int = 1,
) -> dict[str, object]:
    """Encodes the same clips both ways, in turns."""
    torch.set_num_threads(threads)
    codec = published_mimi(device)
    random = np.random.default_rng(1)
    waves = [random.normal(0, 0.1, int(24_000 * seconds)).astype(np.float32) for seconds in random.uniform(shortest, longest, clips)]
    seconds = sum(wave.size for wave in waves) / 24_000
    batched, single = codec.encode(waves), [codec.encode([wave])[0] for wave in waves]
    codec.compare(waves, batched)
    times = in_turns({"batched": lambda: codec.encode(waves), "single": lambda: [codec.encode([wave]) for wave in waves]}, rounds)
    differing = sum(int((a != b).any(0).sum()) for a, b in zip(batched, single, strict=True))
    return write_result(
        f"encode_mimi_{device.split(':')[0]}",
        {
            "audio_seconds": seconds,
            "threads": threads,
            "times_real_time": {name: seconds / statistics.median(taken) for name, taken in times.items()},
            "batched_over_single": median_ratio(times, "single", "batched"),
            "frames": sum(codes.shape[1] for codes in batched),
            "differing_frames": differing,
            "differing_frames_beyond_ties": codec.compare(waves, single).beyond_ties,
        },
        ("transformers",),
    )


if __name__ == "__main__":
    cli.command(main)
