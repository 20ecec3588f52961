"""Statistics of reasoning: what a person would count by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualvla.pruning.statistics import text_statistics


def test_repeats_and_distinct_texts() -> None:
    found = text_statistics([["a b", "a b", "c", "a b"], ["a b"], []])
    assert (found.texts, found.tokens, found.distinct_texts) == (5, 9, 2)
    assert found.repeats_previous == 1 / 5
    assert found.repeats_in_episode == 2 / 5  # another episode's text is no repeat


def test_entropy_of_equally_likely_ngrams_and_of_one() -> None:
    even = text_statistics([["a b", "c d"], ["e f", "g h"]])
    assert even.entropy_bits == {1: 3.0, 2: 2.0, 3: 0.0}
    assert text_statistics([["go"] * 9]).entropy_bits == {1: 0.0, 2: 0.0, 3: 0.0}
    assert text_statistics([]).texts == 0


@given(texts=st.lists(st.lists(st.text("ab ,", max_size=6), max_size=5), max_size=4))
def test_order_of_episodes_changes_nothing(texts: list[list[str]]) -> None:
    one, other = text_statistics(texts), text_statistics(texts[::-1])
    assert one.entropy_bits == pytest.approx(other.entropy_bits)
    assert (one.texts, one.tokens, one.repeats_previous) == (other.texts, other.tokens, other.repeats_previous)
