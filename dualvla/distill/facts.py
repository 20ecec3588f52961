"""Whether a teacher can teach a student: the same words, the same numbers, the same shapes. Knows no weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

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


def check_teacher(config: ModelConfig, processor: Processor, student: Processor, folder: str) -> None:
    """Whether a teacher in `folder` can teach: it reads the student's batches, and its targets are the student's.

    Raises: CheckpointError with the reason.
    """
    ours, theirs = student.fingerprints(), processor.fingerprints()
    for name, value in ours.items():
        if theirs[name] != value:
            reason = f"its {name} is another than the student's"
            if name == "tokenizer":
                reason += (
                    f" ({processor.vocab_size} and {student.vocab_size} words): its probabilities are of other words"
                )
            raise CheckpointError(
                f"'{folder}' cannot be a teacher here: {reason}.", "take a teacher of the same recipe and data"
            )
    mine = (student.config.head.kind, student.config.horizon, student.config.actions.size)
    other = (config.head.kind, config.horizon, config.actions.size)
    if mine != other:
        raise CheckpointError(
            f"'{folder}' cannot be a teacher here: its head, horizon and action size are {other}, not {mine}.",
            "take a teacher of the same recipe",
        )


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values))
