"""Recipes: Python functions that return the whole configuration of a run; a variant edits another one.

A recipe says *what* is made (data, stages, evaluation), so it is part of every manifest's key; how many workers make it
is not. Knows the configurations of the jobs, not the jobs: `run.py` and `train.py` read them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from dualvla.errors import UsageError, did_you_mean
from dualvla.models.config import LossWeights, ModelConfig, tiny_backbone

Stage = Literal["specialist", "reasoning", "dual"]
Domain = Literal["robot", "multimodal"]
PruneMode = Literal["both", "scene", "action", "random", "none"]
TeachersUsed = Literal["both", "action", "reasoning", "none"]
STAGES: tuple[Stage, ...] = ("specialist", "reasoning", "dual")


@dataclass(frozen=True)
class CollectConfig:
    """Demonstrations. episodes: task -> kept demonstrations. qa, qa_test: questions to train on, and held out."""

    suite: str = "blocks"
    episodes: dict[str, int] = field(default_factory=dict)
    qa: int = 0
    qa_test: int = 0


@dataclass(frozen=True)
class PruneConfig:
    mode: PruneMode = "both"


@dataclass(frozen=True)
class ZeroConfig:
    """How DeepSpeed lays a model out over the workers. None of it changes what is computed, but for rounding.

    micro_batch: samples a worker puts through the model at once; 0: its whole share of the global batch.
    offload: where optimiser state rests. dtype: bf16 is autocast; weights, gradients and their sums are always fp32.
    persistence_threshold: parameters smaller than this many elements stay whole on every worker. A tiny model is all
    "small": gathering it module by module would cost more time than the step itself.
    """

    stage: Literal[0, 1, 2, 3] = 3
    offload: Literal["none", "cpu"] = "none"
    dtype: Literal["fp32", "bf16"] = "fp32"
    micro_batch: int = 0
    persistence_threshold: int = 100_000


@dataclass(frozen=True)
class TrainConfig:
    """One training stage.

    batch_size: samples of the global batch, whatever the number of workers; multimodal_fraction: questions in it.
    use_reasoning: learn the reasoning text of robot samples (where pruning kept it). teachers: which of the two teach
    in the dual stage (Table 7). losses: weight of each term, with
    lambda of Eq. 7 and the temperature of Eq. 5 and 6. lr is the peak, reached after warmup_steps; "cosine" then falls
    to a tenth of it. ema_decay: of the averaged weights that are exported; 0 exports the last ones.
    checkpoint_every, in steps, is what a crash can cost; keep_checkpoints: resume states that are kept. on_bad_loss:
    whether a step whose loss or gradient is not finite ends training (its batch saved) or is left out, and counted.
    bucket_batches: samples are sorted by length among this many batches, so that those of a batch are about as long
    (less padding); 0: not at all. conflict_every: steps between two looks at how the gradients
    of acting and reasoning get along (`conflict.py`; costs about six plain steps); 0: never. peak_tflops: of one
    worker's device in the recipe's dtype, for MFU; 0: what a large matrix product reaches, measured at the start.
    """

    steps: int = 1000
    batch_size: int = 32
    multimodal_fraction: float = 0.25
    use_reasoning: bool = True
    teachers: TeachersUsed = "both"
    losses: LossWeights = field(default_factory=LossWeights)
    lr: float = 1e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 50
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    ema_decay: float = 0.998
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    on_bad_loss: Literal["stop", "skip"] = "stop"
    bucket_batches: int = 0
    conflict_every: int = 0
    peak_tflops: float = 0.0
    zero: ZeroConfig = field(default_factory=ZeroConfig)

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("checkpoint_every", 1), ("keep_checkpoints", 1), ("bucket_batches", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} = {getattr(self, name)}.", f"pass a number from {least} on")

    @property
    def taught(self) -> tuple[Domain, ...]:
        """The domains that have a teacher."""
        domains: dict[str, tuple[Domain, ...]] = {"action": ("robot",), "reasoning": ("multimodal",), "none": ()}
        return domains.get(self.teachers, ("robot", "multimodal"))

    def micro_batches(self, workers: int) -> int:
        """Backward passes a step on each worker. Raises: UsageError if the batch cannot be cut evenly."""
        share, rest = divmod(self.batch_size, workers)
        if rest or share % (self.zero.micro_batch or share):
            raise UsageError(
                f"A batch of {self.batch_size} cannot be cut evenly for {workers} workers"
                + (f" in micro-batches of {self.zero.micro_batch}." if self.zero.micro_batch else "."),
                "change batch_size, zero.micro_batch or --workers",
            )
        return share // (self.zero.micro_batch or share)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation of the run's policies. Each dict maps task -> episodes.

    compared: the same for all policies, as a mean over trajectories can be compared on equal episodes only. controls:
    for the specialist on blank images and on another object's instruction. videos: filmed rollouts a task and policy.
    """

    compared: dict[str, int] = field(default_factory=dict)
    controls: dict[str, int] = field(default_factory=dict)
    reasoning: str = "auto"
    videos: int = 1


@dataclass(frozen=True)
class Recipe:
    """Everything `dualvla run` needs beside an output folder and a seed."""

    name: str
    model: ModelConfig
    collect: CollectConfig
    specialist: TrainConfig
    reasoning: TrainConfig
    dual: TrainConfig
    eval: EvalConfig
    prune: PruneConfig = field(default_factory=PruneConfig)

    def stage(self, name: Stage) -> TrainConfig:
        return {"specialist": self.specialist, "reasoning": self.reasoning, "dual": self.dual}[name]


TASKS = ("touch", "pick", "stack", "move_near", "put_in_bin")


def tiny() -> Recipe:
    """The quickstart: all of DualVLA in under 20 minutes of two CPU cores."""
    few = dict.fromkeys(TASKS, 10)
    bf16 = ZeroConfig(dtype="bf16")  # autocast takes 0.55 of the time of fp32 on CPUs, and learns as well
    return Recipe(
        name="tiny",
        model=ModelConfig(backbone_config=tiny_backbone(), proprio_dim=4),
        collect=CollectConfig(
            # Only these two: with 40 episodes of each longer task beside them, touch came out at 57 % of 100.
            episodes={"touch": 1200, "pick": 800},
            qa=1500,
            qa_test=200,
        ),
        specialist=TrainConfig(
            steps=2200,
            checkpoint_every=550,
            lr=1.5e-3,
            multimodal_fraction=0.125,
            use_reasoning=False,
            losses=LossWeights(answer=0.3),
            zero=bf16,
        ),
        reasoning=TrainConfig(steps=400, lr=2e-3, zero=bf16),
        dual=TrainConfig(steps=250, zero=bf16),
        eval=EvalConfig(
            compared={**few, "touch": 100, "pick": 20},
            controls={"touch": 100},
        ),
    )


def tiny_long() -> Recipe:
    """`tiny` with three times the training, on all five tasks and four times the questions: what a longer run gives."""
    short = tiny()

    def longer(config: TrainConfig) -> TrainConfig:
        return dataclasses.replace(config, steps=3 * config.steps, warmup_steps=3 * config.warmup_steps)

    return dataclasses.replace(
        short,
        name="tiny-long",
        collect=CollectConfig(
            # The longer tasks have few demonstrations because each has five to eight times the steps of *touch*.
            episodes={"touch": 2000, "pick": 2000, "stack": 300, "move_near": 300, "put_in_bin": 300},
            qa=6000,
            qa_test=400,
        ),
        specialist=longer(short.specialist),
        reasoning=longer(short.reasoning),
        dual=longer(short.dual),
        eval=EvalConfig(compared={**dict.fromkeys(TASKS, 50), "touch": 100}, controls={"touch": 100}),
    )


def debug() -> Recipe:
    """Every stage of `tiny` at the smallest size that still exercises it: 2 steps a stage, 4 episodes."""
    short = tiny()

    def two_steps(config: TrainConfig) -> TrainConfig:
        return dataclasses.replace(
            config, steps=2, batch_size=4, multimodal_fraction=0.5, warmup_steps=1, checkpoint_every=1
        )

    return dataclasses.replace(
        short,
        name="debug",
        collect=CollectConfig(episodes={"touch": 4}, qa=8, qa_test=4),
        specialist=two_steps(short.specialist),
        reasoning=two_steps(short.reasoning),
        dual=two_steps(short.dual),
        eval=EvalConfig(compared={"touch": 1}, controls={"touch": 1}),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"tiny": tiny, "tiny-long": tiny_long, "debug": debug}


def _pruned(mode: PruneMode) -> Callable[[Recipe], Recipe]:
    return lambda recipe: dataclasses.replace(recipe, prune=PruneConfig(mode))


def _taught(teachers: TeachersUsed) -> Callable[[Recipe], Recipe]:
    return lambda recipe: dataclasses.replace(recipe, dual=dataclasses.replace(recipe.dual, teachers=teachers))


VARIANTS: dict[str, Callable[[Recipe], Recipe]] = {
    "no-pruning": _pruned("none"),
    "random-pruning": _pruned("random"),
    "scene-only": _pruned("scene"),
    "action-only": _pruned("action"),
    "no-distillation": _taught("none"),
    "no-action-teacher": _taught("reasoning"),
    "no-reasoning-teacher": _taught("action"),
}
"""The ablations of the paper's Tables 6 to 8; each changes one thing of any recipe."""


def get_recipe(name: str) -> Recipe:
    """A recipe ("tiny") or a variant of one ("tiny+scene-only"). Raises: UsageError on an unknown name."""
    base, plus, variant = name.partition("+")
    if base not in RECIPES:
        raise UsageError(f"Unknown recipe '{base}'.", did_you_mean(base, RECIPES))
    if not plus:
        return RECIPES[base]()
    if variant not in VARIANTS:
        raise UsageError(f"Recipe '{base}' has no variant '{variant}'.", did_you_mean(variant, VARIANTS))
    return dataclasses.replace(VARIANTS[variant](RECIPES[base]()), name=name)
