"""Policies by name: what `--policy` may name, how each is loaded, and the control experiments around them.

Knows the `Policy` protocol, the suites and the scripted experts. Checkpoints and remote endpoints are imported when
one is named.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from dualvla.config import override
from dualvla.errors import CheckpointError, UsageError, did_you_mean
from dualvla.io import manifest, storage
from dualvla.policy import Policy
from dualvla.schema import ACTION_SPACES, Observation, PolicyReply, PolicySpec
from dualvla_eval.asking import Answer, EpisodePolicy
from dualvla_eval.experts import Acting, make_expert
from dualvla_eval.sim.base import SimEnv
from dualvla_eval.suites import Episode, Suite

Ablation = Literal["none", "blank-images", "other-instruction"]
ABLATIONS: tuple[Ablation, ...] = ("none", "blank-images", "other-instruction")
BUILT_IN = ("expert", "random", "expert-random-object")

_GREY = 128
# Unit of an action dimension -> what the random policy draws from: as far as the scripted experts go in a step.
_RANDOM_RANGE = {"m": (-0.03, 0.03), "rad": (-0.1, 0.1), "open": (0.0, 1.0)}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_SERVE_APP = "serve:"
_REMOTE = ("ws://", "wss://", _SERVE_APP)


@dataclass(frozen=True)
class PolicyRef:
    """A policy of a sweep. name: for the results. source: a built-in name, a checkpoint folder, a ws:// URL or
    "serve:APP", a Ray Serve app of the joined cluster. options: of a checkpoint, "key=value" of `PolicyOptions`."""

    name: str
    source: str
    ablation: Ablation = "none"
    options: tuple[str, ...] = ()

    @property
    def built_in(self) -> bool:
        return self.source in BUILT_IN

    @property
    def scripted(self) -> bool:
        """Needs the suite's expert."""
        return self.source in ("expert", "expert-random-object")

    @property
    def control(self) -> bool:
        """A control experiment, to be read beside the policies and not among them."""
        return self.ablation != "none" or self.source == "expert-random-object"

    @property
    def remote(self) -> bool:
        return self.source.startswith(_REMOTE)

    @property
    def hosted(self) -> bool:
        """A checkpoint, which is loaded once for all who ask."""
        return not (self.built_in or self.remote)


def parse_policy(text: str, ablation: Ablation = "none") -> PolicyRef:
    """`[name=]source[?key=value&...]` as on the command line.

    Raises: UsageError for a name that cannot be part of a file name, and for an option that does not exist.
    """
    name, sign, source = text.partition("=")
    if not sign or not _NAME.fullmatch(name):
        name, source = "", text
    options: tuple[str, ...] = ()
    if not source.startswith(_REMOTE):  # an endpoint's URL has options of its own
        source, _, query = source.partition("?")
        options = tuple(sorted(query.split("&"))) if query else ()
    if not name:
        name = re.sub(r"[^A-Za-z0-9._+-]+", "-", source.removeprefix("ws://").removeprefix("wss://"))
        if source not in BUILT_IN and not source.startswith(_REMOTE):
            name = source.rstrip("/").rsplit("/", 1)[-1]
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"'{name}' cannot be the name of a policy.", "give it one of letters, digits and ._+-: --policy name=SOURCE"
        )
    if ablation != "none":
        name = f"{name}+{ablation}"
    ref = PolicyRef(name, source, ablation, options)
    if options:
        if ref.built_in:
            raise UsageError(f"'{source}' takes no options.", f"leave out ?{'&'.join(options)}")
        policy_options(options)
    return ref


def policy_options(options: Sequence[str], reasoning: str = "auto") -> Any:
    """The `PolicyOptions` of a checkpoint, on this process's GPU if it has one. Raises: UsageError."""
    import torch

    from dualvla.vla_policy import PolicyOptions

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return override(PolicyOptions(reasoning=reasoning, device=device), options)


def digest(ref: PolicyRef) -> str:
    """What identifies what the policy does: weights, config and options of a checkpoint, the URL of an endpoint.

    Raises: UsageError for a word that names neither; CheckpointError for a folder that holds no checkpoint.
    """
    content = _content(ref)
    return manifest.digest([content, *ref.options]) if ref.options else content


def _content(ref: PolicyRef) -> str:
    if ref.built_in or ref.remote:
        return ref.source
    folder = ref.source
    if not storage.exists(folder):
        if "/" not in folder:
            raise UsageError(f"'{folder}' is neither a policy nor a folder.", did_you_mean(folder, BUILT_IN))
        raise CheckpointError(f"'{folder}' does not exist.", "pass a checkpoint folder")
    weights = storage.list_files(folder, ".safetensors")
    config = storage.join(folder, "config.json")
    if not weights or not storage.exists(config):
        raise CheckpointError(
            f"'{folder}' is not a checkpoint: it lacks {'*.safetensors' if not weights else 'config.json'}.",
            "pass the --out folder of a finished `dualvla train`",
        )
    if storage.exists(storage.join(folder, manifest.NAME)):
        return manifest.file_digest(storage.join(folder, manifest.NAME))
    return manifest.digest([manifest.file_digest(f) for f in (config, *weights)])


def load(ref: PolicyRef, *, suite: Suite, reasoning: str = "auto", seed: int = 0) -> Policy:
    """Builds the policy, without its ablation, and checks that it fits the suite.

    Raises: CheckpointError if the checkpoint is unusable or made for another robot; UsageError for a bad `reasoning`.
    """
    policy = _load(ref, suite, reasoning, seed)
    _check_fits(ref, policy.spec, suite)
    return policy


def _load(ref: PolicyRef, suite: Suite, reasoning: str, seed: int) -> Policy:
    if ref.source == "random":
        return RandomPolicy(suite, seed)
    if ref.built_in:
        return ExpertPolicy(suite, seed, random_object=ref.source == "expert-random-object")
    if ref.source.startswith(_SERVE_APP):
        from dualvla_cluster.serve_handle import HandlePolicy

        return HandlePolicy(ref.source.removeprefix(_SERVE_APP))
    if ref.remote:
        from dualvla.client import RemotePolicy

        return RemotePolicy(ref.source)
    return load_checkpoint(ref.source, reasoning, ref.options)


def load_checkpoint(folder: str, reasoning: str = "auto", options: Sequence[str] = ()) -> Any:
    """The `VLAPolicy` of a checkpoint folder, on this process's GPU if it has one.

    reasoning: "auto", "never" or "every:K" (K control steps). options: "key=value" of `PolicyOptions`.
    """
    from dualvla.vla_policy import VLAPolicy

    return VLAPolicy.from_pretrained(folder, options=policy_options(options, reasoning))


def _check_fits(ref: PolicyRef, spec: PolicySpec, suite: Suite) -> None:
    for what, theirs, ours in (
        ("action space", spec.action_space, suite.action_space),
        ("control rate (Hz)", spec.control_hz, suite.control_hz),
    ):
        if theirs != ours:
            raise CheckpointError(
                f"Policy '{ref.name}' has {what} {theirs!r}, suite '{suite.name}' has {ours!r}.",
                "evaluate it on the suite it was trained for",
            )
    missing = sorted(set(spec.cameras) - set(suite.cameras))
    if missing:
        raise CheckpointError(
            f"Policy '{ref.name}' needs camera '{missing[0]}', suite '{suite.name}' has {', '.join(suite.cameras)}.",
            "evaluate it on the suite it was trained for",
        )


class ExpertPolicy:
    """The scripted expert as a policy; with `random_object`, sent to an object drawn evenly from the scene's."""

    def __init__(self, suite: Suite, seed: int, random_object: bool = False):
        self.spec = PolicySpec(suite.action_space, suite.control_hz, suite.cameras, "reasoning")
        self._seed, self._random_object = seed, random_object
        self._experts: dict[str, Acting] = {}
        self._said: dict[str, str] = {}

    def attach(self, session: str, env: SimEnv, episode: Episode) -> None:
        rng = _rng(session, self._seed)
        target = None
        if self._random_object:
            state = env.state()
            target = str(rng.choice([o.name for o in state.objects if o.name != state.reference]))
        self._experts[session] = make_expert(env, rng, target)

    def infer(self, observations: Sequence[Observation], sessions: Sequence[str]) -> list[PolicyReply]:
        return [self._act(o, s) for o, s in zip(observations, sessions, strict=True)]

    def _act(self, observation: Observation, session: str) -> PolicyReply:
        step = self._experts[session].act()
        new = self._said.get(session) != step.reasoning
        self._said[session] = step.reasoning
        return PolicyReply(np.asarray(step.action, np.float32)[None], step.reasoning, new, id=observation.id)

    def reset(self, session: str) -> None:
        self._experts.pop(session, None)
        self._said.pop(session, None)


class RandomPolicy:
    """Uniform within `_RANDOM_RANGE`, anew at each step."""

    def __init__(self, suite: Suite, seed: int):
        self.spec = PolicySpec(suite.action_space, suite.control_hz, suite.cameras, "specialist")
        self._seed = seed
        units = [name.rsplit("_", 1)[-1] for name in ACTION_SPACES[suite.action_space].dimensions]
        self._low, self._high = np.array([_RANDOM_RANGE[unit] for unit in units]).T

    def infer(self, observations: Sequence[Observation], sessions: Sequence[str]) -> list[PolicyReply]:
        return [self._act(o, s) for o, s in zip(observations, sessions, strict=True)]

    def _act(self, observation: Observation, session: str) -> PolicyReply:
        action = _rng(session, self._seed, observation.step).uniform(self._low, self._high)
        return PolicyReply(action.astype(np.float32)[None], id=observation.id)

    def reset(self, session: str) -> None:
        """Nothing is kept between steps."""


class Ablated:
    """A control experiment: the same policy with grey images, or given another object's instruction."""

    def __init__(self, policy: EpisodePolicy, ablation: Ablation, seed: int):
        self.spec = policy.spec
        self._policy, self._ablation, self._seed = policy, ablation, seed
        self._instructions: dict[str, str] = {}

    async def ask(self, observation: Observation, session: str) -> Answer:
        if self._ablation == "other-instruction":
            shown = replace(observation, instruction=self._instructions[session])
        else:
            shown = replace(observation, images=blank(observation.images))
        return await self._policy.ask(shown, session)

    def attach(self, session: str, env: SimEnv, episode: Episode) -> None:
        self._policy.attach(session, env, episode)
        if self._ablation == "other-instruction":
            self._instructions[session] = other_instruction(env, _rng(session, self._seed))

    def renew(self, session: str) -> None:
        self._policy.renew(session)

    def reset(self, session: str) -> None:
        self._instructions.pop(session, None)
        self._policy.reset(session)


def other_instruction(env: SimEnv, rng: np.random.Generator) -> str:
    """The episode's instruction, said of another object; of the reference ("the bin") only if there is no third one."""
    state = env.state()
    others = [o.name for o in state.objects if o.name != state.target]
    named = [name for name in others if name != state.reference] or others
    return env.instruction_for(str(rng.choice(named)))


def blank(images: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.full_like(image, _GREY) for name, image in images.items()}


def _rng(session: str, *keys: int) -> np.random.Generator:
    """Keyed by the session and nothing that depends on batching or on other episodes."""
    word = int.from_bytes(hashlib.sha256(session.encode()).digest()[:8], "little")
    return np.random.default_rng([word, *keys])
