"""How an answer is marked: multiple choice, exact match, VQA accuracy, ANLS. Every mark is in [0, 1].

Pure functions on text and on marks; knows nothing of files or policies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dualvla_eval import statistics

Metric = Literal["choice", "exact", "vqa", "anls"]
METRICS: dict[Metric, str] = {
    "choice": "multiple choice: the letter, or else the one option that the answer names",
    "exact": "exact match after lower-casing and dropping punctuation and articles",
    "vqa": "VQA accuracy: min(1, people who agree / 3), mean over leaving each of them out",
    "anls": "ANLS: 1 - edit distance / longer length, 0 below one half; the best of the answers",
}
GRADED: tuple[Metric, ...] = ("vqa", "anls")
"""Marks between 0 and 1; those of the others are 0 or 1."""

ALL = "all"  # questions of every kind
MM = "MM"  # mean over benchmarks

_ARTICLES = ("a", "an", "the")
_ANLS_THRESHOLD = 0.5
_LETTER_ALONE = re.compile(r"\(?([A-Za-z])\)?[\s.,:;]*")
_LETTER_FIRST = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.):,])(?:\s|$)")
_LETTER_NAMED = re.compile(r"(?i:\b(?:answer|option|choice)(?:\s+is)?\s*:?\s*)\(?([A-Z])\b")

# Of the official VQA evaluation (Antol et al. 2015): digits for number words, apostrophes where people leave them out.
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
_NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_APOSTROPHES = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's i'm
    i've isn't it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've
    shouldn't that's there'd there're there's they'd they'll they're they've wasn't we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all
    you'll you're you've
"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _APOSTROPHES.split()}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WITH_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


def mark(metric: Metric, answer: str, expected: Sequence[str], options: Mapping[str, str] | None = None) -> float:
    """expected: the accepted answers (of "choice" the letter; of "vqa" everybody's); options: letter -> text."""
    if metric == "choice":
        return float(chosen(answer, options or {}) == expected[0])
    if metric == "vqa":
        return vqa_accuracy(answer, expected)
    if metric == "anls":
        return anls(answer, expected)
    return float(normalise(answer) in {normalise(e) for e in expected})


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and doubled spaces.

    >>> normalise("The red  cube.")
    'red cube'
    """
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(w for w in words if w not in _ARTICLES)


def chosen(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter that an answer chooses, None if that cannot be told. options: letter -> text.

    >>> chosen("(B) the cup", {"A": "a plate", "B": "a cup"})
    'B'
    >>> chosen("It is the plate.", {"A": "a plate", "B": "a cup"})
    'A'
    """
    text = answer.replace("*", "").strip()
    alone = _LETTER_ALONE.fullmatch(text)
    if alone and alone[1].upper() in options:
        return alone[1].upper()
    first = _LETTER_FIRST.match(text)
    if first and (first[1] or first[2]) in options:
        return first[1] or first[2]
    named = set(_LETTER_NAMED.findall(text)) & options.keys()
    if len(named) == 1:
        return named.pop()
    said = f" {normalise(text)} "
    for within in (False, True):
        fitting = [k for k, v in options.items() if _says(said, f" {normalise(v)} ", within)]
        if len(fitting) == 1:
            return fitting[0]
    return None


def _says(said: str, option: str, within: bool) -> bool:
    return option in said if within else option == said


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """Of the official evaluation: each person is left out once; of the others, three that agree make the answer right.

    >>> vqa_accuracy("Two.", ["2"] * 3 + ["three"] * 7)
    0.9
    """
    said = vqa_normalise(answer)
    agree = [vqa_normalise(p) == said for p in people]
    others = [min(1.0, (sum(agree) - own) / 3) for own in agree]
    return round(sum(others) / len(others), 12)


def vqa_normalise(text: str) -> str:
    """Answers as the official VQA evaluation compares them: numbers as digits, no articles, no punctuation.

    A mark beside a space, or in a text with a number such as 1,000, is dropped; another parts two words.
    """
    text = " ".join(text.lower().split())
    drop = _NUMBER_WITH_COMMA.search(text) is not None
    plain = text
    for m in _MARKS:
        plain = plain.replace(m, "" if drop or f"{m} " in text or f" {m}" in text else " ")
    words = [_NUMBERS.get(word, word) for word in _PERIOD.sub("", plain).split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def anls(answer: str, expected: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one answer (Biten et al. 2019): the best over those expected.

    >>> anls("hallo", ["hello"]), anls("bye", ["hello"])
    (0.8, 0.0)
    """
    return max(_similarity(_plain(answer), _plain(e)) for e in expected)


def _similarity(a: str, b: str) -> float:
    longest = max(len(a), len(b))
    near = 1.0 if longest == 0 else 1.0 - edit_distance(a, b) / longest
    return near if near >= _ANLS_THRESHOLD else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: insertions, deletions and replacements of characters."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


def measured(metric: Metric, scores: Sequence[float]) -> dict[str, Any]:
    """{n, successes, rate, low, high} of marks: Wilson's interval for right or wrong, else the bootstrap's."""
    if metric in GRADED and scores:
        rate, low, high = statistics.bootstrap_mean(scores)
        return {"n": len(scores), "successes": round(sum(scores), 3), "rate": rate, "low": low, "high": high}
    return statistics.wilson(round(sum(scores)), len(scores)).to_dict()


def mean_of_benchmarks(scores: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The paper's MM: every benchmark counts the same. {n, successes, rate, low, high}, bootstrapped."""
    rate, low, high = statistics.bootstrap_mean_of_means(list(scores.values()))
    marks = [mark for of in scores.values() for mark in of]
    return {"n": len(marks), "successes": round(sum(marks), 3), "rate": rate, "low": low, "high": high}
