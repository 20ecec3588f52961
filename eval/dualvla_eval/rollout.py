"""Closed-loop rollouts: one episode of one environment with one policy, and what happened in it.

An episode is a coroutine that waits for its policy only, so that many share a process: while one waits, others
simulate. Knows environments and `EpisodePolicy`: no Ray, no files. Whatever a policy answers is data: a bad reply ends
its episode with a stop reason, and the other episodes go on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dualvla.errors import PolicyError, ServerError, SessionLostError
from dualvla.policy import Policy
from dualvla.schema import ACTION_SPACES, Observation, PolicyReply
from dualvla_eval.asking import Batched, EpisodePolicy
from dualvla_eval.conventions import Conventions, Plan
from dualvla_eval.sim.base import SimEnv, to_observation
from dualvla_eval.suites import Episode, Suite

log = logging.getLogger(__name__)

_USUAL = Conventions()
_TURN_S = 0.02  # after so long without a wait for its policy an episode lets others go on

# Why an episode ended. "crashed" and "stalled" are given by the sweep to an episode that took its process along.
STOP_REASONS = (
    "success",  # at the end of the episode, as its termination rule has it
    "failure",  # the environment ended it: a wrong object, ...
    "step_limit",
    "policy_empty",  # no reply, or a reply without actions
    "policy_shape",  # not [at least as many as are executed, D]
    "policy_nan",  # an action to execute is not finite
    "policy_mismatch",  # the reply carries the id of another observation
    "policy_error",  # the policy raised PolicyError
    "policy_timeout",  # no reply within the time limit of a step
    "policy_unreachable",  # its endpoint did not come back in time
    "episode_timeout",  # the time limit of an episode
    "crashed",
    "stalled",
)


@dataclass(frozen=True)
class Limits:
    """Wall time. step_s: for one answer, and for one step of the simulator. episode_s: for all of an episode."""

    step_s: float = 120.0
    episode_s: float = 1800.0


@dataclass(frozen=True)
class StepRecord:
    """What was known before step `step`, and what was done in it.

    action: float32 [D], None on the closing record that holds where the last action led. events, infer_ms (amortised
    over the batch) and reasoning_tokens belong to this step; infer_ms is None at steps that asked no policy.
    """

    step: int
    ee_pose: np.ndarray
    gripper: np.ndarray
    state: Mapping[str, Any]
    action: np.ndarray | None = None
    reasoning: str | None = None
    keyframe: bool = False
    reasoning_tokens: int = 0
    events: tuple[str, ...] = ()
    infer_ms: float | None = None


@dataclass(frozen=True)
class EpisodeResult:
    """One finished episode. steps holds one record a step, plus the closing one; frames are uint8 [H, W, 3].

    first_success: how many steps it took until success first held, None if it never did. wait_s: of wall_s, how long
    the policy was waited for.
    """

    episode: Episode
    instruction: str
    stop_reason: str
    steps: tuple[StepRecord, ...]
    failure: str | None = None
    first_success: int | None = None
    frames: tuple[np.ndarray, ...] = ()
    wall_s: float = 0.0
    wait_s: float = 0.0

    @property
    def success(self) -> bool:
        return self.stop_reason == "success"

    @property
    def num_steps(self) -> int:
        return len(self.steps) - 1


@dataclass
class _Running:
    """An episode in flight in one environment."""

    episode: Episode
    env: SimEnv
    session: str
    obs: Mapping[str, Any]
    instruction: str
    max_steps: int
    plan: Plan
    frame_size: int | None
    started: float
    steps: list[StepRecord] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)
    reply: PolicyReply | None = None  # the last one; fresh until its first action is executed
    fresh: bool = False
    infer_ms: float = 0.0
    wait_s: float = 0.0
    first_success: int | None = None
    stop_reason: str | None = None
    failure: str | None = None

    def observation(self) -> Observation:
        return to_observation(self.obs, len(self.steps), f"{self.session}#{len(self.steps)}")


def session_name(episode: Episode, seed: int) -> str:
    """The session of an episode: what a policy keys its noise by, so that batching and workers change nothing."""
    return f"{episode.suite}/{episode.task}/{episode.variant}/{episode.episode_id}?seed={seed}"


async def run_episode(
    policy: EpisodePolicy,
    env: SimEnv,
    suite: Suite,
    episode: Episode,
    *,
    seed: int = 0,
    conventions: Conventions = _USUAL,
    limits: Limits = Limits(),
    frame_size: int | None = None,
) -> EpisodeResult:
    """frame_size: side in pixels of the frames to keep (None: keep none).

    A policy that has lost the session is asked again from the episode's start, once. Raises: SessionLostError then, and
    what the environment or the policy raises other than PolicyError and ServerError.
    """
    try:
        return await _run(policy, env, suite, episode, seed, conventions, limits, frame_size)
    except SessionLostError as error:
        log.warning("%s starts again: %s", session_name(episode, seed), error)
        return await _run(policy, env, suite, episode, seed, conventions, limits, frame_size)


def run_episodes(
    policy: Policy | EpisodePolicy,
    envs: Sequence[SimEnv],
    suite: Suite,
    episodes: Sequence[Episode],
    *,
    seed: int = 0,
    conventions: Conventions = _USUAL,
    limits: Limits = Limits(),
    frame_size: Mapping[int, int] | None = None,
) -> Iterator[EpisodeResult]:
    """Yields results as episodes finish. At most len(envs) episodes are in flight, and share forward passes.

    frame_size: episode_id -> side in pixels of the frames to keep of that episode (default: keep none).
    """
    asked: EpisodePolicy = Batched(policy) if isinstance(policy, Policy) else policy
    waiting, free = deque(episodes), deque(envs)
    options: dict[str, Any] = {"seed": seed, "conventions": conventions, "limits": limits}

    async def run(episode: Episode, env: SimEnv) -> EpisodeResult:
        keep = (frame_size or {}).get(episode.episode_id)
        result = await run_episode(asked, env, suite, episode, **options, frame_size=keep)
        free.append(env)
        return result

    with asyncio.Runner() as runner:
        loop, running = runner.get_loop(), set[asyncio.Task[EpisodeResult]]()
        while waiting or running:
            while waiting and free:
                running.add(loop.create_task(run(waiting.popleft(), free.popleft())))
            done, running = runner.run(_first(running))
            yield from sorted((task.result() for task in done), key=lambda r: r.episode.episode_id)


async def _first(tasks: set[asyncio.Task[EpisodeResult]]) -> tuple[set[Any], set[Any]]:
    return await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


async def _run(
    policy: EpisodePolicy,
    env: SimEnv,
    suite: Suite,
    episode: Episode,
    seed: int,
    conventions: Conventions,
    limits: Limits,
    frame_size: int | None,
) -> EpisodeResult:
    started = had_turn = time.perf_counter()
    obs, _ = env.reset(seed=episode.seed, options={"episode": episode})
    session = session_name(episode, seed)
    policy.reset(session)
    policy.attach(session, env, episode)
    max_steps = suite.task(episode.task).max_steps
    plan = Plan(conventions, policy.spec)
    instruction = obs["instruction"]
    run = _Running(episode, env, session, obs, instruction, max_steps, plan, frame_size, started)
    try:
        while run.stop_reason is None:
            if plan.empty:
                await _ask(policy, run, conventions, limits)
            if run.stop_reason is None:
                _step(run, conventions)
            if run.obs["instruction"] != instruction:  # another subtask
                instruction = run.obs["instruction"]
                plan.clear()
                policy.renew(session)
            if run.stop_reason is None and time.perf_counter() - started > limits.episode_s:
                run.stop_reason, run.failure = "episode_timeout", f"took more than {limits.episode_s:g} s"
            if time.perf_counter() - had_turn > _TURN_S:
                await asyncio.sleep(0)
                had_turn = time.perf_counter()
    finally:
        policy.reset(session)
    return _finish(run)


async def _ask(policy: EpisodePolicy, run: _Running, conventions: Conventions, limits: Limits) -> None:
    """Sets what to execute next, or the reason why the episode stops."""
    observation, started = run.observation(), time.perf_counter()
    try:
        async with asyncio.timeout(limits.step_s):
            answer = await policy.ask(conventions.shown(observation), run.session)
    except TimeoutError:
        run.stop_reason, run.failure = "policy_timeout", f"no reply within {limits.step_s:g} s"
        return
    except PolicyError as error:
        run.stop_reason, run.failure = "policy_error", str(error)
        return
    except SessionLostError:
        raise
    except ServerError as error:
        run.stop_reason, run.failure = "policy_unreachable", str(error)
        return
    finally:
        run.wait_s += time.perf_counter() - started
    run.infer_ms, reply = answer.infer_ms, answer.reply
    needed = 1 if conventions.ensemble else policy.spec.execute_steps
    run.stop_reason = _fault(reply, observation, needed, ACTION_SPACES[policy.spec.action_space].size)
    if run.stop_reason is None and reply is not None:
        run.plan.add(observation.step, reply)
        run.reply, run.fresh = reply, True


def _fault(reply: PolicyReply | None, observation: Observation, needed: int, action_size: int) -> str | None:
    """The stop reason of a reply that cannot be executed, None for a good one."""
    if reply is None or np.size(reply.actions) == 0:
        return "policy_empty"
    if reply.id != observation.id:
        return "policy_mismatch"
    actions = np.asarray(reply.actions)
    if actions.ndim != 2 or actions.shape[1] != action_size or len(actions) < needed:
        return "policy_shape"
    if not np.isfinite(actions[:needed]).all():
        return "policy_nan"
    return None


def _step(run: _Running, conventions: Conventions) -> None:
    assert run.reply is not None
    action, reply, fresh = run.plan.next(), run.reply, run.fresh
    run.fresh = False
    before, state = run.obs, run.env.state().to_dict()
    frame = run.env.render(run.frame_size) if run.frame_size is not None else None
    run.obs, _, terminated, truncated, info = run.env.step(action)
    run.steps.append(
        StepRecord(
            step=len(run.steps),
            ee_pose=np.array(before["ee_pose"]),
            gripper=np.array(before["gripper"]),
            state=state,
            action=action,
            reasoning=reply.reasoning,
            keyframe=fresh and reply.keyframe,
            reasoning_tokens=reply.reasoning_tokens if fresh else 0,
            events=tuple(info["events"]),
            infer_ms=run.infer_ms if fresh else None,
        )
    )
    if frame is not None:
        run.frames.append(frame)
    if info["success"] and run.first_success is None:
        run.first_success = len(run.steps)
    over = truncated or len(run.steps) >= run.max_steps
    if info["success"] and (over or terminated or conventions.termination == "first_success"):
        run.stop_reason = "success"
    elif terminated:
        run.stop_reason, run.failure = "failure", info["failure"]
    elif over:
        run.stop_reason = "step_limit"


def _finish(run: _Running) -> EpisodeResult:
    """Adds the closing record: where the last action led."""
    assert run.stop_reason is not None
    run.steps.append(
        StepRecord(
            step=len(run.steps),
            ee_pose=np.array(run.obs["ee_pose"]),
            gripper=np.array(run.obs["gripper"]),
            state=run.env.state().to_dict(),
        )
    )
    if run.frame_size is not None:
        run.frames.append(run.env.render(run.frame_size))
    return EpisodeResult(
        episode=run.episode,
        instruction=run.instruction,
        stop_reason=run.stop_reason,
        steps=tuple(run.steps),
        failure=run.failure,
        first_success=run.first_success,
        frames=tuple(run.frames),
        wall_s=time.perf_counter() - run.started,
        wait_s=run.wait_s,
    )
