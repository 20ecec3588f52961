"""Verdicts of a model, kept by the hash of what was asked: one small file each, written once, whole or not at all.

A run that was cut off goes on from what is here; the same question is never paid for twice. One object a verdict rather
than one growing file, so that it works the same on a disk and in an object store. Knows nothing of who is asked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from dualvla.errors import DataError
from dualvla.io import storage
from dualvla_eval.judges.base import Verdict

_FIELDS = ("action", "intention", "reasoning", "alignment", "unjudged", "rationale", "success")


class VerdictStore:
    """folder: where the files lie. Keys are hex digests."""

    def __init__(self, folder: str):
        self._folder = folder
        names = (url.rsplit("/", 1)[-1] for url in storage.list_files(folder, ".json"))
        self._known = {name.removesuffix(".json") for name in names}

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def get(self, key: str) -> Verdict:
        """Raises: DataError naming a damaged file."""
        url = self._url(key)
        try:
            record = json.loads(storage.read_bytes(url))
            values = {name: record["verdict"][name] for name in _FIELDS}
            return Verdict(**values, examples=tuple(record["verdict"]["examples"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"'{url}' is no verdict: {error!r}.", "delete that file: it is asked for again") from error

    def put(self, key: str, verdict: Verdict, answers: Sequence[str]) -> None:
        """answers: the model's, as they came."""
        kept = {name: getattr(verdict, name) for name in _FIELDS} | {"examples": list(verdict.examples)}
        record = {"key": key, "verdict": kept, "answers": list(answers)}
        storage.write_bytes(self._url(key), (json.dumps(record, indent=1) + "\n").encode())
        self._known.add(key)

    def _url(self, key: str) -> str:
        return storage.join(self._folder, f"{key}.json")
