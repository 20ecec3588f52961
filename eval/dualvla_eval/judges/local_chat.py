"""Any Hugging Face image-text-to-text model as the model of a judge, in Ray actors.

`LocalModelImpl` is a plain class: load, answer. Weights are safetensors only, and no code of a checkpoint is run. For
many trajectories on GPUs an OpenAI-compatible server such as vLLM is faster (docs/judges.md).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import ray
from ray.exceptions import RayActorError, RayTaskError

from dualvla.errors import CheckpointError, DualVLAError, PlatformError
from dualvla.io import storage
from dualvla_cluster import connect
from dualvla_eval.judges.chat import PassingError, Reply
from dualvla_eval.judges.prompt import Message


@dataclass(frozen=True)
class LocalOptions:
    """workers: models loaded side by side. gpus: of each; 0 runs on the CPU. dtype: of the weights."""

    workers: int = 1
    gpus: float = 0.0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_reply_tokens: int = 1024

    @property
    def sampling(self) -> dict[str, Any]:
        """All that changes an answer beside the prompt and the model."""
        return {"greedy": True, "max_reply_tokens": self.max_reply_tokens, "dtype": self.dtype}


class LocalModelImpl:
    """Raises: CheckpointError for a checkpoint that is missing, of another kind, or has no chat template."""

    def __init__(self, checkpoint: str, options: LocalOptions):
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self._max_reply_tokens = options.max_reply_tokens
        self._device = "cuda" if options.gpus and torch.cuda.is_available() else "cpu"
        try:
            self._processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False)
            self._model = AutoModelForImageTextToText.from_pretrained(
                checkpoint, use_safetensors=True, trust_remote_code=False, dtype=options.dtype
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"'{checkpoint}' cannot be loaded as a judge: {str(error).splitlines()[0]}",
                "name an image-text-to-text checkpoint with safetensors weights",
            ) from error
        if getattr(self._processor, "chat_template", None) is None:
            raise CheckpointError(f"'{checkpoint}' has no chat template.", "name a checkpoint made for chat")
        self._model = self._model.to(self._device).eval()

    def answer(self, messages: Sequence[Message]) -> Reply:
        """Greedy; what comes after `max_reply_tokens` is cut off."""
        import torch

        inputs = self._processor.apply_chat_template(
            [_for_template(m) for m in messages],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        ).to(self._device)  # fmt: skip
        length = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            output = self._model.generate(**inputs, do_sample=False, max_new_tokens=self._max_reply_tokens)
        written = output[0, length:]
        return Reply(self._processor.decode(written, skip_special_tokens=True), length, len(written))


def _for_template(message: Message) -> Message:
    """A chat API's message as Hugging Face's templates take it: pictures decoded, all content in parts."""
    from PIL import Image

    content = message["content"]
    given: list[Any] = [{"type": "text", "text": content}] if isinstance(content, str) else content
    parts: list[dict[str, Any]] = []
    for part in given:
        if part["type"] == "text":
            parts.append(part)
            continue
        data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
        parts.append({"type": "image", "image": Image.open(io.BytesIO(data)).convert("RGB")})
    return {"role": message["role"], "content": parts}


LocalModel = ray.remote(LocalModelImpl)


class LocalChat:
    """`options.workers` actors; one that dies is replaced, and its question is asked again."""

    def __init__(self, checkpoint: str, options: LocalOptions):
        self.model = f"local:{checkpoint_digest(checkpoint)}"
        self._checkpoint, self._options = checkpoint, options
        self._actors: list[Any] = []

    async def __aenter__(self) -> Self:
        connect.connect()
        while len(self._actors) < self._options.workers:
            self._actors.append(self._start())
        self._free: asyncio.Queue[Any] = asyncio.Queue()
        for actor in self._actors:
            self._free.put_nowait(actor)
        return self

    async def __aexit__(self, *_: object) -> None:
        """The models stay loaded for the next time; they end with this object."""

    async def ask(self, messages: Sequence[Message], schema: Mapping[str, Any]) -> Reply:
        """The schema is not enforced: the answer is checked all the same."""
        actor = await self._free.get()
        try:
            return await actor.answer.remote(list(messages))
        except RayTaskError as error:
            if isinstance(error.cause, DualVLAError):
                raise error.cause from error
            raise
        except RayActorError as error:
            if error.actor_init_failed:  # Ray keeps only the text of what its constructor raised
                raise PlatformError(f"The judge's model could not start: {str(error).splitlines()[-1]}") from error
            self._actors.remove(actor)
            actor = self._start()
            self._actors.append(actor)
            raise PassingError("the worker died") from error
        finally:
            self._free.put_nowait(actor)

    def _start(self) -> Any:
        return LocalModel.options(num_gpus=self._options.gpus).remote(self._checkpoint, self._options)


def checkpoint_digest(checkpoint: str) -> str:
    """Of a local folder: its config and weights. A hub's name stands for itself. Raises: CheckpointError."""
    if not storage.is_local(checkpoint) or not Path(checkpoint).exists():
        if checkpoint.startswith(("/", ".")):
            raise CheckpointError(f"'{checkpoint}' does not exist.", "pass a checkpoint folder, or a name on the hub")
        return checkpoint
    files = sorted(p for p in Path(checkpoint).iterdir() if p.suffix in (".json", ".safetensors", ".jinja"))
    if not any(p.suffix == ".safetensors" for p in files):
        raise CheckpointError(f"'{checkpoint}' has no *.safetensors.", "pass a checkpoint folder")
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:  # streamed: weights may be larger than memory
            whole.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:16]
