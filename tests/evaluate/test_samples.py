"""Selections, questions and answers, and the exchange of codes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_omni.evaluate.samples import Selection, answer, exchange_codes, question, spoken_texts
from megatron_omni.runtime.errors import InputError
from megatron_omni.schema import Message, Part, Sample
from tests.evaluate.tiny import MemorySamples


def speaking(text: str) -> Sample:
    turn = Message("assistant", (Part("text", text), Part("codes", "codes0")))
    return Sample("s", "answer", "test", (Message("user", (Part("audio", "audio0"),)), turn), {"audio0": 1}, {"codes0": 1})


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=30), st.integers(0, 3))
def test_everyone_gets_the_codes_of_another_text(texts: list[str], seed: int) -> None:
    donors = exchange_codes([speaking(text) for text in texts], seed)
    if 2 * max(texts.count(text) for text in texts) > len(texts):
        assert donors is None
        return
    assert donors is not None
    assert donors == exchange_codes([speaking(text) for text in texts], seed)
    givers = {number: given["codes0"][0] for number, given in donors.items()}
    assert sorted(givers) == sorted(givers.values()) == list(range(len(texts)))
    assert all(texts[number] != texts[giver] for number, giver in givers.items())


def test_letter_case_makes_no_other_text_and_seeds_differ() -> None:
    assert exchange_codes([speaking("Red"), speaking("red")]) is None
    many = [speaking(str(number)) for number in range(20)]
    assert exchange_codes(many, 0) != exchange_codes(many, 1)


def test_a_selection_with_donors(samples: MemorySamples) -> None:
    donors = exchange_codes(samples.samples)
    assert donors is not None
    selection = Selection(samples, range(23, -1, -1), donors)
    assert len(selection) == 24
    for number in range(24):
        sample, arrays = selection.sample(number), selection.arrays(number)
        original = samples.sample(23 - number)
        assert sample.messages == original.messages
        assert {name: codes.shape[1] for name, codes in arrays.codes.items()} == sample.num_frames
        assert arrays.audio is samples.arrays(23 - number).audio
        for name, codes in arrays.codes.items():
            if original.task == "speech_to_speech":  # codes alone: they follow no text
                assert codes is samples.arrays(23 - number).codes[name]
            else:
                other, theirs = donors[23 - number][name]
                assert codes is samples.arrays(other).codes[theirs]
                assert spoken_texts(samples.sample(other))[theirs] != spoken_texts(original)[name]


def test_question_and_answer(samples: MemorySamples) -> None:
    transcribe, _, codes_alone, converse = samples.samples[:4]
    assert answer(transcribe) == transcribe.messages[-1].content[0].value.lower()
    assert answer(codes_alone) is None
    assert answer(converse) == converse.messages[-1].content[0].value  # this task keeps the letter case
    assert question(converse) == converse.messages[:3]
    with pytest.raises(InputError, match="sample s0: its last turn is not the assistant's"):
        question(dataclasses.replace(transcribe, messages=transcribe.messages[:1]))


def test_codes_are_counted_once(samples: MemorySamples) -> None:
    donors = exchange_codes(samples.samples)
    assert donors is not None
    swapped = Selection(samples, range(24), donors)
    before = np.concatenate([codes for arrays in samples.contents for codes in arrays.codes.values()], 1)
    after = np.concatenate([codes for number in range(24) for codes in swapped.arrays(number).codes.values()], 1)
    assert sorted(map(tuple, before.T)) == sorted(map(tuple, after.T))
