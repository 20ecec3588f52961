"""Benchmarks of questions about pictures, from the two forms that they come in. Knows files; nothing of policies.

A folder in our own schema: the held-out rows of its multimodal domain. A tab-separated file as VLMEvalKit has them:
columns index, image (base64, or the index of the row whose image it is), question, answer, and maybe hint, category and
the options A, B, ... A row that cannot be asked stays in the list, with its problem.
"""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase

import pyarrow.compute as pc

from dualvla.errors import DataError, UsageError, did_you_mean
from dualvla.io import dataset, manifest, storage
from dualvla_eval.qa_metrics import METRICS, Metric

PREFIX = "qa:"
_COLUMNS = ("episode_id", "step", "split", "domain", "task", "instruction", "images", "reasoning")
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._+-]*)=(.+)")
_LONGEST_INDEX = 64  # a shorter "image" is the index of the row that holds it
_PEOPLE = 10  # whose answers VQA accuracy compares with
_ANLS_BY_NAME = ("docvqa", "infovqa", "infographic", "stvqa")  # published with ANLS; nothing in the files says so


@dataclass(frozen=True)
class Question:
    """What is asked and how it is marked. id: unique in the benchmark. images: name -> PNG or JPEG.

    expected: the accepted answers, of "choice" the letter. options: letter -> text. problem: why it cannot be asked.
    """

    id: str
    kind: str
    text: str
    expected: tuple[str, ...]
    images: Mapping[str, bytes]
    options: Mapping[str, str] = field(default_factory=dict)
    problem: str | None = None

    @property
    def prompt(self) -> str:
        if not self.options:
            return self.text
        listed = "\n".join(f"{letter}. {option}" for letter, option in self.options.items())
        return f"{self.text}\nOptions:\n{listed}\nAnswer with the letter of the right option."


@dataclass(frozen=True)
class BenchmarkRef:
    """A benchmark as the command line names it. metric: None if its content decides."""

    name: str
    path: str
    metric: Metric | None = None


@dataclass(frozen=True)
class Benchmark:
    name: str
    metric: Metric
    questions: tuple[Question, ...]


def parse(text: str) -> BenchmarkRef:
    """`qa:[NAME=]PATH[#METRIC]`. NAME is the column of the results (default: the file's or folder's name).

    Raises: UsageError for an unknown metric or a name that cannot be part of a file name.
    """
    path, _, metric = text.removeprefix(PREFIX).partition("#")
    named = _NAMED.fullmatch(path)
    if metric and metric not in METRICS:
        raise UsageError(f"'{text}': there is no metric '{metric}'.", did_you_mean(metric, METRICS))
    if named:
        name, path = named.groups()
    else:
        name = re.sub(r"[^A-Za-z0-9._+-]+", "-", path.rstrip("/").rsplit("/", 1)[-1].removesuffix(".tsv")).strip("-.")
    if not path or not name:
        raise UsageError(f"'{text}' names no benchmark.", "pass --suite qa:PATH, or qa:NAME=PATH")
    return BenchmarkRef(name, path, metric or None)


def content_digest(ref: BenchmarkRef) -> str:
    """Of a data set its manifest, of a file its bytes. Raises: DataError if there is neither."""
    if storage.exists(storage.join(ref.path, manifest.NAME)):
        return manifest.input_digests({"": ref.path})[""]
    if not storage.exists(ref.path):
        raise DataError(f"'{ref.path}' does not exist.", "pass a data set folder or a tab-separated file")
    return manifest.file_digest(ref.path)


def read(ref: BenchmarkRef) -> Benchmark:
    """Raises: DataError if the path holds neither form, or no question that can be asked."""
    folder = storage.exists(storage.join(ref.path, manifest.NAME))
    found = _from_dataset(ref) if folder else _from_table(ref)
    if all(q.problem for q in found.questions):
        first = f" (the first: {found.questions[0].problem})" if found.questions else ""
        raise DataError(f"'{ref.path}' has no question that can be asked{first}.", "check the file")
    return found


def _from_dataset(ref: BenchmarkRef) -> Benchmark:
    questions: list[Question] = []
    for file in dataset.open_dataset(ref.path).files:
        table = dataset.read_table(file, _COLUMNS)
        held_out = pc.and_(pc.equal(table["domain"], "multimodal"), pc.equal(table["split"], "test"))
        questions += [
            Question(
                f"{r['episode_id']}:{r['step']}", r["task"], r["instruction"], (r["reasoning"],), dict(r["images"])
            )
            for r in table.filter(held_out).to_pylist()
        ]
    if not questions:
        raise DataError(
            f"'{ref.path}' has no multimodal rows of split 'test'.", "collect some: `dualvla collect --qa N`"
        )
    if ref.metric == "choice":
        raise UsageError(f"'{ref.path}' has no options to choose from.", "leave #choice out, or take #exact or #anls")
    return Benchmark(ref.name, ref.metric or "exact", tuple(questions))


def _from_table(ref: BenchmarkRef) -> Benchmark:
    try:
        text = storage.read_bytes(ref.path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{ref.path}' is no text: {error}.", "pass a data set folder or a tab-separated file"
        ) from error
    csv.field_size_limit(sys.maxsize)  # a picture is one field
    lines = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t")
    names = lines.fieldnames or []
    lacking = [name for name in ("index", "image", "question", "answer") if name not in names]
    if lacking:
        raise DataError(
            f"'{ref.path}' has no column '{lacking[0]}' (it has: {', '.join(names)[:200]}).",
            "pass a tab-separated file with index, image (base64), question and answer, as VLMEvalKit has them",
        )
    rows = list(_rows(lines))
    letters = [letter for letter in ascii_uppercase if letter in names]
    metric = ref.metric or _metric(ref.name, rows, letters)
    shown = {row["index"]: row["image"] for row in rows}
    seen: set[str] = set()
    questions = []
    for number, row in enumerate(rows, start=1):
        questions.append(_question(row, number, metric, letters, shown, seen))
        seen.add(questions[-1].id)
    return Benchmark(ref.name, metric, tuple(questions))


def _rows(lines: Iterator[Mapping[str | None, object]]) -> Iterator[dict[str, str]]:
    """Every row with all columns as text; one with more or fewer fields than the header has "?" set to say so."""
    for line in lines:
        row = {name: value if isinstance(value, str) else "" for name, value in line.items() if name is not None}
        if None in line or None in line.values():
            row["?"] = "it has another number of columns than the first line"
        yield row


def _metric(name: str, rows: Sequence[Mapping[str, str]], letters: Sequence[str]) -> Metric:
    if {"A", "B"} <= set(letters):
        return "choice"
    if any(known in name.lower().replace("-", "").replace("_", "") for known in _ANLS_BY_NAME):
        return "anls"
    return "vqa" if any(len(_listed(row["answer"])) == _PEOPLE for row in rows) else "exact"


def _question(
    row: Mapping[str, str],
    number: int,
    metric: Metric,
    letters: Sequence[str],
    shown: Mapping[str, str],
    seen: set[str],
) -> Question:
    """number: of the row, counted from 1; it names a row that has no index of its own."""
    options = {letter: row[letter].strip() for letter in letters if row[letter].strip()} if metric == "choice" else {}
    expected = (row["answer"].strip().upper(),) if metric == "choice" else tuple(_listed(row["answer"]))
    problem = row.get("?") or _fault(row, metric, expected, options)
    data = b""
    if problem is None:
        data, problem = _picture(row["image"], shown)
    own = row["index"].strip()
    if not own or own in seen:
        problem = problem or (f"index {own} stands twice" if own else "it has no index")
        own = f"row {number}"
    hint = row.get("hint", "").strip()
    text = "\n".join(part for part in (hint, row["question"].strip()) if part)
    return Question(own, row.get("category", "").strip() or "all", text, expected, {"main": data}, options, problem)


def _fault(row: Mapping[str, str], metric: Metric, expected: Sequence[str], options: Mapping[str, str]) -> str | None:
    if not row["question"].strip():
        return "it has no question"
    if not any(e.strip() for e in expected):
        return "it has no answer"
    if metric != "choice":
        return None
    if len(options) < 2:
        return "it has fewer than two options"
    return None if expected[0] in options else f"its answer '{expected[0][:20]}' is none of its options"


def _picture(cell: str, shown: Mapping[str, str]) -> tuple[bytes, str | None]:
    """The bytes of a picture, or why there are none. Whether they are one shows when they are decoded."""
    cell = cell.strip()
    if cell and len(cell) <= _LONGEST_INDEX:
        cell = shown.get(cell, "").strip()
    if not cell:
        return b"", "it has no image"
    listed = _listed(cell) if cell.startswith("[") else [cell]
    if len(listed) != 1:
        return b"", f"it has {len(listed)} images; one is asked about"
    try:
        return base64.b64decode(listed[0], validate=True), None
    except (binascii.Error, ValueError):
        return b"", "its image is no base64"


def _listed(cell: str) -> list[str]:
    """The texts of a cell that is a list (as JSON or as Python writes it), or the cell itself."""
    cell = cell.strip()
    if cell.startswith("[") and cell.endswith("]"):
        for parse_list in (json.loads, ast.literal_eval):
            try:
                found = parse_list(cell)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(found, list) and found:
                return [str(f) for f in found]
    return [cell]
