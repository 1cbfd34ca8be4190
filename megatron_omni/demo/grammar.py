"""The demo's closed grammar: many short sentences from few words, so that a tiny model can learn them. Pure functions.

Statements (digit strings, sentences) are to be echoed, questions are to be answered with one word that they contain
(extraction) or imply (ordinal). Statements and questions never coincide, so what an utterance asks for follows from its words.

A sentence belongs to one split for good, by its hash: no sentence of one split occurs in another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_omni.runtime.seeds import stable_seed

Kind = Literal["digits", "sentence", "extraction", "ordinal"]
Split = Literal["train", "dev", "heldout_known", "heldout_unseen"]

KINDS: dict[Kind, float] = {"digits": 0.2, "sentence": 0.26, "extraction": 0.24, "ordinal": 0.3}
"""Share of each kind among the utterances."""
SPLITS: dict[Split, int] = {"train": 76, "dev": 8, "heldout_known": 8, "heldout_unseen": 8}
"""Percent of all sentences that belong to each split."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUMBERS = (*DIGITS, "ten", "eleven", "twelve")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
NAMES = ("anna", "ben", "carla", "david", "emma", "frank", "julia", "oscar")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "purple")
NOUNS = ("ball", "cup", "hat", "book", "chair", "lamp", "box", "boat", "key", "coat")
ADJECTIVES = ("big", "small", "new", "clean")
PLACES = ("kitchen", "garden", "park", "school", "market", "office", "station", "forest")
VERBS = ("sees", "wants", "finds", "buys", "likes")
MOVES = ("walks", "runs", "sits", "waits", "sings", "sleeps")
TIMES = ("today", "now", "again", "alone")
POSITIONS = ("first", "second", "last")
CARRIERS = ("what comes", "tell me what comes", "please say what comes", "do you know what comes")


@dataclass(frozen=True)
class Utterance:
    """What a person says, in lower case, and what the assistant says in return."""

    text: str
    reply: str
    kind: Kind

    @property
    def is_question(self) -> bool:
        return self.kind in ("extraction", "ordinal")


def draw(rng: np.random.Generator, kind: Kind) -> Utterance:
    """A random utterance of one kind."""
    if kind == "digits":
        text = reply = " ".join(_pick(rng, DIGITS) for _ in range(rng.integers(3, 7)))
    elif kind == "sentence":
        text = reply = _sentence(rng)
    elif kind == "extraction":
        text, reply = _extraction(rng)
    else:
        text, reply = _ordinal(rng)
    return Utterance(text, reply, kind)


def split_of(text: str, seed: int) -> Split:
    """The one split that a sentence belongs to."""
    percent = stable_seed("split", seed, text) % 100
    for split, share in SPLITS.items():
        if percent < share:
            return split
        percent -= share
    raise AssertionError("the shares of SPLITS add up to 100")


def draw_split(rng: np.random.Generator, split: Split, count: int, seed: int) -> list[Utterance]:
    """``count`` random utterances of one split, kinds in the proportions of ``KINDS``; few sentences occur twice."""
    kinds, weights = tuple(KINDS), np.array(tuple(KINDS.values()))
    chosen: list[Utterance] = []
    while len(chosen) < count:
        kind = kinds[rng.choice(len(kinds), p=weights / weights.sum())]
        utterance = draw(rng, kind)
        while split_of(utterance.text, seed) != split:
            utterance = draw(rng, kind)
        chosen.append(utterance)
    return chosen


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[rng.integers(len(words))]


def _sentence(rng: np.random.Generator) -> str:
    name, other = rng.choice(NAMES, 2, replace=False)
    colour, noun, place = _pick(rng, COLOURS), _pick(rng, NOUNS), _pick(rng, PLACES)
    match rng.integers(4):
        case 0:
            return f"{name} {_pick(rng, VERBS)} a {_pick(rng, ADJECTIVES)} {colour} {noun}"
        case 1:
            return f"the {noun} in the {place} is {_pick(rng, ADJECTIVES)} and {colour}"
        case 2:
            return f"{name} {_pick(rng, MOVES)} in the {place} {_pick(rng, TIMES)}"
        case _:
            return f"{name} and {other} buy {_pick(rng, NUMBERS[2:])} {colour} lamps"


def _extraction(rng: np.random.Generator) -> tuple[str, str]:
    name, colour, noun, place = _pick(rng, NAMES), _pick(rng, COLOURS), _pick(rng, NOUNS), _pick(rng, PLACES)
    match rng.integers(5):
        case 0:
            return f"{name} has a {colour} {noun} what colour is it", colour
        case 1:
            return f"{name} has a {colour} {noun} who has it", name
        case 2:
            return f"{name} has a {colour} {noun} what is it", noun
        case 3:
            return f"{name} {_pick(rng, MOVES)} in the {place} where is {name}", place
        case _:
            number = _pick(rng, NUMBERS[2:])
            return f"{name} has {number} {colour} lamps how many", number


def _ordinal(rng: np.random.Generator) -> tuple[str, str]:
    if rng.integers(2):
        listed = [_pick(rng, DIGITS) for _ in range(3)]
        position = _pick(rng, POSITIONS)
        return f"{' '.join(listed)} which is {position}", listed[POSITIONS.index(position)]
    series = DIGITS if rng.integers(2) else DAYS
    at = int(rng.integers(1, len(series) - 1))
    step = 1 if rng.integers(2) else -1
    called = f"{_pick(rng, NAMES)} " if rng.integers(3) else ""  # "anna what comes after five": more sentences around few facts
    return f"{called}{_pick(rng, CARRIERS)} {'after' if step > 0 else 'before'} {series[at]}", series[at + step]
