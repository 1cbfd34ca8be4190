"""Log-mel features of the audio encoder: Whisper's arithmetic, without its padding to 30 s."""

from __future__ import annotations

import numpy as np
import torch
from transformers.audio_utils import mel_filter_bank

from megatron_omni.config.model import FeatureConfig
from megatron_omni.runtime.errors import InputError


class LogMel:
    """Waveform to log-mel frames; with ``normalize="whisper"`` what ``WhisperFeatureExtractor`` gives for the unpadded clip.

    One frame per hop, as ``EncoderGeometry.mel_frames`` counts them.
    """

    def __init__(self, config: FeatureConfig) -> None:
        self.config = config
        filters = mel_filter_bank(
            num_frequency_bins=1 + config.n_fft // 2,
            num_mel_filters=config.num_mel_bins,
            min_frequency=0.0,
            max_frequency=config.sample_rate / 2,
            sampling_rate=config.sample_rate,
            norm="slaney",
            mel_scale="slaney",
        )
        self._filters_MC = torch.from_numpy(filters.T.copy()).float()
        self._window = torch.hann_window(config.n_fft)
        # The reflection at both ends needs more than half a window; a frame needs a hop.
        self._shortest = max(config.n_fft // 2 + 1, config.hop_length)

    def __call__(self, wave: np.ndarray) -> np.ndarray:
        """float32 [W] at ``config.sample_rate`` to float32 [max(1, W // hop_length), num_mel_bins].

        A clip shorter than half a window is continued with silence.

        Raises:
            InputError: ``wave`` is empty or has more than one axis.
        """
        if wave.ndim != 1 or wave.size == 0:
            raise InputError(f"log-mel features need a mono waveform [W], got an array of shape {list(wave.shape)}")
        frames = max(1, wave.size // self.config.hop_length)
        wave_W = torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32))
        wave_W = torch.nn.functional.pad(wave_W, (0, max(0, self._shortest - wave.size)))
        spectrum_CT = torch.stft(wave_W, self.config.n_fft, self.config.hop_length, window=self._window, return_complex=True)
        power_CT = spectrum_CT[:, :frames].abs().square()
        log_MT = (self._filters_MC @ power_CT).clamp_min(1e-10).log10()
        log_MT = (torch.maximum(log_MT, log_MT.max() - 8.0) + 4.0) / 4.0
        if self.config.normalize == "clip":
            log_MT = (log_MT - log_MT.mean()) / (log_MT.std(unbiased=False) + 1e-5)
        features: np.ndarray = log_MT.T.contiguous().numpy()
        return features
