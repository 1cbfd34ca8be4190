"""Augmentation: each distortion does what it says, keeps the shape, and is drawn by seed, window and sample alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from megatron_omni.audio.features import LogMel
from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.config.model import FeatureConfig
from megatron_omni.config.recipe import AugmentConfig
from megatron_omni.data.rows.augment import Augmentation, mask_bands, mix, read_noise, warp_frequencies
from megatron_omni.data.rows.packer import Address, RowPacker
from megatron_omni.data.tokenizer import OmniTokenizer
from megatron_omni.runtime.errors import InputError
from megatron_omni.runtime.seeds import rng
from megatron_omni.schema import Batch, RowShape

RATE = 16_000
FEATURES = FeatureConfig(num_mel_bins=80)


def tone(hertz: float, seconds: float = 0.5) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(RATE * seconds)) / RATE)).astype(np.float32)


def augmentation(**options) -> Augmentation:
    return Augmentation(AugmentConfig(**options), FEATURES, seed=3)


@pytest.mark.parametrize("hertz", [500, 1000, 2500, 4000])
@pytest.mark.parametrize("factor", [0.85, 1.1])
def test_a_warped_tone_looks_like_a_scaled_tone(hertz: float, factor: float) -> None:
    log_mel = LogMel(FEATURES)
    warped = warp_frequencies(log_mel(tone(hertz)), factor, augmentation()._mels).mean(0)
    expected = log_mel(tone(hertz * factor)).mean(0)
    assert abs(int(warped.argmax()) - int(expected.argmax())) <= 1
    if abs(factor - 1) > 0.12:
        assert int(warped.argmax()) != int(log_mel(tone(hertz)).mean(0).argmax())


def test_warping_by_one_changes_nothing_and_the_ends_stay() -> None:
    mel = rng("mel").standard_normal((7, 80)).astype(np.float32)
    mels = augmentation()._mels
    np.testing.assert_allclose(warp_frequencies(mel, 1.0, mels), mel, atol=1e-5)
    for factor in (0.9, 1.1):
        warped = warp_frequencies(mel, factor, mels)
        assert warped.shape == mel.shape and warped.dtype == np.float32
        assert np.isfinite(warped).all()


def test_masks_are_bands_of_the_mean() -> None:
    mel = rng("mel").standard_normal((100, 80)).astype(np.float32)
    widths = set()
    for number in range(200):
        masked = mask_bands(mel, ((1, 1, 0.25),), rng("masks", number))
        (bins,) = np.flatnonzero((masked != mel).all(0)).reshape(1, -1)
        assert len(bins) <= 20 and (np.diff(bins) == 1).all()
        assert (masked[:, bins] == mel.mean()).all()
        assert ((masked != mel).any(0) == (masked != mel).all(0)).all()
        widths.add(len(bins))
    assert widths == set(range(21))  # both ends included
    both = mask_bands(mel, ((0, 2, 0.2), (1, 2, 0.2)), rng("both"))
    assert both.shape == mel.shape and (both != mel).any()
    assert (mask_bands(mel[:1], ((0, 2, 0.05),), rng("short")) == mel[:1]).all()


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 20.0])
def test_noise_has_the_drawn_ratio(snr_db: float) -> None:
    wave, noise = tone(440), rng("noise").standard_normal(RATE // 2).astype(np.float32)
    added = mix(wave, noise, snr_db) - wave
    assert 10 * np.log10(np.mean(wave**2) / np.mean(added**2)) == pytest.approx(snr_db, abs=0.01)
    silence = np.zeros_like(wave)
    assert (mix(wave, silence, snr_db) == wave).all() and (mix(silence, noise, snr_db) == silence).all()


def test_noise_files_of_any_rate_and_length(tmp_path: Path) -> None:
    for name, rate, seconds in (("long.wav", 48_000, 3.0), ("short.flac", 8_000, 0.05), ("stereo.ogg", 22_050, 1.0)):
        noise = 0.1 * rng(name).standard_normal((int(rate * seconds), 2))
        soundfile.write(tmp_path / name, noise, rate)
        read = read_noise(tmp_path / name, 8_000, RATE, rng("place"))
        assert read.shape == (8_000,) and read.dtype == np.float32 and np.abs(read).max() > 0.01
    (tmp_path / "notes.txt").write_text("no audio")
    assert len(augmentation(noise=tmp_path)._noises) == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"data\.augment\.noise=.*holds no audio"):
        augmentation(noise=tmp_path / "empty")
    (tmp_path / "bad.wav").write_bytes(b"RIFF nothing")
    with pytest.raises(InputError, match=r"bad\.wav: cannot be read"):
        read_noise(tmp_path / "bad.wav", 100, RATE, rng("place"))


def test_gain_stays_within_its_range() -> None:
    wave, gains = tone(440), []
    for number in range(100):
        louder = augmentation(gain_db=6.0).of(number, "s").wave("audio0", wave)
        gains.append(20 * np.log10(np.abs(louder).max() / np.abs(wave).max()))
    assert -6.01 < min(gains) < -4 and 4 < max(gains) < 6.01


def test_draws_depend_on_seed_window_sample_and_clip_only() -> None:
    wave = tone(440)
    mel = LogMel(FEATURES)(wave)
    options = dict(frequency_warp=0.1, frequency_masks=2, time_masks=2, gain_db=3.0)

    def drawn(seed: int, window: int, sample: str, clip: str) -> bytes:
        clips = Augmentation(AugmentConfig(**options), FEATURES, seed).of(window, sample)
        return clips.mel(clip, mel).tobytes() + clips.wave(clip, wave).tobytes()

    cases = [(0, 0, "a", "audio0"), (1, 0, "a", "audio0"), (0, 1, "a", "audio0"), (0, 0, "b", "audio0"), (0, 0, "a", "audio1")]
    assert len({drawn(*case) for case in cases}) == len(cases)
    assert all(drawn(*case) == drawn(*case) for case in cases)


def test_only_the_audio_of_a_batch_is_distorted(
    memory_samples, tokenizer: OmniTokenizer, geometry: EncoderGeometry, log_mel: LogMel
) -> None:
    samples = memory_samples(6)
    shape = RowShape(seq=512, codec=256, encoder=1024, spoken=128, supervised=128)
    parts = (samples, tokenizer, geometry, log_mel, samples.codec, shape, 0)
    options = AugmentConfig(frequency_warp=0.1, time_masks=2, gain_db=3.0)
    plain, distorted = RowPacker(*parts), RowPacker(*parts, augmentation=Augmentation(options, log_mel.config, seed=0))
    row = np.arange(6)
    one, same, other, clean = (
        packer.pack([Address(window, row)]).batch for packer, window in ((distorted, 1), (distorted, 1), (distorted, 2), (plain, 1))
    )
    for field in dataclasses.fields(Batch):
        tensors = [getattr(batch, field.name) for batch in (one, same, other, clean)]
        assert torch.equal(tensors[0], tensors[1]), field.name
        for different in tensors[2:]:
            assert torch.equal(tensors[0], different) == (field.name != "mel_RAM"), field.name
    assert not one.mel_RAM[~one.mel_valid_RA].any()
