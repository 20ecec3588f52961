"""How much a body of reasoning says: its tokens, the entropy of its n-grams, and how often it repeats itself.

Plain text statistics, to see what pruning took away (the paper's cause of action degeneration is long runs of
near-identical, low-entropy reasoning). Knows strings only: nothing of labels, files or tokenizers of models.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

ORDERS = (1, 2, 3)
_TOKEN = re.compile(r"\w+|[^\w\s]")


def tokens(text: str) -> list[str]:
    """Words and punctuation marks.

    >>> tokens("move: left, slowly.")
    ['move', ':', 'left', ',', 'slowly', '.']
    """
    return _TOKEN.findall(text)


@dataclass(frozen=True)
class TextStatistics:
    """Of the reasoning of some episodes, in their order.

    texts, tokens: how many. distinct_texts: different ones. repeats_previous: share of texts equal to the text before
    in the same episode; repeats_in_episode: equal to any text before in it. entropy_bits: n -> Shannon entropy of
    the distribution of n-grams within texts (of the sample itself: compare only samples of about equal size).
    """

    texts: int
    tokens: int
    distinct_texts: int
    repeats_previous: float
    repeats_in_episode: float
    entropy_bits: dict[int, float] = field(default_factory=dict)


def text_statistics(episodes: Iterable[Sequence[str]]) -> TextStatistics:
    """Of the texts of each episode, in order. Shares are 0 where there is no text."""
    texts: Counter[str] = Counter()
    after_previous = after_any = 0
    for episode in episodes:
        texts.update(episode)
        after_previous += sum(one == two for one, two in itertools.pairwise(episode))
        after_any += len(episode) - len(set(episode))
    split = {text: tokens(text) for text in texts}
    count = max(texts.total(), 1)
    return TextStatistics(
        texts=texts.total(),
        tokens=sum(len(split[text]) * times for text, times in texts.items()),
        distinct_texts=len(texts),
        repeats_previous=after_previous / count,
        repeats_in_episode=after_any / count,
        entropy_bits={n: _entropy_bits(_ngrams(texts, split, n)) for n in ORDERS},
    )


def _ngrams(texts: Counter[str], split: dict[str, list[str]], n: int) -> Counter[tuple[str, ...]]:
    counts: Counter[tuple[str, ...]] = Counter()
    for text, times in texts.items():
        for gram in zip(*(split[text][i:] for i in range(n)), strict=False):
            counts[gram] += times
    return counts


def _entropy_bits(counts: Counter[tuple[str, ...]]) -> float:
    total = counts.total()
    return max(0.0, -sum(c / total * math.log2(c / total) for c in counts.values())) if total else 0.0
