"""The tiny parts of ``tiny.py``, made once."""

from __future__ import annotations

import pytest

from megatron_omni.data.tokenizer import OmniTokenizer, prepare_tokenizer
from megatron_omni.demo.train_tokenizer import train_bpe
from megatron_omni.export.modeling import OmniForConditionalGeneration
from megatron_omni.export.processing import OmniProcessor
from tests.evaluate.tiny import WORDS, MemorySamples, make_model, make_samples


@pytest.fixture(scope="session")
def samples() -> MemorySamples:
    return make_samples()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> OmniTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([" ".join(WORDS)] * 10, folder / "base", 400)
    prepare_tokenizer(folder / "base", folder / "omni")
    return OmniTokenizer.load(folder / "omni")


@pytest.fixture(scope="session", params=[0, 2], ids=["no delay", "delay 2"])
def model(request: pytest.FixtureRequest, tokenizer: OmniTokenizer) -> OmniForConditionalGeneration:
    return make_model(tokenizer, request.param)


@pytest.fixture(scope="session")
def processor(model: OmniForConditionalGeneration, tokenizer: OmniTokenizer) -> OmniProcessor:
    return OmniProcessor.of(model.config.model, tokenizer)
