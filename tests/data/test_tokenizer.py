"""Preparing a tokenizer keeps what the base has, adds what it lacks, and text stays text."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_omni.data.tokenizer import OmniTokenizer, prepare_tokenizer
from megatron_omni.demo.train_tokenizer import train_bpe
from megatron_omni.runtime.errors import InputError


@pytest.fixture
def base(tmp_path: Path) -> Path:
    train_bpe(["three five the weather is beautiful today"] * 3, tmp_path / "base", 600)
    return tmp_path / "base"


def test_prepares_a_bare_base(base: Path, tmp_path: Path) -> None:
    summary = prepare_tokenizer(base, tmp_path / "omni")
    tokenizer = OmniTokenizer.load(tmp_path / "omni")
    assert set(summary.added) == {"<audio>", "<|im_start|>", "<|im_end|>", "<|pad|>"}
    assert summary.vocab_size == tokenizer.vocab_size == len(tokenizer.hf)
    assert summary.padded_vocab_size == tokenizer.padded_vocab_size
    assert tokenizer.padded_vocab_size % 128 == 0
    assert 0 <= tokenizer.padded_vocab_size - tokenizer.vocab_size < 128
    assert len({tokenizer.pad_id, tokenizer.eos_id, tokenizer.audio_id}) == 3


def test_preparing_twice_changes_nothing(base: Path, tmp_path: Path) -> None:
    prepare_tokenizer(base, tmp_path / "once")
    summary = prepare_tokenizer(tmp_path / "once", tmp_path / "twice")
    assert summary.added == ()
    assert OmniTokenizer.load(tmp_path / "once").fingerprint == OmniTokenizer.load(tmp_path / "twice").fingerprint


def test_a_stock_reader_finds_specials_template_and_padded_size(base: Path, tmp_path: Path) -> None:
    summary = prepare_tokenizer(base, tmp_path / "omni")
    stock = AutoTokenizer.from_pretrained(tmp_path / "omni")
    assert stock.init_kwargs["padded_vocab_size"] == summary.padded_vocab_size
    audio = {"type": "audio", "audio": "audio0"}
    messages = [{"role": "user", "content": [audio, {"type": "text", "text": "Transcribe:"}]}]
    text = stock.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\n<audio> Transcribe:<|im_end|><|im_start|>assistant\n"


def test_a_word_is_one_token_and_a_turn_costs_three(base: Path, tmp_path: Path) -> None:
    prepare_tokenizer(base, tmp_path / "omni")
    tokenizer = OmniTokenizer.load(tmp_path / "omni")
    assert len(tokenizer.encode("three five")) == 2
    assert [len(piece) for piece in tokenizer.template(("user", "assistant"))] == [2, 3, 1]


@pytest.mark.parametrize("text", ["three five", "<|im_end|>", "a <audio> b<|im_start|>user\n", "Größe 東京 🎉", "  two  spaces "])
def test_text_stays_text(text: str, tokenizer: OmniTokenizer) -> None:
    ids = tokenizer.encode(text)
    assert not {tokenizer.audio_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)
    # the first word carries a space of its own, so that it is the same token everywhere; one leading space is lost
    assert tokenizer.decode(ids) == text.removeprefix(" ")


def test_keeps_the_bases_template_and_takes_its_end_of_turn(base: Path, tmp_path: Path) -> None:
    stock = AutoTokenizer.from_pretrained(base)
    stock.add_special_tokens({"eos_token": "</s>", "additional_special_tokens": ["<|eot|>"]})
    stock.chat_template = "{{ bos_token or '' }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}<|eot|>\n{% endfor %}"
    stock.save_pretrained(tmp_path / "llm")
    summary = prepare_tokenizer(tmp_path / "llm", tmp_path / "omni")
    tokenizer = OmniTokenizer.load(tmp_path / "omni")
    assert set(summary.added) == {"<audio>", "<|pad|>"}
    assert tokenizer.hf.chat_template == stock.chat_template
    assert tokenizer.hf.convert_ids_to_tokens(tokenizer.eos_id) == "<|eot|>"


def test_refusals_name_the_cause(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer at"):
        prepare_tokenizer(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(InputError, match=r"lacks <audio>.*prepare_tokenizer"):
        OmniTokenizer.load(base)
    stock = AutoTokenizer.from_pretrained(base)
    stock.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    stock.save_pretrained(tmp_path / "endless")
    with pytest.raises(InputError, match="ends an assistant's turn with no special token"):
        prepare_tokenizer(tmp_path / "endless", tmp_path / "out")
    stock.chat_template = "{{ messages[-1].content }}<|im_end|>"
    stock.save_pretrained(tmp_path / "forgetful")
    with pytest.raises(InputError, match="once and in order"):
        prepare_tokenizer(tmp_path / "forgetful", tmp_path / "out")
