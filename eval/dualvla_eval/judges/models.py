"""Model judges put together from their parts: options, chat, store of verdicts, examples. Knows all of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from dualvla import config
from dualvla.io import storage
from dualvla_eval import embedders
from dualvla_eval.judges.local_chat import LocalChat, LocalOptions
from dualvla_eval.judges.model import ModelJudge, ModelOptions
from dualvla_eval.judges.openai_chat import OpenAIChat, OpenAIOptions
from dualvla_eval.judges.verdicts import VerdictStore
from dualvla_eval.knowledge import KnowledgeBase, Retriever


@dataclass(frozen=True)
class OpenAIJudgeOptions(ModelOptions):
    """openai: the endpoint."""

    openai: OpenAIOptions = field(default_factory=OpenAIOptions)


@dataclass(frozen=True)
class LocalJudgeOptions(ModelOptions):
    """local: the model and its workers."""

    local: LocalOptions = field(default_factory=LocalOptions)


def openai_judge(model: str, settings: Sequence[str], store: str, retriever: Retriever | None) -> ModelJudge:
    """Raises: UsageError for an unknown setting, or without a key."""
    options = config.override(OpenAIJudgeOptions(), settings)
    chat = OpenAIChat(model, options.openai)
    return ModelJudge(
        f"openai:{model}", chat, _store(store, f"openai-{model}"), options.openai.sampling, options, retriever
    )


def local_judge(checkpoint: str, settings: Sequence[str], store: str, retriever: Retriever | None) -> ModelJudge:
    """Raises: UsageError for an unknown setting; CheckpointError for a folder that holds no model."""
    options = config.override(LocalJudgeOptions(), settings)
    name = checkpoint.rstrip("/").rsplit("/", 1)[-1]
    chat = LocalChat(checkpoint, options.local)
    return ModelJudge(f"local:{name}", chat, _store(store, f"local-{name}"), options.local.sampling, options, retriever)


def retriever(folder: str | None, text_embedder: str, image_embedder: str) -> Retriever | None:
    """Of the knowledge base in `folder`, if one is named."""
    if folder is None:
        return None
    base = KnowledgeBase(folder)
    return Retriever(base, embedders.text_embedder(text_embedder), embedders.image_embedder(image_embedder))


def _store(folder: str, name: str) -> VerdictStore:
    return VerdictStore(storage.join(folder, re.sub(r"[^A-Za-z0-9._-]+", "-", name)))
