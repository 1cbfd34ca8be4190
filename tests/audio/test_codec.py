"""Mimi: batched codes equal one-by-one codes, frames, hashes, and refusals. The weights are random, the model is transformers'."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import MimiConfig, MimiModel, WhisperConfig

from megatron_omni.audio import codec
from megatron_omni.audio.codebooks import TIE, CodeDifferences, ResidualCodebooks, SplitCodebooks
from megatron_omni.audio.codec import Mimi
from megatron_omni.runtime.errors import InputError
from megatron_omni.runtime.seeds import rng

CONFIG = {
    "num_filters": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "upsample_groups": 32,
    "num_quantizers": 6,
    "codebook_size": 64,
    "codebook_dim": 16,
    "vector_quantization_hidden_dimension": 16,
    "sliding_window": 20,  # 0.8 s
    "layer_scale_initial_scale": 0.5,  # so that attention, which could reach over padding, matters
}


def random_model(seed: int = 0) -> MimiModel:
    torch.manual_seed(seed)
    model = MimiModel(MimiConfig(**CONFIG))
    for name, buffer in model.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_()
    return model


@pytest.fixture(scope="module")
def mimi() -> Mimi:
    return Mimi(random_model())


def waves(*lengths: int) -> list[np.ndarray]:
    return [(0.1 * rng("wave", n).standard_normal(n)).astype(np.float32) for n in lengths]


# one sample, the edges of a frame (1920), of the attention's window (19200) and of twice as much
LENGTHS = (9600, 1, 9593, 7681, 19200, 1919, 1920, 1921, 19199, 3000, 9600, 19201, 38399, 38400, 8000, 38401)


def test_batched_equals_one_by_one_in_order(mimi: Mimi) -> None:
    clips = waves(*LENGTHS)
    batched = mimi.encode(clips)
    for clip, codes in zip(clips, batched, strict=True):
        assert codes.dtype == np.uint16
        assert codes.shape == (6, mimi.num_frames(len(clip)))
        assert codes.flags.c_contiguous
        np.testing.assert_array_equal(codes, mimi.encode([clip])[0])


def test_batch_budget_does_not_change_codes(mimi: Mimi, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = waves(*LENGTHS)
    whole = mimi.encode(clips)
    for seconds, padding in ((0.5, 0.1), (60.0, 1.0)):  # the latter: all in one batch, mostly padding
        monkeypatch.setattr(codec, "BATCH_SECONDS", {"cpu": seconds})
        monkeypatch.setattr(codec, "PADDING", padding)
        for a, b in zip(whole, mimi.encode(clips), strict=True):
            np.testing.assert_array_equal(a, b)


def test_it_keeps_the_number_of_threads_it_was_made_under(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []
    made = Mimi(random_model())
    latents = made.network.latents
    monkeypatch.setattr(made.network, "latents", lambda waves_B1W: seen.append(torch.get_num_threads()) or latents(waves_B1W))
    try:
        torch.set_num_threads(before + 1)
        made.encode(waves(5000))
        thread = threading.Thread(target=made.encode, args=(waves(5000),))
        thread.start()
        thread.join()
        assert (made.threads, seen) == (before, [before, before])
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_similar_lengths_share_a_batch() -> None:
    frames = [10, 1, 9, 100, 10, 95, 91, 1]
    batches = list(codec._batches(frames, 300))
    assert sorted(index for batch in batches for index in batch) == list(range(8))
    assert batches == [[3, 5, 6], [0, 4, 2], [1, 7]]
    assert list(codec._batches([7, 7, 7], 10)) == [[0], [1], [2]]


def test_codes_are_those_of_transformers(mimi: Mimi) -> None:
    """Its own search, in float32, on the same clip: equal but for ties."""
    for clip in waves(*LENGTHS):
        padded = torch.from_numpy(np.pad(clip, (0, -len(clip) % 1920)))[None, None]
        with torch.no_grad():
            theirs = mimi.network.model.encode(padded).audio_codes[0].numpy()
        differences = mimi.compare([clip], [theirs])
        assert (differences.frames, differences.beyond_ties) == (mimi.num_frames(len(clip)), 0)


def test_differences_are_counted_and_ties_told_apart(mimi: Mimi) -> None:
    clips = waves(9600, 5000)
    codes = mimi.encode(clips)
    assert mimi.compare(clips, codes) == CodeDifferences(frames=8, codes=48, differing=0, differing_frames=0, ties=0)
    wrong = [codes[0].copy(), codes[1]]
    wrong[0][2, 1] = (wrong[0][2, 1] + 1) % 64
    wrong[0][4, 1] = (wrong[0][4, 1] + 1) % 64
    found = mimi.compare(clips, wrong)
    assert (found.differing, found.differing_frames, found.beyond_ties) == (2, 1, 1)

    model = random_model()
    for layer in model.quantizer.acoustic_residual_vector_quantizer.layers:
        layer.codebook.embed_sum[1::2] = layer.codebook.embed_sum[::2]  # every entry twice: nothing but ties
    twins = Mimi(model)
    codes = twins.encode(clips)
    codes[0][3] ^= 1
    found = twins.compare(clips, codes)
    assert (found.differing_frames, found.ties, found.beyond_ties) == (5, 5, 0)


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_a_tie_is_what_a_small_move_of_the_latent_turns_round(share: float) -> None:
    entries = torch.tensor([[0.0, 1.0], [1e-3, 1.0]], dtype=torch.float64)  # close together, so distances alone hardly differ
    books = SplitCodebooks(ResidualCodebooks(None, [entries]), ResidualCodebooks(None, []))
    latents = torch.tensor([[5e-4 + share * TIE, 1.0]])
    differences = books.differences(latents, np.array([[1]]), np.array([[0]]))
    assert int(books.search(latents, 1)) == 1
    assert differences.ties == (share < 1)


def test_lower_precision_keeps_the_hash_and_changes_few_codes(mimi: Mimi) -> None:
    clips = waves(*LENGTHS)
    low = Mimi(random_model(), dtype="bfloat16")
    assert low.weights_hash == mimi.weights_hash
    differences = mimi.compare(clips, low.encode(clips))
    assert 0 < differences.rate < 0.5


def test_padding_to_whole_frames_is_silence(mimi: Mimi) -> None:
    (clip,) = waves(5000)
    np.testing.assert_array_equal(mimi.encode([clip])[0], mimi.encode([np.pad(clip, (0, 760))])[0])


def test_frames_and_constants_come_from_the_config(mimi: Mimi) -> None:
    assert (mimi.sample_rate, mimi.frame_rate, mimi.samples_per_frame, mimi.card) == (24000, 12.5, 1920, 64)
    assert [mimi.num_frames(n) for n in (1, 1920, 1921)] == [1, 1, 2]
    config = mimi.config()
    assert (config.num_codebooks, config.card, config.frame_rate, config.weights_hash) == (6, 64, 12.5, mimi.weights_hash)


def test_fewer_codebooks_are_the_first_ones(mimi: Mimi) -> None:
    clips = waves(5000, 9600)
    for few, all_of_them in zip(Mimi(mimi.network, num_codebooks=3).encode(clips), mimi.encode(clips), strict=True):
        np.testing.assert_array_equal(few, all_of_them[:3])


def test_decode_gives_whole_frames(mimi: Mimi) -> None:
    wave = mimi.decode(rng("codes").integers(64, size=(6, 7)).astype(np.uint16))
    assert wave.shape == (7 * 1920,)
    assert wave.dtype == np.float32
    assert wave.std() > 0


def test_saved_and_loaded_it_is_the_same_codec(mimi: Mimi, tmp_path: Path) -> None:
    mimi.network.model.save_pretrained(tmp_path)
    loaded = Mimi.from_pretrained(tmp_path)
    assert loaded.weights_hash == mimi.weights_hash
    np.testing.assert_array_equal(loaded.encode(waves(9600))[0], mimi.encode(waves(9600))[0])


def test_hash_follows_any_weight() -> None:
    model = random_model()
    before = Mimi(model).weights_hash
    assert before == Mimi(random_model()).weights_hash
    with torch.no_grad():
        next(iter(model.parameters())).view(-1)[0] += 1e-3
    assert Mimi(model).weights_hash != before


@pytest.mark.parametrize("count", [0, 7])
def test_codebooks_that_are_not_there_are_refused(count: int) -> None:
    with pytest.raises(InputError, match=rf"num_codebooks={count}.*1\.\.6"):
        Mimi(random_model(), num_codebooks=count)


def test_clips_and_codes_of_the_wrong_shape_are_refused(mimi: Mimi) -> None:
    for clip in (np.zeros(0, np.float32), np.zeros((2, 100), np.float32)):
        with pytest.raises(InputError, match="clip 1"):
            mimi.encode([np.zeros(100, np.float32), clip])
    for codes in (np.zeros((7, 3), np.int64), np.zeros((6, 0), np.int64), np.zeros(6, np.int64), np.full((6, 2), 64), np.full((6, 2), -1)):
        with pytest.raises(InputError, match="codes"):
            mimi.decode(codes)


def test_a_folder_without_mimi_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be loaded"):
        Mimi.from_pretrained(tmp_path)
    WhisperConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="'whisper'"):
        Mimi.from_pretrained(tmp_path)
