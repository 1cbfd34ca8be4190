"""Scores of generated text against reference text: word and character error rate (jiwer) and exact match.

Both sides are normalised first, as speech recognition is usually scored: ``NORMALIZATION``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jiwer
from transformers import WhisperTokenizer

NORMALIZATION = (
    "whisper-basic: lower case, no punctuation, no text in brackets, single spaces (transformers' WhisperTokenizer.basic_normalize)"
)
"""Recorded in every report; a rate under another normalisation is another number."""


@dataclass(frozen=True)
class TextScores:
    """Scores of a set of answers. Rates are pooled: all edits over all reference words, never a mean of rates."""

    samples: int
    wer: float | None
    """Word errors per reference word, 0.05 is 5 %; None where no reference holds a word."""
    cer: float | None
    """The same for characters, spaces between words included."""
    exact_match: float
    """Share of answers that are the reference, once both are normalised."""


def normalize(text: str) -> str:
    """``text`` as it is scored; see ``NORMALIZATION``."""
    normalized: str = WhisperTokenizer.basic_normalize(text)
    return normalized.strip()


def score(references: Sequence[str], hypotheses: Sequence[str]) -> TextScores:
    """Scores of ``hypotheses`` against ``references``, one each, in the same order; there must be one at least."""
    expected, said = [normalize(text) for text in references], [normalize(text) for text in hypotheses]
    words = jiwer.process_words(expected, said)
    characters = jiwer.process_characters(expected, said)
    has_words = any(expected)
    return TextScores(
        samples=len(expected),
        wer=words.wer if has_words else None,
        cer=characters.cer if has_words else None,
        exact_match=sum(map(str.__eq__, expected, said)) / len(expected),
    )
