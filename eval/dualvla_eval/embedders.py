"""Vectors for texts and pictures, to find similar tasks and scenes: built in, from a checkpoint, or from an API.

    built-in                 no download: hashed character n-grams; colours and edges by cell
    hf:NAME_OR_FOLDER        texts: any encoder, mean over tokens (sentence-transformers checkpoints are such)
    clip:NAME_OR_FOLDER      texts or pictures: CLIP and its kin
    api:MODEL                texts: an OpenAI-compatible endpoint

All vectors have length 1, so that their product is the cosine. Knows nothing of tasks or trajectories.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from dualvla.errors import CheckpointError, ServerError, UsageError, did_you_mean

BUILT_IN = "built-in"
_TEXT_KINDS = (BUILT_IN, "hf:NAME", "clip:NAME", "api:MODEL")
_IMAGE_KINDS = (BUILT_IN, "clip:NAME")
_TEXT_SIZE = 1024
_NGRAMS = (3, 4, 5)
_CELLS = 8
_BINS = 8  # of edge directions over half a turn
_CELL_PX = 16


class TextEmbedder(Protocol):
    """name: identifies the vectors."""

    name: str

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, D], each of length 1."""


class ImageEmbedder(Protocol):
    """name: identifies the vectors."""

    name: str

    def embed_images(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 [H, W, 3] each -> float32 [N, D], each of length 1."""


def text_embedder(name: str) -> TextEmbedder:
    """Raises: UsageError for a name of no known kind; CheckpointError for a checkpoint that cannot be loaded."""
    kind, _, where = name.partition(":")
    if name == BUILT_IN:
        return HashedNgrams()
    if kind == "hf" and where:
        return HFTexts(where)
    if kind == "clip" and where:
        return Clip(where)
    if kind == "api" and where:
        return ApiTexts(where)
    raise UsageError(f"Unknown text embedder '{name}'.", did_you_mean(name, _TEXT_KINDS))


def image_embedder(name: str) -> ImageEmbedder:
    """Raises: UsageError for a name of no known kind; CheckpointError for a checkpoint that cannot be loaded."""
    kind, _, where = name.partition(":")
    if name == BUILT_IN:
        return Cells()
    if kind == "clip" and where:
        return Clip(where)
    raise UsageError(f"Unknown image embedder '{name}'.", did_you_mean(name, _IMAGE_KINDS))


class HashedNgrams:
    """Counts of words and of character n-grams, hashed: texts that share words and word stems are near."""

    name = BUILT_IN

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        return _unit(np.stack([self._counts(text) for text in texts]))

    def _counts(self, text: str) -> np.ndarray:
        counts = np.zeros(_TEXT_SIZE)
        for word in re.findall(r"\w+", text.lower()):
            padded = f" {word} "
            grams = [padded] + [padded[i : i + n] for n in _NGRAMS for i in range(len(padded) - n + 1)]
            for gram in grams:
                code = zlib.crc32(gram.encode())
                counts[code % _TEXT_SIZE] += 1 if code & (1 << 31) else -1  # a random sign: collisions cancel out
        return np.sign(counts) * np.log1p(np.abs(counts))


class Cells:
    """Mean colour and a histogram of edge directions in each of 8 x 8 cells, both centred: what is where."""

    name = BUILT_IN

    def embed_images(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        return _unit(np.stack([self._features(p) for p in pictures]))

    def _features(self, picture: np.ndarray) -> np.ndarray:
        from PIL import Image

        side = _CELLS * _CELL_PX
        small = np.asarray(Image.fromarray(picture).resize((side, side)), dtype=np.float64) / 255
        colors = _by_cell(small).mean(axis=(2, 3))
        colors = colors - colors.mean(axis=(0, 1))
        down, right = np.gradient(small.mean(axis=2))
        strength, angle = np.hypot(down, right), np.arctan2(down, right) % np.pi
        bins = np.minimum((angle / np.pi * _BINS).astype(int), _BINS - 1)
        edges = _by_cell(strength[..., None] * (bins[..., None] == np.arange(_BINS))).sum(axis=(2, 3))
        return np.concatenate([_unit(colors.ravel()), _unit(np.sqrt(edges).ravel())])


def _by_cell(values: np.ndarray) -> np.ndarray:
    """[S, S, C] -> [cells, cells, px, px, C]"""
    return values.reshape(_CELLS, _CELL_PX, _CELLS, _CELL_PX, -1).swapaxes(1, 2)


class HFTexts:
    """The mean of the last hidden states of an encoder, as sentence-transformers checkpoints are used."""

    def __init__(self, where: str):
        from transformers import AutoModel, AutoTokenizer

        self.name = f"hf:{where}"
        self._tokenizer = _load(AutoTokenizer, where)
        self._model = _load(AutoModel, where, use_safetensors=True).eval()

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        batch = self._tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            states_BTd = self._model(**batch).last_hidden_state.float()
        mask_BT1 = batch["attention_mask"][..., None]
        return _unit(((states_BTd * mask_BT1).sum(1) / mask_BT1.sum(1)).numpy())


class Clip:
    """Texts and pictures in the one space of a CLIP-like checkpoint."""

    def __init__(self, where: str):
        from transformers import AutoModel, AutoProcessor

        self.name = f"clip:{where}"
        self._processor = _load(AutoProcessor, where)
        self._model = _load(AutoModel, where, use_safetensors=True).eval()
        if not hasattr(self._model, "get_image_features"):
            raise CheckpointError(f"'{where}' embeds no pictures.", "name a CLIP checkpoint, or hf: for texts")

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        inputs = self._processor(text=list(texts), padding=True, truncation=True, return_tensors="pt")
        return self._features(self._model.get_text_features, inputs)

    def embed_images(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        inputs = self._processor(images=list(pictures), return_tensors="pt")
        return self._features(self._model.get_image_features, inputs)

    def _features(self, embed: Any, inputs: Any) -> np.ndarray:
        import torch

        with torch.inference_mode():
            found = embed(**inputs)
        return _unit((found if isinstance(found, torch.Tensor) else found.pooler_output).float().numpy())


class ApiTexts:
    """An OpenAI-compatible endpoint; its address and key come from OPENAI_BASE_URL and OPENAI_API_KEY."""

    def __init__(self, model: str):
        self.name = f"api:{model}"
        self._model = model

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Raises: ServerError."""
        import openai

        try:
            with openai.OpenAI(api_key=os.environ.get("OPENAI_API_KEY", "none")) as client:
                answer = client.embeddings.create(model=self._model, input=list(texts), encoding_format="float")
        except openai.APIError as error:
            raise ServerError(
                f"The embeddings of '{self._model}' failed: {type(error).__name__}.",
                "check OPENAI_BASE_URL, OPENAI_API_KEY and the model's name",
            ) from error
        return _unit(np.array([item.embedding for item in sorted(answer.data, key=lambda item: item.index)]))


def _load(loader: Any, where: str, **options: Any) -> Any:
    """Never runs code of a checkpoint."""
    try:
        return loader.from_pretrained(where, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"'{where}' cannot be loaded: {str(error).splitlines()[0]}", "name a checkpoint with safetensors weights"
        ) from error


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
