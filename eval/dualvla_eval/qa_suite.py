"""The suite `qa:DATA`: the held-out questions of a data set's multimodal domain, answered by checkpoints.

An answer counts if it equals the expected one after normalisation. Knows data set folders and `VLAPolicy.answer`;
nothing of simulators.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import ray

from dualvla import console
from dualvla.errors import DataError, UsageError
from dualvla.io import dataset, manifest, storage
from dualvla.schema import Observation
from dualvla_cluster import connect, pool
from dualvla_eval import policies, results, statistics
from dualvla_eval.policies import PolicyRef
from dualvla_eval.sweep import flat_tasks, parts_done, pool_share, refuse_duplicates

PREFIX = "qa:"
_QUESTIONS_PER_ITEM = 64
_COLUMNS = ("episode_id", "step", "split", "domain", "task", "instruction", "images", "reasoning")

ANSWER_SCHEMA = pa.schema(
    [
        ("suite", pa.string()),
        ("task", pa.string()),  # the kind of question
        ("question_id", pa.string()),
        ("policy", pa.string()),
        ("question", pa.string()),
        ("expected", pa.string()),
        ("answer", pa.string()),
        ("correct", pa.bool_()),
    ]
)


class Answers(Protocol):
    """What a policy must be able to do here."""

    def answer(self, observations: Sequence[Observation]) -> list[str]: ...


LoadAnswers = Callable[[str], Answers]


@dataclass(frozen=True)
class Question:
    """A row of the data set; images are encoded."""

    id: str
    kind: str
    question: str
    expected: str
    images: Mapping[str, bytes]


@dataclass(frozen=True)
class QuestionItem:
    """Questions [start, stop) of the data set, for one policy."""

    policy: PolicyRef
    start: int
    stop: int

    @property
    def part(self) -> str:
        return f"{self.policy.name}-qa-{self.start:06d}"


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and doubled spaces.

    >>> normalise("The red  cube.")
    'red cube'
    """
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(w for w in words if w not in ("a", "an", "the"))


def read_questions(data: str) -> list[Question]:
    """The multimodal rows of split "test", in file order. Raises: DataError if there are none."""
    questions: list[Question] = []
    for file in dataset.open_dataset(data).files:
        table = dataset.read_table(file, _COLUMNS)
        held_out = pc.and_(pc.equal(table["domain"], "multimodal"), pc.equal(table["split"], "test"))
        questions += [
            Question(f"{r['episode_id']}:{r['step']}", r["task"], r["instruction"], r["reasoning"], dict(r["images"]))
            for r in table.filter(held_out).to_pylist()
        ]
    if not questions:
        raise DataError(f"'{data}' has no multimodal rows of split 'test'.", "collect some: `dualvla collect --qa N`")
    return questions


class QuestionWorkerImpl:
    """Holds the questions and one checkpoint at a time."""

    def __init__(self, folder: str, data: str, load: LoadAnswers):
        self._folder, self._load = folder, load
        self._suite, self._questions = PREFIX + data, read_questions(data)
        self._policy: tuple[PolicyRef, Answers] | None = None

    def run(self, item: QuestionItem) -> int:
        if self._policy is None or self._policy[0] != item.policy:
            self._policy = None  # frees the old one before the new one is loaded
            self._policy = (item.policy, self._load(item.policy.source))
        asked = self._questions[item.start : item.stop]
        answers = self._policy[1].answer([_observation(q, item.policy) for q in asked])
        rows = [
            {
                "suite": self._suite,
                "task": q.kind,
                "question_id": q.id,
                "policy": item.policy.name,
                "question": q.question,
                "expected": q.expected,
                "answer": answer,
                "correct": normalise(answer) == normalise(q.expected),
            }
            for q, answer in zip(asked, answers, strict=True)
        ]
        results.write_rows(results.part_url(self._folder, item.part), rows, ANSWER_SCHEMA)
        return len(rows)


QuestionWorker = ray.remote(QuestionWorkerImpl)


def _observation(question: Question, ref: PolicyRef) -> Observation:
    images = {name: dataset.decode_image(data) for name, data in question.images.items()}
    if ref.ablation == "blank-images":
        images = policies.blank(images)
    return Observation(images, question.question, id=question.id)


def run_questions(
    folder: str,
    data: str,
    refs: Sequence[PolicyRef],
    *,
    workers: int,
    load: LoadAnswers = policies.load_checkpoint,
) -> dict[str, Any]:
    """Fills `folder` (answers.parquet, summary.json), resuming what is there, and returns its summary.

    Raises: UsageError for a policy that cannot answer questions; DataError for a data set without questions.
    """
    refuse_duplicates(refs)
    for ref in refs:
        if ref.built_in or ref.remote or ref.ablation == "other-instruction":
            what = f"'{ref.source}'" if ref.ablation != "other-instruction" else f"Ablation '{ref.ablation}'"
            raise UsageError(
                f"{what} cannot answer questions.", "pass checkpoint folders, ablation none or blank-images"
            )
    count = len(read_questions(data))
    identity = {"suite": "qa", "policies": [r.name for r in refs]}
    inputs = {"data": manifest.input_digests({"data": data})["data"]}
    inputs |= {f"policy:{r.name}": policies.digest(r) for r in refs}
    if not manifest.begin(folder, results.KIND, identity, inputs):
        return {**results.read_json(storage.join(folder, results.SUMMARY)), "skipped": True}

    size = _QUESTIONS_PER_ITEM
    items = [QuestionItem(ref, i, min(i + size, count)) for ref in refs for i in range(0, count, size)]
    done = set(parts_done(folder))
    pending = [i for i in items if i.part not in done]
    if pending:
        connect.connect()
        total = count * len(refs)
        with console.progress("questions", total, total - sum(i.stop - i.start for i in pending)) as advance:
            for outcome in pool.run(
                lambda: QuestionWorker.options(num_cpus=pool_share(workers)).remote(folder, data, load),
                "run",
                pending,
                num_actors=workers,
            ):
                if outcome.failure is not None:
                    raise DataError(f"Questions {outcome.item}: {outcome.failure}", "run the same command again")
                advance(outcome.value)

    parts = parts_done(folder)
    table = results.merge_parts(folder, parts, ANSWER_SCHEMA, ("policy", "question_id"))
    dataset.write_table(storage.join(folder, results.ANSWERS), table)
    summary = _summarise(refs, table.to_pylist())
    results.write_json(storage.join(folder, results.SUMMARY), summary)
    manifest.finish(folder, results.KIND, identity, inputs, questions=count, suite="qa")
    return {**summary, "skipped": False}


def _summarise(refs: Sequence[PolicyRef], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    per_policy: dict[str, dict[str, Any]] = {}
    for ref in refs:
        own = [r for r in rows if r["policy"] == ref.name]
        kinds = {k: [r for r in own if r["task"] == k] for k in sorted({r["task"] for r in own})} | {"all": own}
        tasks = {k: statistics.wilson(sum(r["correct"] for r in of), len(of)).to_dict() for k, of in kinds.items()}
        per_policy[ref.name] = {"source": "checkpoint", "ablation": ref.ablation, "tasks": tasks}
    return {
        "suite": "qa",
        "tasks": flat_tasks({name: p["tasks"] for name, p in per_policy.items()}),
        "policies": per_policy,
        "conventions": {
            "match": "exact after lower-casing and dropping punctuation and articles",
            "decoding": "greedy",
        },
        "interval": "Wilson, 95 %",
    }
