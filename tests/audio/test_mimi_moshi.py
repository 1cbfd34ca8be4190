"""Two implementations of Mimi, one set of weights: the same codes, the same hash, the same sound."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import MimiConfig, MimiModel

from megatron_omni.audio.codec import Backend, Mimi, load_codec
from megatron_omni.audio.mimi_moshi import MoshiMimi, from_moshi, to_moshi
from megatron_omni.demo.random_codec import random_mimi, sounds
from megatron_omni.runtime.errors import InputError
from megatron_omni.runtime.seeds import rng

NEEDS_MOSHI = "needs the moshi package: pip install --no-deps moshi; pip install einops sentencepiece sphn"

CONFIG = MimiConfig(
    num_filters=4,
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=64,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    upsample_groups=32,
    num_quantizers=6,
    codebook_size=64,
    codebook_dim=16,
    vector_quantization_hidden_dimension=16,
    sliding_window=20,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codec")
    random_mimi(CONFIG, fitted_seconds=10.0).save_pretrained(folder)
    return folder


def lengths(count: int, longest: float) -> list[int]:
    """From 0.05 s to ``longest`` seconds, as many short ones as long ones."""
    return [int(24_000 * seconds) for seconds in np.exp(rng("clips", count).uniform(np.log(0.05), np.log(longest), count))]


@pytest.fixture
def moshi(folder: Path) -> Mimi:
    pytest.importorskip("moshi", reason=NEEDS_MOSHI)
    return load_codec(folder, "moshi")


def test_both_give_the_same_codes_and_sound(folder: Path, moshi: Mimi) -> None:
    reference = load_codec(folder)
    waves = sounds(lengths(24, 4.0))
    codes = reference.encode(waves)
    differences = reference.compare(waves, moshi.encode(waves))
    assert differences.frames == sum(array.shape[1] for array in codes) > 200
    assert differences.beyond_ties == 0
    assert moshi.config() == reference.config()
    np.testing.assert_allclose(moshi.decode(codes[0]), reference.decode(codes[0]), atol=1e-5)


def test_the_key_map_goes_both_ways(folder: Path, moshi: Mimi) -> None:
    state = moshi.network.state()
    assert isinstance(moshi.network, MoshiMimi)
    back = from_moshi(moshi.network.model.state_dict(), CONFIG)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_a_file_of_kyutai_needs_all_weights(tmp_path: Path) -> None:
    pytest.importorskip("moshi", reason=NEEDS_MOSHI)
    save_file({"encoder.model.0.conv.conv.weight": torch.zeros(1)}, tmp_path / "tokenizer.safetensors")
    with pytest.raises(InputError, match=r"tokenizer\.safetensors: cannot be loaded"):
        load_codec(tmp_path / "tokenizer.safetensors", "moshi")


def test_without_the_package_the_way_out_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(InputError, match="pip install --no-deps moshi"):
        load_codec(folder, "moshi")


def test_the_file_of_kyutai_has_our_layout_of_the_published_size() -> None:
    """Names and shapes, in both directions; ``moshi.models.loaders.get_mimi`` builds what Kyutai's file is loaded into."""
    loaders = pytest.importorskip("moshi.models.loaders", reason=NEEDS_MOSHI)
    with torch.device("meta"):
        theirs = loaders.get_mimi(None, device="meta", num_codebooks=32).state_dict()
        ours = MimiModel(MimiConfig()).state_dict()
    there = to_moshi(ours, MimiConfig().num_attention_heads, list(theirs))
    assert {name: tensor.shape for name, tensor in there.items()} == {name: tensor.shape for name, tensor in theirs.items()}
    back = from_moshi(theirs, MimiConfig())
    assert {name: tensor.shape for name, tensor in back.items()} == {name: tensor.shape for name, tensor in ours.items()}


@pytest.mark.slow
def test_a_file_of_kyutai_gives_the_codes_of_their_loader(tmp_path: Path) -> None:
    """At the published size: their architecture and defaults against ours, and their own search of the codebooks."""
    loaders = pytest.importorskip("moshi.models.loaders", reason=NEEDS_MOSHI)
    model = random_mimi(MimiConfig())
    state = to_moshi(model.state_dict(), model.config.num_attention_heads, list(loaders.get_mimi(None).state_dict()))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "tokenizer.safetensors")
    codec = load_codec(tmp_path / "tokenizer.safetensors", "moshi", num_codebooks=8)
    theirs = loaders.get_mimi(tmp_path / "tokenizer.safetensors", num_codebooks=8)
    waves = sounds([1, 1920, 30_000, 300_000])
    with torch.inference_mode():
        codes = [theirs.encode(torch.from_numpy(wave)[None, None])[0].numpy() for wave in waves]
    differences = codec.compare(waves, codes)
    print(f"\n{differences}")
    assert differences.beyond_ties == 0
    assert codec.weights_hash == Mimi(model).weights_hash


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("backend", ["transformers", "moshi"])
def test_batched_equals_single_at_published_size(backend: Backend, tmp_path: Path) -> None:
    """200 clips of 0.05-20 s through 80 million weights; only ties may differ. One clip at a time, by transformers, is the reference."""
    if backend == "moshi":
        pytest.importorskip("moshi", reason=NEEDS_MOSHI)
    random_mimi(MimiConfig(num_quantizers=8)).save_pretrained(tmp_path)
    waves = sounds(lengths(200, 20.0), seed=1)
    reference = load_codec(tmp_path)
    single = [reference.encode([wave])[0] for wave in waves]
    batched = load_codec(tmp_path, backend).encode(waves)
    differences = reference.compare(waves, batched)
    equal = sum(np.array_equal(a, b) for a, b in zip(single, batched, strict=True))
    used = [np.unique(codes).size for codes in np.concatenate(single, axis=1)]
    print(f"\n{backend}: {differences}, beyond ties {differences.beyond_ties}, {equal} of 200 clips equal, entries in use {used}")
    assert min(used) > 500
    assert differences.beyond_ties == 0
