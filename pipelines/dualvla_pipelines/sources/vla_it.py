"""VLA-IT annotations (InstructVLA): one JSON file, joined to steps by `{file_path}_{episode_id}_{step}`.

A key that fits no step, or more than one, is counted and listed and never used. The file is read once and laid out in
small shards beside the output, so that a worker holds only what its episodes need. Knows nothing of robots' numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dualvla.errors import DataError
from dualvla.io import storage

_SHARDS = 256
_HELD_SHARDS = 8
QUESTIONS = ("CR", "CC", "QA")


@dataclass(frozen=True)
class Annotation:
    """What one episode is told. primitives: one a step. texts: (kind, question, answer), kinds Caption, CR, CC, QA."""

    key: str
    primitives: Sequence[str]
    texts: Sequence[tuple[str, str, str]]


def episode_key(file_path: str, episode_id: str) -> str:
    """What a step's key begins with."""
    return f"{file_path}_{episode_id}"


def build_index(url: str, folder: str) -> dict[str, Any]:
    """Lays the annotations of `url` out in `folder`.

    Returns `keys`: episode key -> steps it names; `doubled`: those of them that the file holds more than once.
    Raises: DataError if the file is not VLA-IT.
    """
    entries: dict[str, list[Annotation]] = {}
    try:
        for file_path, episodes in _pairs(json.loads(storage.read_bytes(url), object_pairs_hook=_Pairs), "the file"):
            for episode_id, content in _pairs(episodes, file_path):
                one = _annotation(episode_key(file_path, episode_id), content)
                entries.setdefault(one.key, []).append(one)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DataError(f"'{url}' is not a VLA-IT file: {error}.", "see docs/data.md for its form") from error
    shards: dict[int, dict[str, Any]] = {shard: {} for shard in range(_SHARDS)}
    for key, found in entries.items():
        if len(found) == 1:
            shards[_shard(key)][key] = [list(found[0].primitives), [list(text) for text in found[0].texts]]
    for shard, content in shards.items():
        if content:
            storage.write_bytes(_shard_url(folder, shard), json.dumps(content, sort_keys=True).encode())
    steps = {key: sum(len(one.primitives) for one in found) for key, found in entries.items()}
    return {"keys": steps, "doubled": {key: steps[key] for key, found in entries.items() if len(found) > 1}}


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as its pairs: a dict would silently keep the last of two equal keys."""


def _annotation(key: str, content: Any) -> Annotation:
    parts = _once(content, key)
    primitives = _once(parts.get("features", _Pairs()), key).get("move_primitive", [])
    if not isinstance(primitives, list) or not all(isinstance(text, str) for text in primitives):
        raise ValueError(f"'{key}' has a move_primitive that is no list of texts")
    texts: list[tuple[str, str, str]] = []
    for kind, value in _once(parts.get("alt_instruction", _Pairs()), key).items():
        if kind == "Caption":
            texts.append((kind, "", str(value)))
        elif kind in QUESTIONS:
            for pair in value:
                asked = _once(pair, key)
                texts.append((kind, str(asked["question"]), str(asked["answer"])))
        else:
            raise ValueError(f"'{key}' has an alt_instruction '{kind}'")
    return Annotation(key, primitives, texts)


def _pairs(value: Any, where: str) -> _Pairs:
    if not isinstance(value, _Pairs):
        raise ValueError(f"'{where}' holds {value!r:.80} where an object belongs")
    return value


def _once(value: Any, where: str) -> dict[str, Any]:
    pairs = _pairs(value, where)
    doubled = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if doubled:
        raise ValueError(f"'{where}' names '{doubled[0]}' twice")
    return dict(pairs)


@lru_cache(maxsize=_HELD_SHARDS)
def _load(url: str) -> Mapping[str, Any]:
    return json.loads(storage.read_bytes(url)) if storage.exists(url) else {}


def lookup(folder: str, key: str) -> Annotation | None:
    """The annotation of one episode, from what `build_index` laid out; None if there is none, or more than one."""
    found = _load(_shard_url(folder, _shard(key))).get(key)
    return None if found is None else Annotation(key, found[0], [tuple(text) for text in found[1]])


def _shard(key: str) -> int:
    return hashlib.sha256(key.encode()).digest()[0] % _SHARDS


def _shard_url(folder: str, shard: int) -> str:
    return storage.join(folder, f"shard-{shard:03d}.json")
