"""Waveforms in and out: reading any file that libsndfile knows, resampling, and the 16-bit FLAC members of a shard."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import soundfile
import soxr

from megatron_omni.runtime.errors import InputError

MAX_SAMPLES = 2**30
"""Longest read, channels counted: 4 GiB of float32. A header that promises more is refused before any memory is taken."""

END_SLACK = 0.05
"""Seconds by which a manifest's ``end`` may pass the end of the file: labels are often rounded up."""


def read_audio(path: Path | BinaryIO, start: float | None = None, end: float | None = None) -> tuple[np.ndarray, int]:
    """Reads ``[start, end)`` seconds of an audio file, its channels averaged.

    Returns:
        float32 [W] at the file's own rate, and that rate in Hz.

    Raises:
        InputError: The file is missing, unreadable, empty or too long, holds NaN or infinity, or does not reach the cut.
    """
    name = str(path) if isinstance(path, Path) else getattr(path, "name", "audio bytes")
    if isinstance(path, Path) and not path.is_file():
        raise InputError(f"{name}: no such audio file; check the path in the manifest (it is relative to the manifest)")
    try:
        with soundfile.SoundFile(path) as file:
            rate, total = file.samplerate, file.frames
            first, last = _cut(name, rate, total, start, end)
            if (last - first) * file.channels > MAX_SAMPLES:
                length = f"{(last - first) / rate:.0f} s in {file.channels} channels"
                raise InputError(f"{name}: {length} are more than {MAX_SAMPLES} samples; cut it into pieces")
            file.seek(first)
            wave = file.read(last - first, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise InputError(f"{name}: cannot be read as audio ({error}); convert it to WAV or FLAC, or drop its line") from error
    if len(wave) == 0:
        raise InputError(f"{name}: holds no audio between {first / rate:.3f} and {last / rate:.3f} s")
    if not np.isfinite(wave).all():
        raise InputError(f"{name}: holds NaN or infinite samples; write it again from its source, or drop its line")
    mono = wave[:, 0] if wave.shape[1] == 1 else wave.mean(axis=1)
    return np.ascontiguousarray(mono), rate


def _cut(name: str, rate: int, total: int, start: float | None, end: float | None) -> tuple[int, int]:
    """First and last + 1 sample of a cut in seconds."""
    if total == 0:
        raise InputError(f"{name}: holds no audio at all; record it again, or drop its line")
    duration = total / rate
    start, end = start or 0.0, duration if end is None else end
    if not 0 <= start < end <= duration + END_SLACK:
        raise InputError(f"{name}: start={start:g}, end={end:g} is no part of its {duration:.3f} s; correct the manifest line")
    return round(start * rate), min(round(end * rate), total)


def resample(wave: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Resamples float32 [W] from ``rate`` to ``target`` Hz with soxr's HQ filter; the same array comes back if they are equal."""
    if rate == target:
        return wave.astype(np.float32, copy=False)
    return cast(np.ndarray, soxr.resample(wave.astype(np.float32, copy=False), rate, target, quality="HQ"))


def write_flac(wave: np.ndarray, rate: int) -> bytes:
    """Encodes float32 [W] as 16-bit mono FLAC; samples outside [-1, 1) are clipped.

    Reading back gives multiples of 1/32768, so that a second round trip changes nothing.
    """
    buffer = io.BytesIO()
    samples = np.clip(np.rint(wave * 32768.0), -32768, 32767).astype(np.int16)
    soundfile.write(buffer, samples, rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def read_flac(data: bytes) -> np.ndarray:
    """Decodes the bytes of an audio member to float32 [W]; raises InputError as ``read_audio`` does."""
    return read_audio(io.BytesIO(data))[0]
