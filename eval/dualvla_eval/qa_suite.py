"""The suites `qa:PATH`: benchmarks of questions about pictures, answered by checkpoints, marked, and summed up.

One column a benchmark, and MM, their unweighted mean (the paper's Tables 6 to 8). Work is cut into parts that appear
whole, so a killed run goes on. Knows benchmarks and `VLAPolicy.answer`; nothing of simulators.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray

from dualvla import console
from dualvla.errors import DataError, UsageError
from dualvla.io import dataset, manifest, storage
from dualvla.schema import Observation
from dualvla_cluster import connect, pool
from dualvla_eval import policies, qa_benchmarks, qa_metrics, results
from dualvla_eval.policies import PolicyRef
from dualvla_eval.qa_benchmarks import Benchmark, BenchmarkRef, Question
from dualvla_eval.qa_metrics import ALL, MM, mean_of_benchmarks, measured
from dualvla_eval.summary import flat_tasks
from dualvla_eval.sweep import parts_done, pool_share, refuse_duplicates

log = logging.getLogger(__name__)

_QUESTIONS_PER_ITEM = 64
_NAMED_PROBLEMS = 20  # in the summary; answers.parquet has all

ANSWER_SCHEMA = pa.schema(
    [
        ("suite", pa.string()),
        ("benchmark", pa.string()),
        ("task", pa.string()),  # the kind of question
        ("question_id", pa.string()),
        ("policy", pa.string()),
        ("question", pa.string()),
        ("expected", pa.string()),
        ("answer", pa.string()),
        ("score", pa.float64()),  # the mark, 0 to 1; null with a problem
        ("correct", pa.bool_()),  # a mark of one half or more
        ("problem", pa.string()),  # why it was not asked
    ]
)


class Answers(Protocol):
    """What a policy must be able to do here."""

    def answer(self, observations: Sequence[Observation]) -> list[str]: ...


LoadAnswers = Callable[[str], Answers]


@dataclass(frozen=True)
class QuestionItem:
    """Questions [start, stop) of a benchmark, for one policy."""

    policy: PolicyRef
    benchmark: str
    start: int
    stop: int

    @property
    def part(self) -> str:
        return f"{self.policy.name}-{self.benchmark}-{self.start:06d}"


class QuestionWorkerImpl:
    """Holds one benchmark and one checkpoint at a time."""

    def __init__(self, folder: str, refs: Sequence[BenchmarkRef], load: LoadAnswers):
        self._folder, self._load = folder, load
        self._refs = {ref.name: ref for ref in refs}
        self._benchmark: Benchmark | None = None
        self._policy: tuple[PolicyRef, Answers] | None = None

    def run(self, item: QuestionItem) -> int:
        if self._benchmark is None or self._benchmark.name != item.benchmark:
            self._benchmark = None  # frees the old one before the new one is read
            self._benchmark = qa_benchmarks.read(self._refs[item.benchmark])
        if self._policy is None or self._policy[0] != item.policy:
            self._policy = None
            self._policy = (item.policy, self._load(item.policy.source))
        looked = [_looked_at(q, item.policy) for q in self._benchmark.questions[item.start : item.stop]]
        asked = [observation for _, observation in looked if observation is not None]
        answers = iter(self._policy[1].answer(asked))
        rows = [
            _row(self._benchmark, question, item.policy, None if observation is None else next(answers))
            for question, observation in looked
        ]
        results.write_rows(results.part_url(self._folder, item.part), rows, ANSWER_SCHEMA)
        return len(rows)


QuestionWorker = ray.remote(QuestionWorkerImpl)


def _looked_at(question: Question, ref: PolicyRef) -> tuple[Question, Observation | None]:
    """The question with its pictures decoded, or with its problem."""
    if question.problem is not None:
        return question, None
    try:
        images: Mapping[str, np.ndarray] = {n: dataset.decode_image(d) for n, d in question.images.items()}
    except DataError as error:
        return replace(question, problem=f"its image cannot be decoded: {error.message}"), None
    if ref.ablation == "blank-images":
        images = policies.blank(images)
    return question, Observation(images, question.prompt, id=question.id)


def _row(benchmark: Benchmark, question: Question, ref: PolicyRef, answer: str | None) -> dict[str, Any]:
    score = None
    if answer is not None:
        score = qa_metrics.mark(benchmark.metric, answer, question.expected, question.options)
    return {
        "suite": f"{qa_benchmarks.PREFIX}{benchmark.name}",
        "benchmark": benchmark.name,
        "task": question.kind,
        "question_id": question.id,
        "policy": ref.name,
        "question": question.prompt,
        "expected": " | ".join(dict.fromkeys(question.expected)),
        "answer": answer,
        "score": score,
        "correct": None if score is None else score >= 0.5,
        "problem": question.problem,
    }


def run_questions(
    folder: str,
    suites: Sequence[str],
    refs: Sequence[PolicyRef],
    *,
    workers: int,
    load: LoadAnswers = policies.load_checkpoint,
) -> dict[str, Any]:
    """Fills `folder` (answers.parquet, summary.json), resuming what is there, and returns its summary.

    suites: `[NAME=]PATH[#METRIC]` each. Raises: UsageError for a policy that cannot answer questions or two benchmarks
    of one name; DataError for a benchmark without questions.
    """
    refuse_duplicates(refs)
    asked = [qa_benchmarks.parse(text) for text in suites]
    _check(refs, asked)
    benchmarks = {ref.name: qa_benchmarks.read(ref) for ref in asked}
    counts = {name: len(b.questions) for name, b in benchmarks.items()}
    metrics = {name: b.metric for name, b in benchmarks.items()}
    del benchmarks  # their pictures: the workers read their own

    identity = {"suite": "qa", "policies": [r.name for r in refs], "metrics": metrics}
    inputs = {f"benchmark:{ref.name}": qa_benchmarks.content_digest(ref) for ref in asked}
    inputs |= {f"policy:{r.name}": policies.digest(r) for r in refs}
    if not manifest.begin(folder, results.KIND, identity, inputs):
        return {**results.read_json(storage.join(folder, results.SUMMARY)), "skipped": True}

    _ask(folder, asked, refs, counts, workers, load)
    names = [item.part for item in _items(refs, counts)]
    table = results.merge_parts(folder, names, ANSWER_SCHEMA, ("policy", "benchmark", "question_id"))
    dataset.write_table(storage.join(folder, results.ANSWERS), table)
    summary = _summarise(refs, asked, metrics, table.to_pylist())
    results.write_json(storage.join(folder, results.SUMMARY), summary)
    manifest.finish(folder, results.KIND, identity, inputs, questions=sum(counts.values()), suite="qa")
    return {**summary, "skipped": False}


def _check(refs: Sequence[PolicyRef], asked: Sequence[BenchmarkRef]) -> None:
    for ref in refs:
        if ref.built_in or ref.remote or ref.ablation == "other-instruction":
            what = f"'{ref.source}'" if ref.ablation != "other-instruction" else f"Ablation '{ref.ablation}'"
            raise UsageError(
                f"{what} cannot answer questions.", "pass checkpoint folders, ablation none or blank-images"
            )
        if ref.options:
            raise UsageError(f"The options of '{ref.name}' are for acting.", "ask the checkpoint without ?key=value")
    for name, count in Counter(b.name for b in asked).items():
        if count > 1 or name in (ALL, MM):
            why = f"{count} benchmarks are called '{name}'" if count > 1 else f"A benchmark cannot be called '{name}'"
            raise UsageError(f"{why}.", "name them: --suite qa:first=PATH --suite qa:second=PATH")


def _items(refs: Sequence[PolicyRef], counts: Mapping[str, int]) -> list[QuestionItem]:
    """A worker changes its checkpoint seldom, and its benchmark within one."""
    size = _QUESTIONS_PER_ITEM
    return [
        QuestionItem(ref, name, i, min(i + size, count))
        for ref in refs
        for name, count in counts.items()
        for i in range(0, count, size)
    ]


def _ask(
    folder: str,
    asked: Sequence[BenchmarkRef],
    refs: Sequence[PolicyRef],
    counts: Mapping[str, int],
    workers: int,
    load: LoadAnswers,
) -> None:
    items = _items(refs, counts)
    done = set(parts_done(folder))
    pending = [i for i in items if i.part not in done]
    if not pending:
        return
    connect.connect()
    total = sum(i.stop - i.start for i in items)
    with console.progress("questions", total, total - sum(i.stop - i.start for i in pending)) as advance:
        for outcome in pool.run(
            lambda: QuestionWorker.options(num_cpus=pool_share(workers)).remote(folder, asked, load),
            "run",
            pending,
            num_actors=workers,
        ):
            if outcome.failure is not None:
                raise DataError(f"Questions {outcome.item}: {outcome.failure}", "run the same command again")
            advance(outcome.value)


def _summarise(
    refs: Sequence[PolicyRef],
    asked: Sequence[BenchmarkRef],
    metrics: Mapping[str, qa_metrics.Metric],
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    per_policy = {ref.name: _of_policy(ref, metrics, [r for r in rows if r["policy"] == ref.name]) for ref in refs}
    first = [r for r in rows if r["policy"] == refs[0].name]
    about: dict[str, dict[str, Any]] = {}
    for ref in asked:
        own = [r for r in first if r["benchmark"] == ref.name]
        problems = [r for r in own if r["problem"] is not None]
        about[ref.name] = {
            "path": ref.path,
            "metric": metrics[ref.name],
            "rows": len(own),
            "bad_rows": len(problems),
            "problems": [f"{r['question_id']}: {r['problem']}" for r in problems[:_NAMED_PROBLEMS]],
        }
        if problems:
            log.warning(
                "%s: %d of %d rows were not asked and do not count; the first: %s",
                ref.name, len(problems), len(own), about[ref.name]["problems"][0],
            )  # fmt: skip
    return {
        "suite": "qa",
        "benchmarks": about,
        "tasks": flat_tasks({name: p["tasks"] for name, p in per_policy.items()}),
        "policies": per_policy,
        "conventions": {
            **{metric: qa_metrics.METRICS[metric] for metric in sorted(set(metrics.values()))},
            "decoding": "greedy",
            MM: "unweighted mean of the benchmarks",
        },
        "interval": "95 %: Wilson for right or wrong, percentile bootstrap for graded marks and for MM",
    }


def _of_policy(
    ref: PolicyRef, metrics: Mapping[str, qa_metrics.Metric], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """tasks: of one benchmark its kinds and "all"; of several each benchmark, its kinds as BENCHMARK/KIND, and MM."""
    tasks: dict[str, Any] = {}
    columns: dict[str, Any] = {}
    marks: dict[str, list[float]] = {}
    for name, metric in metrics.items():
        own = [r for r in rows if r["benchmark"] == name and r["score"] is not None]
        if not own:
            raise DataError(f"No question of '{name}' could be asked.", "see `problem` in answers.parquet")
        marks[name] = _marks(own)
        columns[name] = {"metric": metric, **measured(metric, marks[name])}
        kinds = sorted({r["task"] for r in own} - {ALL})
        of_kind = {kind: measured(metric, _marks(r for r in own if r["task"] == kind)) for kind in kinds}
        if len(kinds) == 1:
            of_kind = {}  # it would say the same twice
        if len(metrics) == 1:
            tasks |= {**of_kind, ALL: columns[name]}
        else:
            tasks |= {name: columns[name], **{f"{name}/{kind}": found for kind, found in of_kind.items()}}
    if len(metrics) > 1:
        tasks[MM] = mean_of_benchmarks(marks)
    return {
        "source": "checkpoint",
        "ablation": ref.ablation,
        "benchmarks": columns,
        MM: mean_of_benchmarks(marks),
        "tasks": tasks,
    }


def _marks(rows: Iterable[Mapping[str, Any]]) -> list[float]:
    return [r["score"] for r in rows]
