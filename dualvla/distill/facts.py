"""Whether a teacher can teach a student: the same words, the same numbers, the same shapes. Knows no weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dualvla.distill.alignment import token_map
from dualvla.errors import CheckpointError, DataError
from dualvla.models.config import ModelConfig
from dualvla.models.processing import Processor


@dataclass(frozen=True)
class TeacherFacts:
    """What a teacher's targets depend on and are meant for; of a student, what they would have to be.

    checkpoint: digest of the teacher's files. processor: `Processor.fingerprints`. inputs: what makes a view of a
    sample. target: "velocity" [K, H, D], "bins" [H, D, bins] or "logits" [V], of this shape.
    """

    checkpoint: str
    processor: dict[str, str]
    inputs: dict[str, Any]
    target: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, config: ModelConfig, processor: Processor, checkpoint: str, domain: str) -> TeacherFacts:
        """domain: "robot" (the action teacher's targets) or "multimodal" (the reasoning teacher's)."""
        inputs = {name: getattr(config, name) for name in ("cameras", "image_size", "color_jitter")}
        if domain == "multimodal":
            vocab_size = config.backbone_config["text_config"]["vocab_size"]
            inputs["max_text_tokens"] = config.max_text_tokens
            return cls(checkpoint, processor.fingerprints(), _plain(inputs), "logits", (vocab_size,))
        head = config.head
        inputs |= {"draws": head.draws, "tau_scale": head.tau_scale, "proprio_dim": config.proprio_dim}
        chunk = (config.horizon, config.actions.size)
        target, shape = ("bins", (*chunk, head.bins)) if head.kind == "token" else ("velocity", (head.draws, *chunk))
        return cls(checkpoint, processor.fingerprints(), _plain(inputs), target, shape)

    def check(self, wanted: TeacherFacts, where: str) -> None:
        """Raises: DataError naming the first thing in which these targets are not the wanted ones."""
        ours, theirs = ({**f.processor, **f.inputs, "target": (f.target, f.shape)} for f in (wanted, self))
        if self.checkpoint != wanted.checkpoint:
            raise DataError(
                f"{where}: it was made by another teacher checkpoint.", "make it again with `dualvla teach`"
            )
        for name, value in ours.items():
            if theirs.get(name) != value:
                raise DataError(
                    f"{where}: its teacher's {name} is another than the student's.",
                    "take a teacher of the same recipe and data as the student",
                )


def model_facts(config: ModelConfig) -> dict[str, Any]:
    """What the inputs and outputs of a teacher and its student must have in common, JSON-ready."""
    return {
        "head": config.head.kind,
        "horizon": config.horizon,
        "action_size": config.actions.size,
        "cameras": list(config.cameras),
        "image_size": config.image_size,
        "proprio_dim": config.proprio_dim,
        "vocab_size": config.backbone_config["text_config"]["vocab_size"],
    }


def check_teacher(config: ModelConfig, processor: Processor, student: Processor, folder: str) -> None:
    """Whether a teacher in `folder` can teach: it reads the student's batches, and its targets are the student's.

    Raises: CheckpointError with the reason.
    """
    if align_teacher(config, processor, student, folder) is not None:
        raise CheckpointError(
            f"'{folder}' cannot be a teacher here: its tokenizer numbers the student's words otherwise.",
            "ask it online (without a teacher cache), where ids are aligned",
        )


def align_teacher(config: ModelConfig, processor: Processor, student: Processor, folder: str) -> np.ndarray | None:
    """As `check_teacher`, but a tokenizer may number the same words otherwise: then the student's id -> the teacher's,
    int64 [V]; None if there is nothing to align."""
    facts = model_facts(config)
    return align(
        student, facts, processor.fingerprints(), processor.tokenizer.to_str, f"'{folder}' cannot be a teacher here"
    )


def align(
    student: Processor,
    model: Mapping[str, Any],
    fingerprints: Mapping[str, str],
    tokenizer: Callable[[], str],
    where: str,
) -> np.ndarray | None:
    """`align_teacher` by facts alone. model: of `model_facts`; tokenizer: fetches the teacher's, if it must be known.

    Raises: CheckpointError with the reason.
    """
    ours = model_facts(student.config)
    for name, value in ours.items():
        if name != "vocab_size" and model.get(name) != value:
            raise CheckpointError(
                f"{where}: its {name} is {model.get(name)!r:.60}, the student's {value!r:.60}.",
                "take a teacher of the same recipe",
            )
    prints = student.fingerprints()
    found = None
    if fingerprints.get("tokenizer") != prints["tokenizer"]:
        found = token_map(student.tokenizer.to_str(), tokenizer(), ours["vocab_size"], where)
    for name, value in prints.items():
        if name != "tokenizer" and fingerprints.get(name) != value:
            raise CheckpointError(
                f"{where}: its {name} is another than the student's.", "take a teacher of the same recipe and data"
            )
    if model.get("vocab_size") != ours["vocab_size"]:
        raise CheckpointError(
            f"{where}: it has {model.get('vocab_size')!r:.20} token ids, the student {ours['vocab_size']}.",
            "take a teacher of the same recipe",
        )
    return found


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values))
