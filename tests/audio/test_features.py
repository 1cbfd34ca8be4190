"""Log-mel features against transformers' Whisper, and their number against the geometry."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from megatron_omni.audio.features import LogMel
from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.config.model import FeatureConfig
from megatron_omni.runtime.errors import InputError
from megatron_omni.runtime.seeds import rng

GEOMETRY = EncoderGeometry(hop_length=160, conv_strides=(1, 2), stack=4)


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("samples", [201, 320, 16000, 16159, 37777])
def test_equals_whisper_without_padding(samples: int, mels: int) -> None:
    wave = (0.1 * rng("mel", samples).standard_normal(samples)).astype(np.float32)
    extractor = WhisperFeatureExtractor(feature_size=mels)
    expected = extractor(wave, sampling_rate=16000, padding="do_not_pad", return_tensors="np").input_features[0].T
    features = LogMel(FeatureConfig(num_mel_bins=mels))(wave)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected, atol=1e-4)


@pytest.mark.parametrize("samples", [1, 159, 160, 200, 201, 319, 4801])
def test_frames_are_those_of_the_geometry(samples: int) -> None:
    features = LogMel(FeatureConfig())(np.full(samples, 0.1, np.float32))
    assert features.shape == (GEOMETRY.mel_frames(samples), 80)
    assert np.isfinite(features).all()


def test_clip_normalisation_has_mean_0_and_deviation_1() -> None:
    features = LogMel(FeatureConfig(normalize="clip"))(rng("clip").standard_normal(16000).astype(np.float32))
    assert abs(features.mean()) < 1e-5
    assert abs(features.std() - 1) < 1e-3


def test_silence_stays_finite() -> None:
    assert np.isfinite(LogMel(FeatureConfig(normalize="clip"))(np.zeros(1600, np.float32))).all()


@pytest.mark.parametrize("shape", [(0,), (2, 400)])
def test_only_a_mono_clip_is_taken(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="mono"):
        LogMel(FeatureConfig())(np.zeros(shape, np.float32))
