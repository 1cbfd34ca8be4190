"""A tiny random model and an in-memory data set of every kind of answer, shared by the evaluation tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import MimiConfig

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
from megatron_omni.data.tokenizer import OmniTokenizer
from megatron_omni.export.configuration import OmniConfig
from megatron_omni.export.modeling import OmniForConditionalGeneration
from megatron_omni.schema import Message, Part, Sample, SampleArrays, Task

WORDS = ["zero", "one", "two", "three", "four", "five", "red", "green", "blue", "anna", "has", "a", "ball"]
K, CARD = 3, 16


@dataclass(frozen=True)
class MemorySamples:
    """``data.demands.Samples`` in memory."""

    samples: list[Sample]
    contents: list[SampleArrays]
    codec: CodecConfig | None = None
    fingerprint: str = "memory"

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, number: int) -> Sample:
        return self.samples[number]

    def arrays(self, number: int) -> SampleArrays:
        return self.contents[number]


def make_samples(count: int = 24, seed: int = 0) -> MemorySamples:
    """Transcriptions without codes, answers with codes, codes alone, and a conversation of two turns, in turn."""
    random = np.random.default_rng(seed)
    samples, contents = [], []
    for number in range(count):
        text = " ".join(random.choice(WORDS, random.integers(1, 6)))
        user = Message("user", (Part("audio", "audio0"),))
        codes = Part("codes", "codes0")
        task: Task = ("transcribe", "answer", "speech_to_speech", "converse")[number % 4]  # type: ignore[assignment]
        said = {"transcribe": (Part("text", text.upper()),), "answer": (Part("text", text), codes), "speech_to_speech": (codes,)}.get(task)
        messages = (user, Message("assistant", said or (Part("text", text), codes)))
        names = ["audio0"]
        if task == "converse":
            messages += (
                Message("user", (Part("audio", "audio1"),)),
                Message("assistant", (Part("text", "One " + text), Part("codes", "codes1"))),
            )
            names.append("audio1")
        audio = {name: random.normal(0, 0.1, random.integers(3000, 9000)).astype(np.float32) for name in names}
        spoken = [part.value for message in messages for part in message.content if part.type == "codes"]
        # few codes, some of them often, so that no entropy is the trivial one
        arrays = {name: random.binomial(CARD - 1, 0.3, (K, random.integers(2, 9))).astype(np.uint16) for name in spoken}
        sample = Sample(
            id=f"s{number}",
            task=task,
            source="test",
            messages=messages,
            num_samples={name: len(wave) for name, wave in audio.items()},
            num_frames={name: codes.shape[1] for name, codes in arrays.items()},
            attributes={"kind": "even" if number % 8 < 4 else "odd"},
        )
        samples.append(sample)
        contents.append(SampleArrays(audio, arrays))
    return MemorySamples(samples, contents)


def make_model(tokenizer: OmniTokenizer, acoustic_delay: int = 0) -> OmniForConditionalGeneration:
    """Random weights, far from uniform in what they predict."""

    def stack(width: int, causal: bool = True, layers: int = 1) -> TransformerConfig:
        return TransformerConfig(hidden_size=width, num_layers=layers, num_heads=2, intermediate_size=2 * width, causal=causal)

    config = ModelConfig(
        features=FeatureConfig(num_mel_bins=8),
        encoder=EncoderConfig(conv_strides=(1, 2), stack=stack(16, causal=False)),
        projector=ProjectorConfig(stride=2, hidden_size=16),
        llm=LlmConfig(vocab_size=tokenizer.padded_vocab_size, stack=stack(24, layers=2)),
        audio_head=AudioHeadConfig(pre_nn=stack(16, causal=False), decoder=stack(20), depformer=stack(16), acoustic_delay=acoustic_delay),
        codec=CodecConfig(num_codebooks=K, card=CARD, frame_rate=12.5, sample_rate=24000),
    )
    codec = MimiConfig(
        codebook_size=CARD,
        codebook_dim=8,
        num_quantizers=K,
        num_filters=2,
        hidden_size=16,
        vector_quantization_hidden_dimension=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=16,
        upsample_groups=16,
    )
    torch.manual_seed(0)
    return OmniForConditionalGeneration(OmniConfig.of(config, codec, tokenizer.pad_id, tokenizer.eos_id)).eval()
