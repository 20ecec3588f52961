"""Closed-loop rollouts: steps several environments in lockstep with one policy and records what happened.

Knows the `Policy` protocol and the environments only: no Ray, no files. Whatever a policy answers is data: a bad reply
ends its episode with a stop reason, and the other episodes go on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dualvla.errors import PolicyError
from dualvla.policy import Policy
from dualvla.schema import ACTION_SPACES, Observation, PolicyReply
from dualvla_eval.sim.base import SimEnv, to_observation
from dualvla_eval.suites import Episode, Suite

# Why an episode ended. "crashed" is given by the sweep to an episode that killed its worker.
STOP_REASONS = (
    "success",
    "failure",  # the environment ended it: a wrong object, ...
    "step_limit",
    "policy_empty",  # no reply, or a reply without actions
    "policy_shape",  # not [at least execute_steps, D]
    "policy_nan",  # an action to execute is not finite
    "policy_mismatch",  # the reply carries the id of another observation
    "policy_error",  # the policy raised PolicyError
    "crashed",
)


@runtime_checkable
class PrivilegedPolicy(Protocol):
    """A policy that may look into the simulator: an expert, a random policy, a control experiment."""

    def attach(self, session: str, env: SimEnv, episode: Episode) -> None:
        """Called once an episode, after the environment was reset and before the first `infer` of that session."""


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
    """One finished episode. steps holds one record a step, plus the closing one; frames are uint8 [H, W, 3]."""

    episode: Episode
    instruction: str
    stop_reason: str
    steps: tuple[StepRecord, ...]
    failure: str | None = None
    frames: tuple[np.ndarray, ...] = ()
    wall_s: float = 0.0

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
    started: float
    frame_size: int | None
    steps: list[StepRecord] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)
    plan: deque[np.ndarray] = field(default_factory=deque)
    reply: PolicyReply | None = None  # the one behind `plan`; fresh until its first action is executed
    fresh: bool = False
    infer_ms: float = 0.0
    stop_reason: str | None = None
    failure: str | None = None

    def observation(self) -> Observation:
        return to_observation(self.obs, len(self.steps), f"{self.session}#{len(self.steps)}")


def session_name(episode: Episode, seed: int) -> str:
    """The session of an episode: what a policy keys its noise by, so that batching and workers change nothing."""
    return f"{episode.suite}/{episode.task}/{episode.variant}/{episode.episode_id}?seed={seed}"


def run_episodes(
    policy: Policy,
    envs: Sequence[SimEnv],
    suite: Suite,
    episodes: Sequence[Episode],
    *,
    seed: int = 0,
    frame_size: Mapping[int, int] | None = None,
) -> Iterator[EpisodeResult]:
    """Yields results as episodes finish. At most len(envs) episodes are in flight; all of them share each `infer`.

    frame_size: episode_id -> side in pixels of the frames to keep of that episode (default: keep none).
    """
    waiting = deque(episodes)
    size = ACTION_SPACES[suite.action_space].size
    running: list[_Running] = []
    free = list(envs)
    while waiting or running:
        while free and waiting:
            episode = waiting.popleft()
            keep = (frame_size or {}).get(episode.episode_id)
            running.append(_start(policy, free.pop(), suite, episode, seed, keep))
        asking = [r for r in running if not r.plan]
        if asking:
            _ask(policy, asking, size)
        for run in [r for r in running if r.stop_reason is None]:
            _step(run)
        for run in [r for r in running if r.stop_reason is not None]:
            running.remove(run)
            free.append(run.env)
            yield _finish(policy, run)


def _start(policy: Policy, env: SimEnv, suite: Suite, episode: Episode, seed: int, frame_size: int | None) -> _Running:
    started = time.perf_counter()
    obs, _ = env.reset(seed=episode.seed, options={"episode": episode})
    session = session_name(episode, seed)
    policy.reset(session)
    if isinstance(policy, PrivilegedPolicy):
        policy.attach(session, env, episode)
    max_steps = suite.task(episode.task).max_steps
    return _Running(episode, env, session, obs, obs["instruction"], max_steps, started, frame_size)


def _ask(policy: Policy, asking: Sequence[_Running], action_size: int) -> None:
    """One `infer` for all that need a new plan; sets their plan, or the reason why they stop."""
    observations = [run.observation() for run in asking]
    started = time.perf_counter()
    try:
        replies: Sequence[PolicyReply | None] = policy.infer(observations, [run.session for run in asking])
    except PolicyError as error:
        for run in asking:
            run.stop_reason, run.failure = "policy_error", str(error)
        return
    infer_ms = (time.perf_counter() - started) * 1e3 / len(asking)
    padded = [*replies, *[None] * (len(asking) - len(replies))]
    for run, observation, reply in zip(asking, observations, padded, strict=False):
        run.infer_ms = infer_ms
        run.stop_reason = _fault(reply, observation, policy.spec.execute_steps, action_size)
        if run.stop_reason is None and reply is not None:
            actions = np.asarray(reply.actions, dtype=np.float32)
            run.plan.extend(actions[: policy.spec.execute_steps])
            run.reply, run.fresh = reply, True


def _fault(reply: PolicyReply | None, observation: Observation, execute_steps: int, action_size: int) -> str | None:
    """The stop reason of a reply that cannot be executed, None for a good one."""
    if reply is None or np.size(reply.actions) == 0:
        return "policy_empty"
    if reply.id != observation.id:
        return "policy_mismatch"
    actions = np.asarray(reply.actions)
    if actions.ndim != 2 or actions.shape[1] != action_size or len(actions) < execute_steps:
        return "policy_shape"
    if not np.isfinite(actions[:execute_steps]).all():
        return "policy_nan"
    return None


def _step(run: _Running) -> None:
    assert run.reply is not None
    action, reply, fresh = run.plan.popleft(), run.reply, run.fresh
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
    if info["success"]:
        run.stop_reason = "success"
    elif terminated:
        run.stop_reason, run.failure = "failure", info["failure"]
    elif truncated or len(run.steps) >= run.max_steps:
        run.stop_reason = "step_limit"


def _finish(policy: Policy, run: _Running) -> EpisodeResult:
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
    policy.reset(run.session)
    return EpisodeResult(
        episode=run.episode,
        instruction=run.instruction,
        stop_reason=run.stop_reason,
        steps=tuple(run.steps),
        failure=run.failure,
        frames=tuple(run.frames),
        wall_s=time.perf_counter() - run.started,
    )
