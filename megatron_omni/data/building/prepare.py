"""The part of a build that runs in many processes: a line of the manifest becomes FLAC, waves to encode and ready codes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_omni.audio.waveform import read_audio, resample, write_flac
from megatron_omni.data.shards.dataset import AUDIO_RATE, BuildOptions
from megatron_omni.data.sources.manifest import Clip, Entry
from megatron_omni.runtime.errors import InputError
from megatron_omni.schema import Sample


@dataclass(frozen=True)
class Reject:
    """A line of the manifest that gave no sample; a line of ``rejects.jsonl``."""

    line: int
    id: str
    reason: str


@dataclass(frozen=True)
class Prepared:
    """A sample decoded; its speech may still have to be encoded."""

    sample: Sample
    audio: dict[str, bytes]
    """FLAC."""
    codes: dict[str, np.ndarray]
    """uint16 [K, T]."""
    waves: dict[str, np.ndarray]
    """float32 [W] at the codec's rate, to be encoded."""

    def seconds(self, rate: int) -> float:
        return sum(wave.size for wave in self.waves.values()) / rate


@dataclass(frozen=True)
class Chunk:
    """What a process takes at a time: some lines of one shard."""

    number: int
    """Of the shard."""
    entries: list[Entry]
    options: BuildOptions


def prepare_chunk(chunk: Chunk) -> tuple[int, list[Prepared | Reject]]:
    return chunk.number, [prepare(entry, chunk.options) for entry in chunk.entries]


def prepare(entry: Entry, options: BuildOptions) -> Prepared | Reject:
    """Reads and checks all that a line names."""
    try:
        for message in entry.sample.messages:
            for part in message.content:
                if part.type == "text" and not part.value.strip():
                    raise InputError(f"the text of the {message.role} is empty; write what is said, or leave the key or the part out")
        codec = options.codec
        if codec is None:
            waves, codes = {}, {}
        else:
            waves = {name: _read(clip, codec.sample_rate) for name, clip in entry.speech.items()}
            codes = {name: read_codes(path, codec.num_codebooks, codec.card) for name, path in entry.codes.items()}
        heard = {name: _read(clip, AUDIO_RATE) for name, clip in entry.audio.items()}
    except InputError as error:
        return Reject(entry.line, entry.sample.id, str(error))
    sample = replace(entry.sample, num_samples={name: wave.size for name, wave in heard.items()})
    return Prepared(sample, {name: write_flac(wave, AUDIO_RATE) for name, wave in heard.items()}, codes, waves)


def _read(clip: Clip, rate: int) -> np.ndarray:
    wave = resample(*read_audio(clip.path, clip.start, clip.end), rate)
    if wave.size == 0:
        raise InputError(f"{clip.path}: is too short to hold a sample at {rate} Hz; drop its line")
    return wave


def read_codes(path: Path, num_codebooks: int, card: int) -> np.ndarray:
    """Reads ready codes: a ``.npy`` file with integers [K, T] below ``card``; returns uint16.

    Raises:
        InputError: Anything else. Nothing is cut or turned: ``[T, K]`` and too many codebooks look alike.
    """
    try:
        codes: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a lying header takes no memory
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file of codes; check the path in the manifest (it is relative to the manifest)") from error
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as a .npy array ({error}); write it with numpy.save") from error
    if not isinstance(codes, np.ndarray) or codes.dtype.kind not in "iu":
        raise InputError(f"{path}: holds {getattr(codes, 'dtype', 'an archive')}, expected integers; write codes as uint16")
    if codes.ndim != 2 or codes.shape[0] != num_codebooks or codes.shape[1] == 0:
        raise InputError(f"{path}: has shape {list(codes.shape)}, expected [{num_codebooks}, frames]; one row per codebook")
    if codes.min() < 0 or codes.max() >= card:
        raise InputError(f"{path}: codes span {codes.min()}..{codes.max()}, expected 0..{card - 1}; were they made with another codec?")
    return np.ascontiguousarray(codes, dtype=np.uint16)
