"""The closed grammar: right answers, disjoint splits, questions apart from statements."""

from __future__ import annotations

import re

import pytest

from megatron_omni.demo import grammar
from megatron_omni.demo.grammar import DAYS, KINDS, NUMBERS, POSITIONS, SPLITS, draw, draw_split, split_of
from megatron_omni.runtime.seeds import rng


@pytest.fixture(scope="module")
def utterances() -> list[grammar.Utterance]:
    random = rng("test grammar")
    return [draw(random, kind) for kind in KINDS for _ in range(1000)]


def test_few_words_many_sentences(utterances: list[grammar.Utterance]) -> None:
    assert len({word for utterance in utterances for word in utterance.text.split()}) <= 120
    assert len({utterance.text for utterance in utterances}) > 2500
    assert all(re.fullmatch(r"[a-z]+( [a-z]+){2,9}", utterance.text) for utterance in utterances)


def test_statements_are_echoed_and_questions_get_one_word(utterances: list[grammar.Utterance]) -> None:
    for utterance in utterances:
        if utterance.is_question:
            assert " " not in utterance.reply
        else:
            assert utterance.reply == utterance.text
    questions = {utterance.text for utterance in utterances if utterance.is_question}
    assert questions.isdisjoint(utterance.text for utterance in utterances if not utterance.is_question)


def test_a_question_has_one_answer(utterances: list[grammar.Utterance]) -> None:
    answers = {utterance.text: utterance.reply for utterance in utterances}
    assert all(answers[utterance.text] == utterance.reply for utterance in utterances)


def test_extraction_answers_are_in_the_question(utterances: list[grammar.Utterance]) -> None:
    assert all(utterance.reply in utterance.text.split() for utterance in utterances if utterance.kind == "extraction")


def test_ordinal_answers_are_right(utterances: list[grammar.Utterance]) -> None:
    for utterance in utterances:
        if utterance.kind != "ordinal":
            continue
        words = utterance.text.split()
        if words[-1] in POSITIONS:
            assert utterance.reply == words[POSITIONS.index(words[-1])]
        else:
            series = NUMBERS if words[-1] in NUMBERS else DAYS
            step = {"after": 1, "before": -1}[words[-2]]
            assert series.index(utterance.reply) == series.index(words[-1]) + step


def test_splits_share_no_sentence_but_all_words() -> None:
    drawn = {split: draw_split(rng("test", split), split, 600, seed=1) for split in SPLITS}
    texts = {split: {utterance.text for utterance in of_split} for split, of_split in drawn.items()}
    for split, sentences in texts.items():
        assert len(drawn[split]) == 600
        assert all(split_of(text, 1) == split for text in sentences)
        assert all(sentences.isdisjoint(texts[other]) for other in SPLITS if other != split)
        assert {utterance.kind for utterance in drawn[split]} == set(KINDS)
    known = {word for text in texts["train"] for word in text.split()}
    assert all(word in known for text in texts["heldout_known"] for word in text.split())


def test_same_seed_same_sentences() -> None:
    assert draw_split(rng("a"), "dev", 20, seed=3) == draw_split(rng("a"), "dev", 20, seed=3)
    assert draw_split(rng("a"), "dev", 20, seed=3) != draw_split(rng("b"), "dev", 20, seed=3)
