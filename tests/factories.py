"""Small things that many tests need: a tiny omni model, a tokenizer, random samples of every shape, and packed rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from megatron_omni.audio.features import LogMel
from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.config.model import (
    AudioHeadConfig,
    CodecConfig,
    EncoderConfig,
    FeatureConfig,
    LlmConfig,
    ModelConfig,
    ProjectorConfig,
    TransformerConfig,
)
from megatron_omni.data.render import render
from megatron_omni.data.rows.collate import Packed, collate
from megatron_omni.data.tokenizer import OmniTokenizer, prepare_tokenizer
from megatron_omni.demo.train_tokenizer import train_bpe
from megatron_omni.runtime.seeds import rng
from megatron_omni.schema import Batch, Message, Part, RowShape, Sample, SampleArrays

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "red", "blue"]
SHAPE = RowShape(seq=128, codec=64, encoder=256, spoken=32, supervised=128)
CODEC = CodecConfig(num_codebooks=4, card=32, frame_rate=12.5, sample_rate=24000)


@lru_cache(maxsize=1)
def tokenizer() -> OmniTokenizer:
    """A BPE over ``WORDS``, prepared as a user would prepare one."""
    with TemporaryDirectory() as folder:
        train_bpe([" ".join(WORDS)] * 100, Path(folder, "base"), vocab_size=400)
        prepare_tokenizer(Path(folder, "base"), Path(folder, "out"))
        return OmniTokenizer.load(Path(folder, "out"))


def stack(width: int, layers: int, causal: bool = True, kv_heads: int | None = None) -> TransformerConfig:
    return TransformerConfig(
        hidden_size=width, num_layers=layers, num_heads=4, num_kv_heads=kv_heads, intermediate_size=2 * width, causal=causal
    )


def model_config(acoustic_delay: int = 0) -> ModelConfig:
    """Every part small, widths all different; heads that tensor-parallel sizes 1 and 2 divide."""
    whisper = TransformerConfig(
        hidden_size=24,
        num_layers=2,
        num_heads=2,
        intermediate_size=48,
        norm="layer",
        mlp="gelu",
        positions="sinusoidal",
        causal=False,
        bias=True,
    )
    return ModelConfig(
        features=FeatureConfig(num_mel_bins=16),
        encoder=EncoderConfig(conv_strides=(1, 2), stack=whisper),
        projector=ProjectorConfig(stride=4, hidden_size=40),
        llm=LlmConfig(vocab_size=tokenizer().padded_vocab_size, stack=stack(32, 2, kv_heads=2)),
        audio_head=AudioHeadConfig(
            pre_nn=stack(16, 1, causal=False), decoder=stack(48, 2), depformer=stack(24, 1), acoustic_delay=acoustic_delay
        ),
        codec=CODEC,
    )


def random_sample(number: int, speech: bool | None = None) -> tuple[Sample, SampleArrays]:
    """A sample of any kind, by its number: with or without audio, text and codes in the answer, one or two turns."""
    random = rng("sample", number)
    arrays = SampleArrays({}, {})
    messages = []
    for _ in range(random.integers(1, 3)):
        question, answer = [], []
        if random.random() < 0.8:
            name = f"audio{len(arrays.audio)}"
            arrays.audio[name] = 0.1 * random.standard_normal(random.integers(1600, 6400)).astype(np.float32)
            question.append(Part("audio", name))
        if not question or random.random() < 0.4:
            question.append(Part("text", "Transcribe:"))
        with_codes = random.random() < 0.6 if speech is None else speech
        if not with_codes or random.random() < 0.8:
            answer.append(Part("text", " ".join(random.choice(WORDS, random.integers(1, 5)))))
        if with_codes:
            name = f"codes{len(arrays.codes)}"
            arrays.codes[name] = random.integers(0, CODEC.card, (CODEC.num_codebooks, random.integers(1, 9))).astype(np.uint16)
            answer.append(Part("codes", name))
        messages += [Message("user", tuple(question)), Message("assistant", tuple(answer))]
    lengths = {name: len(wave) for name, wave in arrays.audio.items()}
    frames = {name: codes.shape[1] for name, codes in arrays.codes.items()}
    return Sample(f"sample-{number}", "converse", "test", tuple(messages), lengths, frames), arrays


def packed(numbers: Sequence[int], config: ModelConfig, speech: bool | None = None) -> list[Packed]:
    """What a row holds."""
    geometry = EncoderGeometry.of(config)
    samples = [random_sample(number, speech) for number in numbers]
    return [(sample, render(sample, tokenizer(), geometry), arrays) for sample, arrays in samples]


def pack(rows: Sequence[Sequence[Packed]], config: ModelConfig, tensor_parallel: int = 1) -> Batch:
    return collate(
        rows,
        SHAPE,
        EncoderGeometry.of(config),
        LogMel(config.features),
        CODEC,
        config.audio_head.acoustic_delay,
        tokenizer().pad_id,
        tensor_parallel,
    )
