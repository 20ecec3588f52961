"""Judges by name. Knows their names and options only; each is imported when asked for.

rubric                deterministic and free (docs/vla_score.md)
openai:MODEL          a model at an OpenAI-compatible endpoint
local:CHECKPOINT      a Hugging Face image-text-to-text model, here or on the nodes of the cluster
"""

from __future__ import annotations

from collections.abc import Sequence

from dualvla.errors import UsageError, did_you_mean
from dualvla_eval.judges.base import Contribution, Judge, Verdict

JUDGES = ("rubric", "openai:MODEL", "local:CHECKPOINT")

__all__ = ["JUDGES", "Contribution", "Judge", "Verdict", "get_judge"]


def get_judge(
    name: str,
    settings: Sequence[str] = (),
    *,
    store: str | None = None,
    knowledge: str | None = None,
    text_embedder: str = "built-in",
    image_embedder: str = "built-in",
) -> Judge:
    """settings: `key=value` of a model judge's options. store: folder of its verdicts. knowledge: of its examples.

    Raises: UsageError for a judge or an option that does not exist.
    """
    kind, _, model = name.partition(":")
    if name == "rubric":
        if settings or knowledge:
            raise UsageError("The rubric judge has no settings and takes no examples.", "leave --set and --kb out")
        from dualvla_eval.judges.rubric import RubricJudge

        return RubricJudge()
    if kind in ("openai", "local") and model:
        if store is None:
            raise UsageError(f"Judge '{name}' needs a folder for its verdicts.", "pass store=FOLDER")
        from dualvla_eval.judges import models

        make = models.openai_judge if kind == "openai" else models.local_judge
        return make(model, settings, store, models.retriever(knowledge, text_embedder, image_embedder))
    raise UsageError(f"Unknown judge '{name}'.", did_you_mean(name, JUDGES))
