"""Mimi encoding of clips of mixed length: batched and clip by clip with our codec, clip by clip with transformers; codes compared."""

from __future__ import annotations

import statistics
from typing import Annotated

import numpy as np
import torch
import typer
from common import in_turns, median_ratio, write_result
from transformers import MimiConfig, MimiModel

from megatron_omni.audio.codec import Mimi
from megatron_omni.demo.random_codec import random_mimi, sounds
from megatron_omni.runtime import cli
from megatron_omni.runtime.seeds import rng


def published_mimi(device: str = "cpu") -> Mimi:
    """Mimi's published architecture with 8 codebooks and random weights."""
    return Mimi(random_mimi(MimiConfig(num_quantizers=8)), device=device)


def main(
    seconds: Annotated[float, typer.Option(help="of audio in each group of clips")] = 60.0,
    rounds: int = 3,
    device: str = "cpu",
    threads: Annotated[int, typer.Option(help="on a CPU")] = 1,
) -> dict[str, object]:
    """Encodes short clips (0.05-0.5 s), then longer ones (0.5-8 s): the same ones every way, in turns."""
    torch.set_num_threads(threads)
    model = random_mimi(MimiConfig(num_quantizers=8))
    codec = Mimi(model, device=device)
    groups = {
        "clips of 0.05-0.5 s": _measured(codec, model, _clips(0.05, 0.5, seconds), rounds),
        "clips of 0.5-8 s": _measured(codec, model, _clips(0.5, 8.0, seconds), rounds),
    }
    return write_result(f"encode_mimi_{codec.device.type}", {"threads": threads, **groups}, ("transformers",))


def _clips(shortest: float, longest: float, seconds: float) -> list[np.ndarray]:
    count = round(2 * seconds / (shortest + longest))
    return sounds([int(24_000 * length) for length in rng("bench clips", count).uniform(shortest, longest, count)])


def _measured(codec: Mimi, model: MimiModel, waves: list[np.ndarray], rounds: int) -> dict[str, object]:
    def with_transformers() -> list[np.ndarray]:
        whole = [np.pad(wave, (0, -len(wave) % codec.samples_per_frame)) for wave in waves]
        with torch.inference_mode():
            return [model.encode(torch.from_numpy(wave)[None, None].to(codec.device)).audio_codes[0].cpu().numpy() for wave in whole]

    ways = {"batched": lambda: codec.encode(waves), "single": lambda: [codec.encode([wave])[0] for wave in waves]}
    ways["transformers"] = with_transformers
    compared = {name: codec.compare(waves, way()) for name, way in ways.items()}  # a warm-up too
    times = in_turns(ways, rounds)
    seconds = sum(wave.size for wave in waves) / codec.sample_rate
    return {
        "clips": len(waves),
        "audio_seconds": seconds,
        "times_real_time": {name: seconds / statistics.median(taken) for name, taken in times.items()},
        "batched_over_single": median_ratio(times, "single", "batched"),
        "batched_over_transformers": median_ratio(times, "transformers", "batched"),
        "frames": compared["single"].frames,
        "differing_frames_from_batched": {name: found.differing_frames for name, found in compared.items()},
        "beyond_ties": {name: found.beyond_ties for name, found in compared.items()},
    }


if __name__ == "__main__":
    cli.command(main)
