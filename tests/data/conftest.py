"""Small things that the data tests share: a prepared tokenizer and a geometry."""

from __future__ import annotations

import pytest

from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.data.tokenizer import OmniTokenizer, prepare_tokenizer
from megatron_omni.demo.train_tokenizer import train_bpe

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
