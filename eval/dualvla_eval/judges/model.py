"""A model as judge: many conversations at once, each answered exactly once, within a budget, resumable.

One process and asyncio: judging waits for a server, so hundreds of calls in flight cost no more than one process, and
budget, cache and "exactly once" have one owner. `dualvla submit -- score ...` makes that process a Ray job. Films are
decoded and prompts built in threads meanwhile. Knows prompts, answers and the `Chat` it asks; nothing of HTTP or GPUs.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from dualvla import console
from dualvla.errors import DataError, DualVLAError, UsageError
from dualvla.io import manifest
from dualvla_eval import frames
from dualvla_eval.judges.base import Advance, Verdict, unheard
from dualvla_eval.judges.chat import BudgetError, Chat, PassingError, RefusedError, Reply
from dualvla_eval.judges.prompt import Message, Prompt, build, prompts_digest, repair
from dualvla_eval.judges.reply import MalformedError, Marks, parse, schema
from dualvla_eval.judges.verdicts import VerdictStore
from dualvla_eval.knowledge import Retriever
from dualvla_eval.results import Trajectory

log = logging.getLogger(__name__)

NOT_FILMED = "the episode was not filmed: evaluate with --videos all"
_CHARACTERS_PER_TOKEN = 3.5
_TOKENS_PER_PICTURE = {"low": 85, "auto": 765, "high": 765}  # as OpenAI counts a picture of up to 512 px
_REPLY_TOKENS = 200  # of an ordinary answer, for the estimate
_THREADS = 4


@dataclass(frozen=True)
class ModelOptions:
    """frames: pictures of one trajectory. detail: how closely an endpoint looks at them.

    concurrency: calls in flight. attempts: of one call, on passing failures; the wait before the next is random,
    between half and all of backoff_s * 2^n but at most backoff_most_s, or what the server asks for. max_calls,
    max_tokens: what one run may use; null for no limit. examples, example_frames: of the knowledge base, for one
    trajectory. retry_unjudged: ask again where an earlier run got no valid answer.
    """

    frames: int = 8
    detail: Literal["low", "high", "auto"] = "low"
    concurrency: int = 16
    attempts: int = 6
    backoff_s: float = 1.0
    backoff_most_s: float = 60.0
    max_calls: int | None = None
    max_tokens: int | None = None
    examples: int = 3
    example_frames: int = 2
    retry_unjudged: bool = False

    def __post_init__(self) -> None:
        for name, least in (("frames", 2), ("concurrency", 1), ("attempts", 1), ("examples", 0), ("example_frames", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} = {getattr(self, name)} is less than {least}.", f"--set {name}={least}")


@dataclass(frozen=True)
class Variant:
    """The same question in another way, to see whether the judge agrees with itself.

    repeat: another number asks anew instead of taking the answer from the cache. shuffled: list the pictures in another
    order than by time; each is labelled with its step.
    """

    repeat: int = 0
    shuffled: bool = False


@dataclass
class Usage:
    """What was asked of the model. cached: verdicts that were there already."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class _Question:
    """key: hash of all that the answer depends on. examples: ids. tokens: an estimate of one call."""

    key: str
    index: int
    examples: tuple[str, ...]
    tokens: int


@dataclass
class ModelJudge:
    """name: as in `--judge`. sampling: how answers are drawn. retriever: of the knowledge base, if there is one."""

    name: str
    chat: Chat
    store: VerdictStore
    sampling: Mapping[str, Any]
    options: ModelOptions = field(default_factory=ModelOptions)
    retriever: Retriever | None = None
    variant: Variant = field(default_factory=Variant)
    used: Usage = field(default_factory=Usage)

    @property
    def identity(self) -> Mapping[str, Any]:
        options = self.options
        return {
            "judge": self.name,
            "model": self.chat.model,
            "prompts": prompts_digest(),
            "sampling": dict(self.sampling),
            "frames": [options.frames, options.detail],
            "examples": None if self.retriever is None else [options.examples, self.retriever.identity],
        }

    def usage(self) -> Mapping[str, int]:
        return dataclasses.asdict(self.used)

    def ask_differently(self, variant: Variant) -> ModelJudge:
        """The same judge, asking in another way; it counts into the same usage."""
        return dataclasses.replace(self, variant=variant)

    def judge(self, trajectories: Sequence[Trajectory], advance: Advance = unheard) -> list[Verdict]:
        """See `Judge`.

        Raises: UsageError if the estimate exceeds the budget; BudgetError once it is used up; ServerError for an
        endpoint that refuses the key or the model.
        """
        with ThreadPoolExecutor(_THREADS) as threads:
            questions = self._questions(trajectories, threads)
            different = {q.key: q for q in reversed(questions) if isinstance(q, _Question)}
            todo = [q for q in different.values() if not self._is_answered(q.key)]
            self.used.cached += len(different) - len(todo)
            self._check_budget(todo)
            advance(len(questions) - len(todo))
            asked = asyncio.run(self._ask_all(trajectories, todo, advance, threads)) if todo else {}
        return [
            Verdict(unjudged=q) if isinstance(q, str) else asked[q.key] if q.key in asked else self.store.get(q.key)
            for q in questions
        ]

    # --- what will be asked -------------------------------------------------------------------------------------------

    def _questions(self, trajectories: Sequence[Trajectory], threads: ThreadPoolExecutor) -> list[_Question | str]:
        """Instead of a question, why there is none. Prompts are built here once to know their keys, and once more when
        they are asked: pictures of thousands of trajectories would not fit into memory."""
        found = []
        with console.progress(f"frames for {self.name}", len(trajectories)) as advance:
            for question in threads.map(lambda i: self._question(i, trajectories[i]), range(len(trajectories))):
                found.append(question)
                advance(1)
        return found

    def _question(self, index: int, trajectory: Trajectory) -> _Question | str:
        if trajectory.num_steps == 0:
            return "the episode ended before its first step"
        if trajectory.frames is None:
            return NOT_FILMED
        try:
            examples = () if self.retriever is None else self.retriever.find(trajectory, self.options.examples)
            prompt = self._prompt(trajectory, examples)
        except DataError as error:  # one damaged film is one trajectory without a verdict
            return error.message
        text_tokens = round(prompt.characters / _CHARACTERS_PER_TOKEN)
        picture_tokens = prompt.pictures * _TOKENS_PER_PICTURE[self.options.detail]
        return _Question(self._key(prompt), index, examples, text_tokens + picture_tokens + _REPLY_TOKENS)

    def _prompt(self, trajectory: Trajectory, examples: Sequence[str]) -> Prompt:
        assert trajectory.frames is not None
        shown = frames.choose(trajectory, self.options.frames)
        pictures = trajectory.frames.read([step for step, _ in shown])
        order = range(len(shown))
        if self.variant.shuffled:
            order = np.random.default_rng(len(shown)).permutation(len(shown)).tolist()
        scored = () if self.retriever is None else self.retriever.show(examples, self.options.example_frames)
        return build(trajectory, shown, pictures, examples=scored, order=order, detail=self.options.detail)

    def _key(self, prompt: Prompt) -> str:
        """Of all that the answer depends on. Where the model runs is not part of it."""
        return manifest.digest(
            {
                "model": self.chat.model,
                "sampling": dict(self.sampling),
                "prompt": prompt.digest,
                "templates": prompts_digest(),
                "repeat": self.variant.repeat,
            }
        )

    def _is_answered(self, key: str) -> bool:
        return key in self.store and not (self.options.retry_unjudged and self.store.get(key).unjudged is not None)

    def _check_budget(self, todo: Sequence[_Question]) -> None:
        tokens = sum(q.tokens for q in todo)
        log.info(
            "%s: %d to ask, %d known already; about %s tokens before repairs and retries",
            self.name, len(todo), self.used.cached, f"{tokens:,}",
        )  # fmt: skip
        for what, needed, allowed in (
            ("calls", self.used.calls + len(todo), self.options.max_calls),
            ("tokens", self.used.tokens + tokens, self.options.max_tokens),
        ):
            if allowed is not None and needed > allowed:
                raise UsageError(
                    f"Judging needs about {needed:,} {what}, more than the {allowed:,} allowed; nothing was asked.",
                    f"--set max_{what}={needed + needed // 10}, fewer pictures (--set frames=4), or fewer trajectories",
                )

    # --- asking -------------------------------------------------------------------------------------------------------

    async def _ask_all(
        self,
        trajectories: Sequence[Trajectory],
        todo: Sequence[_Question],
        advance: Advance,
        threads: ThreadPoolExecutor,
    ) -> dict[str, Verdict]:
        """Key -> verdict. Twice as many workers as calls in flight: some prepare, or wait before they ask again."""
        answered: dict[str, Verdict] = {}
        slots = asyncio.Semaphore(self.options.concurrency)
        waiting = iter(todo)
        loop = asyncio.get_running_loop()

        async def work() -> None:
            for question in waiting:  # shared: each question is taken once
                trajectory = trajectories[question.index]
                prompt = await loop.run_in_executor(threads, self._prompt, trajectory, question.examples)
                verdict, raw = await self._ask(prompt, question.key, slots)
                verdict = dataclasses.replace(verdict, examples=question.examples)
                if not verdict.passing:
                    await loop.run_in_executor(threads, self.store.put, question.key, verdict, raw)
                answered[question.key] = verdict
                advance(1)

        try:
            async with self.chat, asyncio.TaskGroup() as group:
                for _ in range(min(2 * self.options.concurrency, len(todo))):
                    group.create_task(work())
        except ExceptionGroup as errors:
            first = errors.exceptions[0]
            if isinstance(first, DualVLAError):
                raise first from None  # the others are its like
            raise
        return answered

    async def _ask(self, prompt: Prompt, key: str, slots: asyncio.Semaphore) -> tuple[Verdict, list[str]]:
        """A valid answer, after one repair at most, else why there is none; and the answers as they came."""
        form = schema(prompt.asks_reasoning)
        messages: Sequence[Message] = prompt.messages
        raw: list[str] = []
        problem = ""
        for _ in range(2):
            try:
                reply = await self._call(messages, form, key, slots)
            except (PassingError, RefusedError) as error:
                return Verdict(unjudged=f"no answer: {error.message}", passing=isinstance(error, PassingError)), raw
            raw.append(reply.text)
            try:
                return _verdict(parse(reply.text, prompt.asks_reasoning, prompt.texts)), raw
            except MalformedError as error:
                problem = str(error)
                messages = repair(prompt, reply.text, problem)
        return Verdict(unjudged=f"no valid answer: {problem}"), raw

    async def _call(
        self, messages: Sequence[Message], form: Mapping[str, Any], key: str, slots: asyncio.Semaphore
    ) -> Reply:
        """One answer, asked for up to `attempts` times. Who waits holds no slot."""
        options = self.options
        rng = np.random.default_rng(int(key[:12], 16))  # waits differ between questions, not between runs
        for attempt in range(1, options.attempts + 1):
            try:
                async with slots:
                    self._count_call()
                    reply = await self.chat.ask(messages, form)
            except PassingError as error:
                if attempt == options.attempts:
                    raise
                log.debug("attempt %d of %s failed: %s", attempt, key[:12], error.message)
                wait_s = min(rng.uniform(0.5, 1.0) * options.backoff_s * 2**attempt / 2, options.backoff_most_s)
                await asyncio.sleep(max(wait_s, error.retry_after_s or 0.0))
            else:
                self.used.prompt_tokens += reply.prompt_tokens
                self.used.completion_tokens += reply.completion_tokens
                return reply
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _count_call(self) -> None:
        """Before it is made. Raises: BudgetError."""
        for what, have, allowed in (
            ("calls", self.used.calls, self.options.max_calls),
            ("tokens", self.used.tokens, self.options.max_tokens),
        ):
            if allowed is not None and have >= allowed:
                raise BudgetError(
                    f"The judge's budget of {allowed:,} {what} is used up.",
                    f"raise it with --set max_{what}=...: the same command goes on from here",
                )
        self.used.calls += 1


def _verdict(marks: Marks) -> Verdict:
    return Verdict(
        action=marks.action,
        intention=marks.intention,
        reasoning=marks.reasoning,
        alignment=marks.alignment,
        rationale=marks.thought,
        success=marks.success,
    )
