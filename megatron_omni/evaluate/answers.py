"""What the model says: greedy text for every sample, and for some of them speech to listen to."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch

from megatron_omni.data.rows.demands import Samples
from megatron_omni.evaluate.samples import last_codes, question
from megatron_omni.export.modeling import OmniForConditionalGeneration
from megatron_omni.export.processing import Chat, OmniProcessor
from megatron_omni.runtime.cli import progress
from megatron_omni.runtime.files import atomic_write


class Recording(NamedTuple):
    """Waves of one sample, as paths relative to the folder above theirs."""

    input_wav: str | None
    """What the model heard last; None for a question in text."""
    target_wav: str
    """The codes that it should have said, decoded."""
    generated_wav: str
    """What it said, to the text that it generated."""


@torch.inference_mode()
def generate_texts(
    model: OmniForConditionalGeneration, processor: OmniProcessor, samples: Samples, batch_size: int, max_new_tokens: int
) -> list[str]:
    """The model's most probable next turn for each sample's question, in the order of ``samples``."""
    lengths = [sum(samples.sample(number).num_samples.values()) for number in range(len(samples))]
    order = np.argsort(lengths, kind="stable")[::-1]  # alike together; the largest first, so that memory runs out at once or never
    batches: Sequence[np.ndarray] = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    texts = [""] * len(order)
    for batch in progress(batches, "generating text"):
        inputs = processor([chat(samples, number) for number in batch.tolist()]).to(model.device)
        generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        for number, text in zip(batch.tolist(), processor.batch_decode(generated), strict=True):
            texts[number] = text
    return texts


@torch.inference_mode()
def record_speech(
    model: OmniForConditionalGeneration,
    processor: OmniProcessor,
    samples: Samples,
    numbers: Sequence[int],
    folder: Path,
    max_new_tokens: int,
) -> dict[int, Recording]:
    """Writes ``folder/NUMBER-{input,target,generated}.wav`` of the samples ``numbers``, whose last turns hold codes."""
    mimi = model.mimi()
    recordings: dict[int, Recording] = {}
    for number in progress(numbers, "generating speech"):
        sample, arrays = samples.sample(number), samples.arrays(number)
        target_KT = arrays.codes[last_codes(sample)[-1]]
        speech = model.generate_speech(
            **processor(chat(samples, number)).to(model.device),
            max_frames=2 * target_KT.shape[1] + round(mimi.frame_rate),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        heard = [arrays.audio[part.value] for message in sample.messages for part in message.content if part.type == "audio"]
        recordings[number] = Recording(
            input_wav=_write(folder, number, "input", heard[-1], processor.sampling_rate) if heard else None,
            target_wav=_write(folder, number, "target", mimi.decode(target_KT), mimi.sample_rate),
            generated_wav=_write(folder, number, "generated", speech.waves[0], speech.sample_rate),
        )
    return recordings


def _write(folder: Path, number: int, kind: str, wave: np.ndarray, rate: int) -> str:
    path = folder / f"{number:05d}-{kind}.wav"
    content = io.BytesIO()
    soundfile.write(content, wave, rate, format="WAV")
    atomic_write(path, content.getvalue())
    return str(path.relative_to(folder.parent))


def chat(samples: Samples, number: int) -> Chat:
    """The question of a sample as the processor takes it, its waves in place of their names."""
    audio = samples.arrays(number).audio
    return [
        {
            "role": message.role,
            "content": [
                {"type": "audio", "audio": audio[part.value]} if part.type == "audio" else part.to_json()
                for part in message.content
                if part.type != "codes"
            ],
        }
        for message in question(samples.sample(number))
    ]
