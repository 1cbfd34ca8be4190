"""The part of a build that runs in many processes: a line of the manifest becomes FLAC, waves to encode and ready codes."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import fsspec
import numpy as np

from megatron_omni.audio.waveform import decode_with_ffmpeg, read_audio, resample, write_flac
from megatron_omni.data.building.gate import Action
from megatron_omni.data.building.options import BuildOptions, Decoder
from megatron_omni.data.shards.info import AUDIO_RATE
from megatron_omni.data.sources.line import Clip, Embedded, Entry, File, Reject
from megatron_omni.runtime.errors import InputError
from megatron_omni.schema import Sample


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
    warnings: tuple[Reject, ...] = ()

    def seconds(self, rate: int) -> float:
        return sum(wave.size for wave in self.waves.values()) / rate


def prepare(entry: Entry | Reject, options: BuildOptions) -> Prepared | Reject:
    """Reads and checks all that a line names."""
    if isinstance(entry, Reject):
        return entry
    try:
        return _prepare(entry, options)
    except InputError as error:
        return Reject(entry.line, entry.sample.id, str(error))


def _prepare(entry: Entry, options: BuildOptions) -> Prepared | Reject:
    for message in entry.sample.messages:
        for part in message.content:
            if part.type == "text" and not part.value.strip():
                raise InputError(f"the text of the {message.role} is empty; write what is said, or leave the key or the part out")
    codec = options.codec
    codes, waves = {}, {}
    broken: list[tuple[str, Action, str]] = []
    if codec is not None:
        codes = {name: read_codes(file, codec.num_codebooks, codec.card) for name, file in entry.codes.items()}
        for name, clip in entry.speech.items():
            wave, rate = _read(clip, options.decoder)
            broken += options.gate.check_wave(name, wave, rate)
            waves[name] = _resample(clip, wave, rate, codec.sample_rate)
    heard = {}
    for name, clip in entry.audio.items():
        wave, rate = _read(clip, options.decoder)
        broken += options.gate.check_wave(name, wave, rate)
        heard[name] = _resample(clip, wave, rate, AUDIO_RATE)
    if entry.sample.task == "transcribe" and len(heard) == 1:
        said = "".join(part.value for message in entry.sample.messages if message.role == "assistant" for part in message.content)
        broken += options.gate.check_text(said, heard["audio0"].size / AUDIO_RATE)
    seconds = sum(wave.size for wave in heard.values()) / AUDIO_RATE
    found = [Reject(entry.line, entry.sample.id, what, rule, "warn", seconds) for rule, _, what in broken]
    for judged, (_, action, _) in zip(found, broken, strict=True):
        if action == "reject":
            return replace(judged, action="reject")
    sample = replace(entry.sample, num_samples={name: wave.size for name, wave in heard.items()})
    return Prepared(sample, {name: write_flac(wave, AUDIO_RATE) for name, wave in heard.items()}, codes, waves, tuple(found))


class _NamedBytes(io.BytesIO):
    """Bytes that error messages can name."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name


def _read(clip: Clip, decoder: Decoder) -> tuple[np.ndarray, int]:
    """The clip's stretch at its own rate."""
    file = clip.file
    if decoder == "ffmpeg" and (not isinstance(file, Path) or file.is_file()):
        wav = decode_with_ffmpeg(file if isinstance(file, Path) else _bytes(file))
        return read_audio(_NamedBytes(wav, _name(file)), clip.start, clip.end, clip.channel)
    source = file if isinstance(file, Path) else _NamedBytes(_bytes(file), _name(file))
    return read_audio(source, clip.start, clip.end, clip.channel)


def _bytes(file: str | Embedded) -> bytes:
    if isinstance(file, Embedded):
        return file.data
    try:
        with fsspec.open(file, "rb") as remote:
            return cast(bytes, remote.read())
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error}); check the URL") from error


def _resample(clip: Clip, wave: np.ndarray, rate: int, target: int) -> np.ndarray:
    wave = resample(wave, rate, target)
    if wave.size == 0:
        raise InputError(f"{_name(clip.file)}: is too short to hold a sample at {target} Hz; drop its line")
    return wave


def read_codes(file: File | np.ndarray, num_codebooks: int, card: int) -> np.ndarray:
    """Reads ready codes, integers [K, T] below ``card``: a ``.npy`` file or an array; returns uint16.

    Raises:
        InputError: Anything else. Nothing is cut or turned: ``[T, K]`` and too many codebooks look alike.
    """
    name = _name(file)
    try:
        if isinstance(file, np.ndarray):
            codes = file
        elif isinstance(file, Path):
            codes = np.load(file, mmap_mode="r", allow_pickle=False)  # mapped: a lying header takes no memory
        else:
            codes = np.load(io.BytesIO(_bytes(file)), allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such file of codes; check the path in the manifest (it is relative to the manifest)") from error
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{name}: cannot be read as a .npy array ({error}); write it with numpy.save") from error
    if isinstance(codes, np.ndarray) and codes.size == 0:
        raise InputError(f"{name}: are empty, as a failed encoding leaves them; encode the clip again, or drop its line")
    if not isinstance(codes, np.ndarray) or codes.dtype.kind not in "iu":
        raise InputError(f"{name}: holds {getattr(codes, 'dtype', 'an archive')}, expected integers; write codes as uint16")
    if codes.ndim != 2 or codes.shape[0] != num_codebooks:
        raise InputError(f"{name}: has shape {list(codes.shape)}, expected [{num_codebooks}, frames]; one row per codebook")
    if codes.min() < 0 or codes.max() >= card:
        raise InputError(f"{name}: codes span {codes.min()}..{codes.max()}, expected 0..{card - 1}; were they made with another codec?")
    return np.ascontiguousarray(codes, dtype=np.uint16)


def _name(file: File | np.ndarray) -> str:
    if isinstance(file, np.ndarray):
        return "codes"
    return file.name if isinstance(file, Embedded) else str(file)
