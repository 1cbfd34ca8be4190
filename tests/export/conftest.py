"""A tiny model of random weights: its tokenizer, codec, run directory with a checkpoint, and export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import MimiConfig, MimiModel

from megatron_omni.audio.codec import Mimi
from megatron_omni.checkpoint.comm import Alone
from megatron_omni.checkpoint.save import save
from megatron_omni.checkpoint.slices import LocalSlice
from megatron_omni.checkpoint.state import CheckpointState, SavedTopology
from megatron_omni.config.model import AudioHeadConfig, EncoderConfig, LlmConfig, ModelConfig, ProjectorConfig, TransformerConfig
from megatron_omni.data.tokenizer import OmniTokenizer, prepare_tokenizer
from megatron_omni.demo.train_tokenizer import train_bpe
from megatron_omni.export.to_hf import to_hf
from megatron_omni.export.verify import Verified
from megatron_omni.model.init import initial_value
from megatron_omni.model.omni import OmniModel
from megatron_omni.parallel.layers import layout_of
from megatron_omni.parallel.topology import TensorParallel
from megatron_omni.runtime.seeds import generator


@dataclass(frozen=True)
class Trained:
    """A run directory as training leaves it, and the model in it."""

    run: Path
    codec: Path
    tokenizer: Path
    config: ModelConfig
    model: OmniModel


@dataclass(frozen=True)
class Exported:
    folder: Path
    verified: Verified


def stack(width: int, layers: int, heads: int = 4, **changes: object) -> TransformerConfig:
    values = {"hidden_size": width, "num_layers": layers, "num_heads": heads, "intermediate_size": 3 * width}
    return TransformerConfig.model_validate(values | changes)


@pytest.fixture(scope="session")
def codec_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Mimi whose codebooks are random too (a new one holds zeros)."""
    torch.manual_seed(0)
    config = MimiConfig(
        hidden_size=32, num_filters=4, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        intermediate_size=32, codebook_size=16, codebook_dim=16, vector_quantization_hidden_dimension=16, num_quantizers=4,
        num_semantic_quantizers=1, sliding_window=16, upsample_groups=32,
    )  # fmt: skip
    model = MimiModel(config)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("embed_sum"):
                buffer.normal_()
            elif name.endswith("cluster_usage"):
                buffer.fill_(1.0)
    folder = tmp_path_factory.mktemp("codec")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["the weather is nice", "three five nine", "what is the last number"], folder / "base", 300)
    prepare_tokenizer(folder / "base", folder / "omni")
    return folder / "omni"


@pytest.fixture(scope="session")
def trained(codec_folder: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    tokenizer = OmniTokenizer.load(tokenizer_folder)
    config = ModelConfig(
        encoder=EncoderConfig(stack=stack(32, 1, causal=False, norm="layer", mlp="gelu", positions="sinusoidal", bias=True)),
        projector=ProjectorConfig(stride=4, hidden_size=64),
        llm=LlmConfig(vocab_size=tokenizer.padded_vocab_size, stack=stack(64, 2, num_kv_heads=2, rope_theta=500.0)),
        audio_head=AudioHeadConfig(pre_nn=stack(32, 1, causal=False), decoder=stack(48, 2), depformer=stack(32, 1), acoustic_delay=1),
        codec=Mimi.from_pretrained(codec_folder).config(),
    )
    model = OmniModel(config, TensorParallel.single()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # norms and biases begin as ones and zeros, which would hide one that is exchanged for another
            noise = torch.randn(parameter.shape, generator=generator("noise", name))
            parameter.copy_(initial_value(name, layout_of(parameter), config, seed=1) + 0.02 * noise)
    state = CheckpointState(
        step=7,
        samples=56,
        topology=SavedTopology(data=1, tensor=1, zero=0),
        fingerprints={"tokenizer": tokenizer.fingerprint},
        model=config,
        recipe={"data": {"tokenizer": str(tokenizer_folder)}},
    )
    run = tmp_path_factory.mktemp("run")
    slices = [LocalSlice(name, "param", layout_of(p), 0, p.detach().flatten()) for name, p in model.named_parameters()]
    save(run, state, slices, Alone())
    return Trained(run, codec_folder, tokenizer_folder, config, model)


@pytest.fixture(scope="session")
def exported(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("export") / "omni-tiny"
    return Exported(folder, to_hf(trained.run, folder, str(trained.codec)))
