"""Waveforms in and out: reading any file that libsndfile knows, resampling, and the 16-bit FLAC members of a shard."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
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


MIN_RATE, MAX_RATE = 4_000, 384_000
"""Hz that a header may say; anything else is a header that lies."""

_HEAD, _TAIL = 65_536, 131_072
"""Bytes at both ends in which headers are looked for; a page of Ogg has at most 65,307."""


def read_audio(
    source: Path | BinaryIO, start: float | None = None, end: float | None = None, channel: int | None = None
) -> tuple[np.ndarray, int]:
    """Reads ``[start, end)`` seconds of an audio file; only these are decoded.

    Args:
        channel: From 0; None: the average of all.

    Returns:
        float32 [W] at the file's own rate, and that rate in Hz.

    Raises:
        InputError: The file is missing, unreadable, cut, empty or too long, holds NaN or infinity, lacks the channel, or does not
            reach the cut.
    """
    name = str(source) if isinstance(source, Path) else getattr(source, "name", "audio bytes")
    if isinstance(source, Path):
        if not source.is_file():
            raise InputError(f"{name}: no such audio file; check the path in the manifest (it is relative to the manifest)")
        with open(source, "rb") as file:
            return _read(file, name, start, end, channel)
    return _read(source, name, start, end, channel)


def _read(source: BinaryIO, name: str, start: float | None, end: float | None, channel: int | None) -> tuple[np.ndarray, int]:
    if missing := missing_bytes(source):
        raise InputError(f"{name}: is cut: its header promises {missing} bytes more than there are; fetch it again, or drop its line")
    try:
        with soundfile.SoundFile(source) as file:
            rate, total = file.samplerate, file.frames
            if not MIN_RATE <= rate <= MAX_RATE:
                raise InputError(f"{name}: its header says {rate} Hz, expected {MIN_RATE}..{MAX_RATE}; the header is wrong: write it again")
            if channel is not None and channel >= file.channels:
                raise InputError(f"{name}: has {file.channels} channels, no channel {channel} (from 0); correct the manifest line")
            first, last = _cut(name, rate, total, start, end)
            if (last - first) * file.channels > MAX_SAMPLES:
                length = f"{(last - first) / rate:.0f} s in {file.channels} channels"
                raise InputError(f"{name}: {length} are more than {MAX_SAMPLES} samples; cut it into pieces")
            file.seek(first)
            wave = file.read(last - first, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise InputError(f"{name}: cannot be read as audio ({error}); convert it to WAV or FLAC, or drop its line") from error
    if len(wave) < last - first:
        raise InputError(
            f"{name}: is cut: {first + len(wave)} of {total} samples could be decoded; write it again from its source, or drop its line"
        )
    if len(wave) == 0:
        raise InputError(f"{name}: holds no audio between {first / rate:.3f} and {last / rate:.3f} s")
    if not np.isfinite(wave).all():
        raise InputError(f"{name}: holds NaN or infinite samples; write it again from its source, or drop its line")
    mono = wave[:, channel or 0] if channel is not None or wave.shape[1] == 1 else wave.mean(axis=1)
    return np.ascontiguousarray(mono), rate


def missing_bytes(file: BinaryIO) -> int:
    """Bytes by which a file is shorter than its container promises; 0 where it is whole or says nothing. The position is kept.

    libsndfile takes a cut WAV, Ogg or MP3 for a shorter one. A WAV says the size of its data chunk (RIFF; 0 and the largest
    number are what recorders write who could not seek back), the last page of an Ogg stream is marked (RFC 3533), and an MP3
    with a Xing header says its bytes.
    """
    place = file.tell()
    size = file.seek(0, os.SEEK_END) - place
    file.seek(place)
    head = file.read(_HEAD)
    try:
        if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
            return _missing_of_riff(head, size)
        if head[:4] == b"OggS":
            file.seek(place + max(0, size - _TAIL))
            tail = file.read()
            last = tail.rfind(b"OggS")
            return 0 if last >= 0 and len(tail) > last + 5 and tail[last + 5] & 4 else 1
        xing = max(head.find(b"Xing", 0, 256), head.find(b"Info", 0, 256))
        if head[:1] == b"\xff" and xing > 0 and int.from_bytes(head[xing + 4 : xing + 8]) & 2:
            behind_frames = 4 if int.from_bytes(head[xing + 4 : xing + 8]) & 1 else 0
            promised = int.from_bytes(head[xing + 8 + behind_frames : xing + 12 + behind_frames])
            return max(0, promised - size)
        return 0
    finally:
        file.seek(place)


def _missing_of_riff(head: bytes, size: int) -> int:
    at = 12
    while at + 8 <= len(head):
        kind, length = head[at : at + 4], int.from_bytes(head[at + 4 : at + 8], "little")
        if kind == b"data":
            return 0 if length in (0, 2**32 - 1) else max(0, at + 8 + length - size)
        at += 8 + length + length % 2
    return 0


def decode_with_ffmpeg(file: Path | bytes) -> bytes:
    """Any format that ``ffmpeg`` knows as a 32-bit float WAV file, at its own rate and channels.

    Raises:
        InputError: ffmpeg is not installed, or cannot read the file.
    """
    program = shutil.which("ffmpeg")
    if program is None:
        raise InputError("the decoder ffmpeg is not installed; install it, or convert the recordings to WAV or FLAC")
    source = "pipe:0" if isinstance(file, bytes) else f"file:{file}"
    command = [program, "-nostdin", "-v", "error", "-i", source, "-map", "0:a:0", "-c:a", "pcm_f32le", "-f", "wav", "pipe:1"]
    if isinstance(file, bytes):
        command.remove("-nostdin")
    done = subprocess.run(command, input=file if isinstance(file, bytes) else None, capture_output=True, check=False)
    if done.returncode != 0:
        raise InputError(f"{'audio bytes' if isinstance(file, bytes) else file}: ffmpeg: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


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
