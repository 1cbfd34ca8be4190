"""Small things that the data tests share: a prepared tokenizer, a geometry, features and an in-memory data set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from megatron_omni.audio.features import LogMel
from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.config.model import CodecConfig, FeatureConfig
from megatron_omni.data.tokenizer import OmniTokenizer, prepare_tokenizer
from megatron_omni.demo.train_tokenizer import train_bpe
from megatron_omni.runtime.seeds import rng
from megatron_omni.schema import Message, Part, Sample, SampleArrays

WORDS = ["the", "weather", "is", "beautiful", "today", "paris", "what", "a", "wonderful", "new", "position", "three", "five", "one", "two"]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> OmniTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([" ".join(WORDS)] * 10, folder / "base", 800)
    prepare_tokenizer(folder / "base", folder / "omni")
    return OmniTokenizer.load(folder / "omni")


@pytest.fixture(scope="session")
def geometry() -> EncoderGeometry:
    return EncoderGeometry(hop_length=160, conv_strides=(1, 2), stack=4)


@pytest.fixture(scope="session")
def log_mel() -> LogMel:
    return LogMel(FeatureConfig(num_mel_bins=8))


@dataclass(frozen=True)
class MemorySamples:
    """Random conversations of one to three turns: several audios, spoken, codec-only and text-only answers."""

    size: int
    seed: int = 0
    codec: CodecConfig | None = CodecConfig(num_codebooks=3, card=64, frame_rate=12.5, sample_rate=24000)

    @property
    def fingerprint(self) -> str:
        return f"memory-{self.size}-{self.seed}"

    def __len__(self) -> int:
        return self.size

    def sample(self, number: int) -> Sample:
        random = rng(self.seed, "sample", number)
        messages: list[Message] = []
        lengths: dict[str, int] = {}
        frames: dict[str, int] = {}

        def words() -> Part:
            return Part("text", " ".join(random.choice(WORDS, random.integers(1, 6))))

        for _ in range(random.integers(1, 4)):
            heard = [Part("audio", f"audio{len(lengths) + n}") for n in range(random.integers(0, 3))]
            lengths |= {part.value: int(random.integers(100, 8000)) for part in heard}
            said = [words()] if random.random() < 0.7 else []
            if random.random() < 0.5 or not said:
                said.append(Part("codes", f"codes{len(frames)}"))
                frames[said[-1].value] = int(random.integers(0, 12))
            messages += [Message("user", (*heard, words())), Message("assistant", tuple(said))]
        return Sample(f"s{number}", "converse", "test", tuple(messages), lengths, frames)

    def arrays(self, number: int) -> SampleArrays:
        random, sample = rng(self.seed, "arrays", number), self.sample(number)
        assert self.codec is not None
        shape, card = self.codec.num_codebooks, self.codec.card
        return SampleArrays(
            {name: random.standard_normal(size).astype(np.float32) for name, size in sample.num_samples.items()},
            {name: random.integers(0, card, (shape, size), dtype=np.uint16) for name, size in sample.num_frames.items()},
        )


@pytest.fixture(scope="session")
def memory_samples() -> type[MemorySamples]:
    return MemorySamples
