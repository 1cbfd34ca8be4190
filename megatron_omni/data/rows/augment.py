"""Augmentation of what the model hears, in training only: noise and gain on the waveform; frequency warp and masks on the log-mel.

Every draw is a pure function of the run's seed, the window of the plan and the sample's id: the same on any rank, in any
worker, after any stop, and another one in the next epoch. What is here keeps all lengths, so the row plan does not
know of it; speed changes them and is therefore part of the plan (``data.rows.speed``).

- Frequency warp: vocal tract length perturbation (Jaitly & Hinton, ICML workshop 2013).
- Masks: SpecAugment (Park et al., arXiv:1904.08779), without its time warp, filled with the clip's mean.
- Noise: a stretch of a recording, mixed in at a drawn signal-to-noise ratio.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import soundfile
from transformers.audio_utils import hertz_to_mel, mel_to_hertz

from megatron_omni.audio.waveform import resample
from megatron_omni.config.model import FeatureConfig
from megatron_omni.config.recipe import AugmentConfig
from megatron_omni.runtime.errors import InputError
from megatron_omni.runtime.seeds import rng

WARPED_BELOW = 4800.0
"""Hz: frequencies below are scaled, those above squeezed or stretched so that the highest stays; as in the paper."""


class Augmentation:
    """Distorts the clips of training samples; one object serves any number of them."""

    def __init__(self, config: AugmentConfig, features: FeatureConfig, seed: int) -> None:
        """``InputError`` where the folder of noise holds no audio."""
        self.config, self.features, self.seed = config, features, seed
        self._noises = find_noises(config.noise) if config.noise else ()

    def of(self, window: int, sample_id: str) -> ClipAugmentation:
        """What happens to the clips of one sample in one window of the plan."""
        return ClipAugmentation(self, window, sample_id)

    def distort_wave(self, wave: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """float32 [W] to float32 [W]."""
        config = self.config
        if self._noises and random.random() < config.noise_probability:
            noise = read_noise(self._noises[random.integers(len(self._noises))], len(wave), self.features.sample_rate, random)
            wave = mix(wave, noise, random.uniform(*config.noise_snr_db))
        if config.gain_db:
            wave = wave * np.float32(10 ** (random.uniform(-config.gain_db, config.gain_db) / 20))
        return wave

    def distort_mel(self, mel_AM: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """float32 [A, M] to float32 [A, M]."""
        config = self.config
        if config.frequency_warp:
            mel_AM = warp_frequencies(mel_AM, 1 + random.uniform(-config.frequency_warp, config.frequency_warp), self._mels)
        masks = ((0, config.time_masks, config.time_mask_width), (1, config.frequency_masks, config.frequency_mask_width))
        if config.time_masks or config.frequency_masks:
            mel_AM = mask_bands(mel_AM, masks, random)
        return mel_AM

    @cached_property
    def _mels(self) -> np.ndarray:
        """float64 [M]: centre frequencies of the bins, in mel; evenly spaced."""
        top = hertz_to_mel(self.features.sample_rate / 2, mel_scale="slaney")
        return np.linspace(0, float(top), self.features.num_mel_bins + 2)[1:-1]


class ClipAugmentation:
    """``Augmentation`` with the draws of one sample; each of its clips has its own."""

    def __init__(self, whole: Augmentation, window: int, sample_id: str) -> None:
        self._whole, self._window, self._sample_id = whole, window, sample_id

    def wave(self, name: str, wave: np.ndarray) -> np.ndarray:
        return self._whole.distort_wave(wave, self._random("wave", name))

    def mel(self, name: str, mel_AM: np.ndarray) -> np.ndarray:
        return self._whole.distort_mel(mel_AM, self._random("mel", name))

    def _random(self, stage: str, name: str) -> np.random.Generator:
        return rng(self._whole.seed, "augment", stage, self._window, self._sample_id, name)


# --------------------------------------------------------------------------- on the log-mel


def warp_frequencies(mel_AM: np.ndarray, factor: float, mels: np.ndarray) -> np.ndarray:
    """Shows the clip as a speaker with a vocal tract ``factor`` times shorter would sound: its formants move up by it.

    Args:
        mel_AM: float32 [A, M].
        mels: float [M], ascending and evenly spaced: what the bins stand for, in Slaney's mel.
    """
    step = mels[1] - mels[0]
    *hertz, top = np.asarray(mel_to_hertz(np.append(mels, mels[-1] + step), mel_scale="slaney")).tolist()
    edge = min(WARPED_BELOW, 0.6 * top) * min(factor, 1) / factor  # in the original's frequencies
    # A bin of the result shows what the original has at that frequency: the inverse of the warp.
    source = np.interp(hertz, [0, edge * factor, top], [0, edge, top])
    place = (hertz_to_mel(source, mel_scale="slaney") - mels[0]) / step
    place = np.clip(place, 0, len(mels) - 1)
    low = np.minimum(place.astype(np.int64), len(mels) - 2)
    share = (place - low).astype(np.float32)
    warped: np.ndarray = mel_AM[:, low] * (1 - share) + mel_AM[:, low + 1] * share
    return warped


def mask_bands(mel_AM: np.ndarray, masks: tuple[tuple[int, int, float], ...], random: np.random.Generator) -> np.ndarray:
    """Fills random bands with the clip's mean; ``masks`` are (axis, how many, largest width as part of the axis)."""
    masked, mean = mel_AM.copy(), mel_AM.mean()
    for axis, count, width in masks:
        size = masked.shape[axis]
        for _ in range(count):
            length = int(random.integers(0, int(width * size) + 1))
            start = int(random.integers(0, size - length + 1))
            masked[(slice(None),) * axis + (slice(start, start + length),)] = mean
    return masked


# --------------------------------------------------------------------------- on the waveform


def find_noises(folder: Path) -> tuple[Path, ...]:
    """The audio files under ``folder``, in the order of their names."""
    kinds = {f".{kind.lower()}" for kind in soundfile.available_formats()} | {".opus"}
    files = tuple(sorted(path for path in folder.rglob("*") if path.suffix.lower() in kinds))
    if not files:
        raise InputError(f"data.augment.noise={folder} holds no audio file; give a folder of recordings, or leave it out")
    return files


def read_noise(path: Path, samples: int, rate: int, random: np.random.Generator) -> np.ndarray:
    """float32 [samples] at ``rate`` from a drawn place of the file, only that part decoded; a short one is repeated."""
    try:
        with soundfile.SoundFile(path) as file:
            wanted = min(file.frames, -(-samples * file.samplerate // rate) + 1)
            file.seek(int(random.integers(0, file.frames - wanted + 1)))
            noise = file.read(wanted, dtype="float32", always_2d=True).mean(1)
            noise = resample(noise, file.samplerate, rate)
    except soundfile.SoundFileError as error:
        raise InputError(f"{path}: cannot be read as audio ({error}); take it out of data.augment.noise") from error
    if len(noise) == 0:
        raise InputError(f"{path}: holds no audio; take it out of data.augment.noise")
    return np.resize(noise, samples)


def mix(wave: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """``wave`` + ``noise`` (float32 [W]), the noise scaled to the signal-to-noise ratio; silence on either side stays as it is."""
    signal_power, noise_power = float(np.mean(wave**2)), float(np.mean(noise**2))
    if signal_power == 0 or noise_power == 0:
        return wave
    mixed: np.ndarray = wave + noise * np.float32(np.sqrt(signal_power / noise_power / 10 ** (snr_db / 10)))
    return mixed
