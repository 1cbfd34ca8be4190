"""The fitted codec: every codebook is used, latents follow the sound and not its phase, and the folder loads."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import MimiConfig

from megatron_omni.audio.codec import Mimi
from megatron_omni.audio.waveform import read_audio, resample
from megatron_omni.demo.espeak import Speaker
from megatron_omni.demo.fit_codec import fit_codec, kmeans, small_mimi
from megatron_omni.demo.grammar import draw_split
from megatron_omni.demo.speak import ASSISTANT
from megatron_omni.runtime.errors import InputError
from megatron_omni.runtime.seeds import generator, rng

ENTRIES = 32


def tiny() -> MimiConfig:
    config = small_mimi()
    config.num_filters, config.codebook_size = 4, ENTRIES
    return config


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """20 clips of the assistant."""
    folder = tmp_path_factory.mktemp("clips")
    speaker = Speaker()
    for number, utterance in enumerate(draw_split(rng("clips"), "train", 20, seed=0)):
        wave, rate = speaker.speak(utterance.text, ASSISTANT)
        soundfile.write(folder / f"{number:02d}.wav", wave, rate)
    return sorted(folder.glob("*.wav"))


@pytest.fixture(scope="module")
def mimi(clips: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Mimi:
    return Mimi.from_pretrained(fit_codec(clips, tmp_path_factory.mktemp("out") / "codec", config=tiny()))


@pytest.fixture(scope="module")
def waves(clips: list[Path]) -> list[np.ndarray]:
    return [resample(*read_audio(clip), 24000) for clip in clips]


def test_codebooks_are_used(mimi: Mimi, waves: list[np.ndarray]) -> None:
    codes_KN = np.concatenate(mimi.encode(waves), axis=1)
    assert codes_KN.shape[0] == 8
    for codes_N in codes_KN:
        share = np.bincount(codes_N, minlength=ENTRIES) / codes_N.size
        entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
        assert entropy > 0.6 * np.log(ENTRIES)


def test_codebooks_come_closer_to_the_latents(mimi: Mimi, waves: list[np.ndarray]) -> None:
    """What k-means fitted is what the quantizer uses: each acoustic level leaves less of the latents."""
    part = mimi.network.model.quantizer.acoustic_residual_vector_quantizer
    codes = torch.from_numpy(mimi.encode(waves[:1])[0].astype(np.int64))[None, 1:]
    left = part.input_proj(mimi.latents(waves[:1])[0].T[None])
    rest = [left.var().item()]
    for level, layer in enumerate(part.layers):
        left = left - layer.decode(codes[:, level])
        rest.append(left.var().item())
    assert rest[1] < 0.6 * rest[0]
    assert all(later < earlier for earlier, later in pairwise(rest))


def test_a_clip_one_frame_later_has_the_same_codes(mimi: Mimi, waves: list[np.ndarray]) -> None:
    later = mimi.encode([np.concatenate([np.zeros(mimi.samples_per_frame, np.float32), wave]) for wave in waves])
    same = [codes[:, 3:] == shifted[:, 4:] for codes, shifted in zip(mimi.encode(waves), later, strict=True)]
    assert np.concatenate(same, axis=1).mean() > 0.9


def test_a_millisecond_does_not_change_the_semantic_code(mimi: Mimi, waves: list[np.ndarray]) -> None:
    later = mimi.encode([np.concatenate([np.zeros(24, np.float32), wave]) for wave in waves])
    same = [codes[0] == shifted[0, : codes.shape[1]] for codes, shifted in zip(mimi.encode(waves), later, strict=True)]
    assert np.concatenate(same).mean() > 0.8


def test_decoded_speech_is_as_loud_as_the_recordings(mimi: Mimi, waves: list[np.ndarray]) -> None:
    decoded = np.concatenate([mimi.decode(codes) for codes in mimi.encode(waves[:5])])
    assert 0.2 < decoded.std() / np.concatenate(waves).std() < 5


def test_same_seed_same_codec(clips: list[Path], mimi: Mimi, tmp_path: Path) -> None:
    assert Mimi.from_pretrained(fit_codec(clips, tmp_path / "a", config=tiny())).weights_hash == mimi.weights_hash
    assert Mimi.from_pretrained(fit_codec(clips, tmp_path / "a", seed=1, config=tiny())).weights_hash != mimi.weights_hash
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_too_little_sound_is_refused(clips: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="too few"):
        fit_codec(clips[:2], tmp_path / "codec")
    assert not any(tmp_path.iterdir())


def test_kmeans_finds_separate_clusters() -> None:
    centres_VD = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    points_ND = centres_VD.repeat(50, 1) + 0.1 * torch.randn(200, 2, generator=generator("points"))
    for seed in range(5):
        found_VD = kmeans(points_ND, 8, generator("kmeans", seed))
        assert torch.cdist(centres_VD, found_VD).min(1).values.max() < 0.5
