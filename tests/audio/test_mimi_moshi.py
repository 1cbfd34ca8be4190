"""Two implementations of Mimi, one set of weights: the same codes, the same hash, the same sound."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import MimiConfig, MimiModel

from megatron_omni.audio.codec import Mimi, load_codec
from megatron_omni.audio.mimi_moshi import MoshiMimi, from_moshi
from megatron_omni.runtime.errors import InputError
from megatron_omni.runtime.seeds import rng

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
    layer_scale_initial_scale=0.5,
    sliding_window=20,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = MimiModel(CONFIG)
    for name, buffer in model.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_()
    folder = tmp_path_factory.mktemp("codec")
    model.save_pretrained(folder)
    return folder


def clips(count: int, longest: float) -> list[np.ndarray]:
    random = rng("clips", count)
    lengths = np.exp(random.uniform(np.log(0.05), np.log(longest), count)) * 24_000
    return [(0.1 * random.standard_normal(int(length))).astype(np.float32) for length in lengths]


@pytest.fixture
def moshi(folder: Path) -> Mimi:
    pytest.importorskip("moshi", reason="needs the moshi package: pip install --no-deps moshi; pip install einops sentencepiece sphn")
    return load_codec(folder, "moshi")


def test_both_give_the_same_codes_and_sound(folder: Path, moshi: Mimi) -> None:
    reference = load_codec(folder)
    waves = clips(24, 4.0)
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
    pytest.importorskip("moshi", reason="needs the moshi package")
    save_file({"encoder.model.0.conv.conv.weight": torch.zeros(1)}, tmp_path / "tokenizer.safetensors")
    with pytest.raises(InputError, match=r"tokenizer\.safetensors: cannot be loaded"):
        load_codec(tmp_path / "tokenizer.safetensors", "moshi")


def test_without_the_package_the_way_out_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(InputError, match="pip install --no-deps moshi"):
        load_codec(folder, "moshi")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("backend", ["transformers", "moshi"])
def test_batched_equals_single_at_published_size(backend: str, tmp_path: Path) -> None:
    """200 clips of 0.05-20 s through 80 million random weights; only ties may differ."""
    if backend == "moshi":
        pytest.importorskip("moshi", reason="needs the moshi package")
    torch.manual_seed(0)
    model = MimiModel(MimiConfig(num_quantizers=8))
    for name, buffer in model.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_()
    single, waves = Mimi(model), clips(200, 20.0)
    # random weights shrink what passes through them: bring latents to the scale of the codebooks
    scale = float(torch.cat(single.latents(waves[:10])).std())
    with torch.no_grad():
        for part in (model.quantizer.semantic_residual_vector_quantizer, model.quantizer.acoustic_residual_vector_quantizer):
            part.input_proj.weight.div_(scale * float(part.input_proj.weight.std()) * model.config.hidden_size**0.5)
    model.save_pretrained(tmp_path)
    batched = load_codec(tmp_path, backend)
    codes = batched.encode(waves)
    reference = load_codec(tmp_path)
    one_by_one = [reference.encode([wave])[0] for wave in waves]
    differences = reference.compare(waves, codes)
    equal = sum(np.array_equal(a, b) for a, b in zip(codes, one_by_one, strict=True))
    used = np.unique(np.concatenate(one_by_one, axis=1)).size
    print(f"\n{backend}: {differences}, beyond ties {differences.beyond_ties}, {equal} of 200 clips equal, {used} entries in use")
    assert used > 500
    assert differences.beyond_ties == 0
