"""Reading, cutting and resampling audio; the FLAC members of shards."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from megatron_omni.audio.waveform import read_audio, read_flac, resample, write_flac
from megatron_omni.runtime.errors import InputError


def tone(hertz: float, rate: int, seconds: float = 0.5) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = tone(200, 8000), tone(300, 8000)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 8000, subtype="FLOAT")
    wave, rate = read_audio(tmp_path / "a.wav")
    assert rate == 8000
    assert wave.dtype == np.float32
    np.testing.assert_allclose(wave, (left + right) / 2, atol=1e-7)


def test_cut_equals_slice_and_a_rounded_end_is_clipped(tmp_path: Path) -> None:
    whole = tone(200, 16000)
    soundfile.write(tmp_path / "a.wav", whole, 16000, subtype="FLOAT")
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav", 0.1, 0.25)[0], whole[1600:4000])
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav", 0.4, 0.51)[0], whole[6400:])


@pytest.mark.parametrize(("start", "end"), [(0.6, None), (0.3, 0.2), (-0.1, 0.2), (0.0, 0.9)])
def test_a_cut_outside_the_file_is_refused(tmp_path: Path, start: float, end: float | None) -> None:
    soundfile.write(tmp_path / "a.wav", tone(200, 16000), 16000)
    with pytest.raises(InputError, match=r"a\.wav"):
        read_audio(tmp_path / "a.wav", start, end)


def test_bad_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("no sound")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 16000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan], np.float32), 16000, subtype="FLOAT")
    for name, reason in (("absent.wav", "no such"), ("text.wav", "cannot be read"), ("empty.wav", "no audio"), ("nan.wav", "NaN")):
        with pytest.raises(InputError, match=rf"{name}.*{reason}"):
            read_audio(tmp_path / name)
    with pytest.raises(InputError, match="audio bytes"):
        read_audio(io.BytesIO(b"no sound"))


def test_resampling_keeps_the_tone_and_the_duration() -> None:
    wave = resample(tone(440, 22050), 22050, 16000)
    assert wave.dtype == np.float32
    assert abs(len(wave) - 8000) <= 1
    middle = slice(1000, 7000)
    np.testing.assert_allclose(wave[middle], tone(440, 16000)[middle], atol=1e-3)


def test_resampling_removes_what_the_target_cannot_hold() -> None:
    assert np.abs(resample(tone(10000, 24000), 24000, 16000)[500:-500]).max() < 1e-3


def test_flac_round_trip_is_exact_the_second_time() -> None:
    wave = np.concatenate([tone(440, 16000), np.array([1.5, -1.5, 1.0, -1.0], np.float32)])
    data = write_flac(wave, 16000)
    once = read_flac(data)
    assert once.dtype == np.float32
    assert np.abs(once - np.clip(wave, -1, 1)).max() <= 1 / 32768
    assert write_flac(once, 16000) == data
    info = soundfile.info(io.BytesIO(data))
    assert (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", 16000, 1)
