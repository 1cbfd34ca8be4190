"""Asks an exported model: audio in, text and speech out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import soundfile
import torch
import typer

from megatron_omni.export import OmniForConditionalGeneration, OmniProcessor
from megatron_omni.runtime import cli


@dataclass(frozen=True)
class Generated:
    text: str
    frames: int | None
    """Of the codec; None without ``--out-audio``."""


def main(
    model: Annotated[Path, typer.Option(help="exported directory")],
    audio: Annotated[Path, typer.Option(help="audio file, any rate")],
    prompt: Annotated[str | None, typer.Option(help="text after the audio, such as 'Transcribe:'; default: none")] = None,
    out_audio: Annotated[Path | None, typer.Option(help="speak the answer into this file (.wav, .flac)")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer, tokens")] = 256,
    max_frames: Annotated[int, typer.Option(min=1, help="longest speech, codec frames")] = 500,
    temperature: Annotated[float, typer.Option(min=0, help="of text and speech; 0: greedy")] = 0.0,
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
) -> Generated:
    """Answers what AUDIO says, in text, and in speech if --out-audio names a file."""
    torch.manual_seed(seed)
    omni = OmniForConditionalGeneration.from_pretrained(model).eval()
    processor = OmniProcessor.from_pretrained(model)
    content: list[dict[str, Any]] = [{"type": "audio", "audio": audio}]
    if prompt:
        content.append({"type": "text", "text": prompt})
    inputs = processor([{"role": "user", "content": content}])
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    if out_audio is None:
        sequences, frames = omni.generate(**inputs, max_new_tokens=max_new_tokens, **sampling), None
    else:
        speech = omni.generate_speech(
            **inputs,
            max_frames=max_frames,
            speech_temperature=temperature,
            speech_seed=seed,
            max_new_tokens=max_new_tokens,
            **sampling,
        )
        sequences, frames = speech.sequences, speech.codes[0].shape[1]
        soundfile.write(out_audio, speech.waves[0], speech.sample_rate)
    return Generated(processor.batch_decode(sequences)[0], frames)


if __name__ == "__main__":
    cli.command(main)
