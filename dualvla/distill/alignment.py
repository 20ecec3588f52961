"""Token ids of one tokenizer as those of another that has the same words under other numbers. Knows no model.

Only the numbers may differ: the same words, merges and rules cut every text into the same words, so a distribution over
one vocabulary is one over the other with its columns in another order. There is no translation between vocabularies.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualvla.errors import CheckpointError


def token_map(student: str, teacher: str, vocab_size: int, where: str) -> np.ndarray | None:
    """int64 [vocab_size]: the student's id -> the teacher's; None if the numbers agree, too.

    student, teacher: tokenizers as JSON. vocab_size: of both models; ids beyond the tokenizers stay. Raises:
    CheckpointError, naming `where` and in what the tokenizers differ.
    """
    ours, theirs = json.loads(student), json.loads(teacher)
    if ours == theirs:
        return None
    mine, other = _words(ours), _words(theirs)
    if mine.keys() != other.keys():
        only = sorted(mine.keys() ^ other.keys())[:3]
        raise CheckpointError(
            f"{where}: its tokenizer has {len(other)} words and the student's {len(mine)}; only one of them has "
            f"{', '.join(map(repr, only))}.",
            "take a teacher with the student's tokenizer",
        )
    for part in _rules(ours):
        if _rules(ours)[part] != _rules(theirs).get(part):
            raise CheckpointError(
                f"{where}: its tokenizer has the student's words, but another {part}: it cuts texts differently.",
                "take a teacher with the student's tokenizer",
            )
    found = np.arange(vocab_size)
    for word, number in mine.items():
        found[number] = other[word]
    if len(np.unique(found)) != vocab_size:
        raise CheckpointError(f"{where}: its token ids lie beyond the student's.", "take another teacher")
    return found


def ids_for_teacher(batch: dict[str, Tensor], mapping: np.ndarray | None) -> dict[str, Tensor]:
    """The batch with its token ids as the teacher numbers them."""
    if mapping is None:
        return batch
    table = torch.from_numpy(mapping).to(batch["instruction_ids"].device)
    return {**batch, **{name: table[batch[name]] for name in ("instruction_ids", "text_ids")}}


def ids_for_student(ids: np.ndarray, mapping: np.ndarray | None) -> np.ndarray:
    """The teacher's token ids as the student numbers them."""
    return ids if mapping is None else np.argsort(mapping)[ids]


def _words(tokenizer: dict[str, Any]) -> dict[str, int]:
    vocabulary = tokenizer["model"]["vocab"]
    words = dict(vocabulary) if isinstance(vocabulary, dict) else {w: i for i, (w, _) in enumerate(vocabulary)}
    return words | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}


def _rules(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """All but the numbers of words. Texts are encoded without a "post_processor", which would add tokens to them."""
    rules = copy.deepcopy({k: v for k, v in tokenizer.items() if k not in ("version", "post_processor")})
    rules["added_tokens"] = sorted(
        ({k: v for k, v in token.items() if k != "id"} for token in rules["added_tokens"]), key=lambda t: t["content"]
    )
    model = rules.pop("model")
    vocabulary = model.pop("vocab")
    if not isinstance(vocabulary, dict):  # of a unigram model: words with their scores
        model["scores"] = sorted(map(tuple, vocabulary))
        model["unk_id"] = vocabulary[model["unk_id"]][0] if model.get("unk_id") is not None else None
    return {**rules, **{f"model {name}": value for name, value in model.items()}}
