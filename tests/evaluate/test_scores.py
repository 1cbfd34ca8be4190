"""Text scores against edit distances computed here."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_omni.evaluate.scores import normalize, score


def edits(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def test_case_and_punctuation_do_not_count() -> None:
    assert normalize("  The Weather, is NICE!  ") == "the weather is nice"
    assert score(["Paris."], ["paris"]).exact_match == 1.0


def test_rates_are_pooled_over_words() -> None:
    result = score(["one two three four", "five"], ["one two four four", "five six"])
    assert result.samples == 2
    assert result.wer == pytest.approx(2 / 5)  # not (1/4 + 1/1) / 2
    assert result.cer == pytest.approx((edits("one two three four", "one two four four") + 4) / (18 + 4))
    assert result.exact_match == 0.0


def test_references_without_words() -> None:
    result = score(["...", "!"], ["", "a"])
    assert (result.wer, result.cer, result.exact_match) == (None, None, 0.5)


sentences = st.lists(st.text("abc ", max_size=12), min_size=1, max_size=5)


@given(st.data())
def test_rates_equal_edit_distances(data: st.DataObject) -> None:
    expected = data.draw(sentences)
    said = data.draw(st.lists(st.text("abc ", max_size=12), min_size=len(expected), max_size=len(expected)))
    result = score(expected, said)
    pairs = [(a.split(), b.split()) for a, b in zip(expected, said, strict=True)]
    assert result.exact_match == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    words = sum(len(a) for a, _ in pairs)
    if words == 0:
        assert result.wer is None
        return
    joined = [(" ".join(a), " ".join(b)) for a, b in pairs]
    assert result.wer == pytest.approx(sum(edits(a, b) for a, b in pairs) / words)
    assert result.cer == pytest.approx(sum(edits(a, b) for a, b in joined) / sum(len(a) for a, _ in joined))
