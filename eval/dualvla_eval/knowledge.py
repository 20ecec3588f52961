"""A knowledge base: a folder of scored trajectories, corrected by people, that a model judge learns the scale from.

    entries/<id>.json          whose trajectory it is, and every version of its marks: who, when, why
    trajectories/<id>.parquet  videos/<id>.mp4  frames/<id>.parquet      copies: the folder stands by itself
    embeddings/<embedder>.parquet                                        vectors, made again when they are missing

Dual retrieval (arXiv 2511.22134, Sec. 3.3): the nearest tasks by text, among them the nearest scenes by picture. Knows
recorded trajectories, embedders and verdicts; nothing of how a judge works.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dualvla import console
from dualvla.errors import DataError, UsageError
from dualvla.io import dataset, manifest, storage
from dualvla_eval import results
from dualvla_eval.embedders import ImageEmbedder, TextEmbedder
from dualvla_eval.frames import Frames
from dualvla_eval.judges.base import DIMENSIONS, Dimension, Judge, Verdict
from dualvla_eval.judges.prompt import Example, statements

if TYPE_CHECKING:
    from dualvla_eval.results import Trajectory

KIND = "knowledge_base"
MARK_NAMES: Mapping[Dimension, str] = {"A": "Action", "I": "Intention", "R": "Reasoning", "RA": "Alignment"}
_SHORTLIST = 20  # nearest tasks among which the nearest scenes are looked for
_VECTORS = pa.schema([("id", pa.string()), ("vector", pa.list_(pa.float32()))])
_MOST_RATIONALE = 4000  # characters

Marks = Mapping[Dimension, int | None]
_Recorded = tuple[str, Mapping[str, Any]]  # evaluation folder, row of its episodes.parquet


@dataclass(frozen=True)
class Version:
    """One state of an entry's marks (0..10; R and RA None without reasoning). by: a judge's or a person's name.

    at: ISO 8601, UTC. reviewed: by a person.
    """

    number: int
    marks: Marks
    rationale: str
    by: str
    at: str
    reviewed: bool


@dataclass(frozen=True)
class Entry:
    """row: of episodes.parquet. source: digest of the evaluation it was copied from. texts: what the policy wrote.
    control_hz: steps, and pictures of the film, a second."""

    id: str
    source: str
    control_hz: float
    row: Mapping[str, Any]
    texts: tuple[str, ...]
    versions: tuple[Version, ...]

    @property
    def current(self) -> Version:
        return self.versions[-1]


class KnowledgeBase:
    """A finished folder. Raises: DataError if it is none."""

    def __init__(self, folder: str):
        manifest.require(folder, KIND)
        self.folder = folder

    def ids(self) -> list[str]:
        files = storage.list_files(storage.join(self.folder, "entries"), ".json")
        return [f.rsplit("/", 1)[-1].removesuffix(".json") for f in files]

    def entries(self) -> list[Entry]:
        return [self.entry(id) for id in self.ids()]

    def entry(self, id: str) -> Entry:
        """Raises: DataError for an unknown or damaged one."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", id):  # it becomes part of a path
            raise DataError(f"'{id}' is no entry of '{self.folder}'.")
        url = _entry_url(self.folder, id)
        try:
            found = json.loads(storage.read_bytes(url))
            versions = tuple(Version(**v) for v in found["versions"])
            return Entry(**{**found, "texts": tuple(found["texts"]), "versions": versions})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"'{url}' is no entry: {error!r}.", "delete it, or restore it from a copy") from error

    def trajectory(self, entry: Entry) -> Trajectory:
        url = storage.join(self.folder, "trajectories", f"{entry.id}.parquet")
        return results.load_trajectory(url, entry.row, _frames(self.folder, entry.id))

    def video(self, entry: Entry) -> bytes:
        return storage.read_bytes(storage.join(self.folder, "videos", f"{entry.id}.mp4"))

    def revise(self, id: str, based_on: int, marks: Mapping[str, Any], rationale: str, by: str) -> Entry:
        """Adds a version by a person. based_on: number of the version that was looked at.

        Raises: UsageError for marks out of range, or if somebody else has saved another version since.
        """
        entry = self.entry(id)
        if based_on != entry.current.number:
            raise UsageError(
                f"'{id}' was changed by {entry.current.by} in the meantime.",
                "look at it again: it has been loaded anew",
            )
        if not by.strip():
            raise UsageError("A correction needs the name of who makes it.", "start the page with --as NAME")
        if len(rationale) > _MOST_RATIONALE:
            raise UsageError(f"The rationale is longer than {_MOST_RATIONALE} characters.", "shorten it")
        checked = _check_marks(marks, entry.current.marks)
        version = Version(based_on + 1, checked, rationale.strip(), by.strip(), _now(), reviewed=True)
        revised = replace(entry, versions=(*entry.versions, version))
        _write_entry(self.folder, revised)
        return revised

    def digest(self) -> str:
        """Of what a judge is shown: changes with every correction."""
        return manifest.digest([[e.id, e.current.number, e.current.marks, e.current.rationale] for e in self.entries()])


def _check_marks(given: Mapping[str, Any], before: Marks) -> Marks:
    checked: dict[Dimension, int | None] = {}
    for dimension in DIMENSIONS:
        mark = given.get(dimension)
        if before[dimension] is None:
            if mark is not None:
                raise UsageError(f"{dimension} = {mark!r}: this policy wrote nothing to be judged.", "leave it out")
        elif not isinstance(mark, int) or isinstance(mark, bool) or not 0 <= mark <= 10:
            raise UsageError(f"{dimension} = {mark!r} is not a whole number from 0 to 10.", "correct it")
        checked[dimension] = mark
    return checked


# --- making one -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BuildConfig:
    """entries: how many at most, spread evenly over policies, tasks and outcomes."""

    entries: int = 100
    seed: int = 0


def build(evaluations: Sequence[str], folder: str, judge: Judge, config: BuildConfig) -> dict[str, Any]:
    """Makes the folder with the judge's marks as first versions. Resumes; returns at once if it is finished.

    Raises: DataError for an evaluation that is unfinished or has no film.
    """
    sources = {e: manifest.file_digest(storage.join(e, manifest.NAME)) for e in evaluations if _finished(e)}
    identity = {"judge": dict(judge.identity), **asdict(config)}
    inputs = {f"evaluation:{i}": digest for i, digest in enumerate(sources.values())}
    if not manifest.begin(folder, KIND, identity, inputs):
        return {"entries": len(KnowledgeBase(folder).ids()), "skipped": True}
    filmed = [(e, row) for e in evaluations for row in results.read_episodes(e) if row["video"] is not None]
    if not filmed:
        raise DataError(
            f"No episode of {', '.join(evaluations)} was filmed.", "evaluate with --videos all, and build from that"
        )
    chosen = _spread(filmed, config)
    new = [(e, row) for e, row in chosen if not storage.exists(_entry_url(folder, _entry_id(sources[e], row)))]
    trajectories = [results.read_trajectory(e, row) for e, row in new]
    with console.progress(f"judge {judge.name}", len(new)) as advance:
        verdicts = judge.judge(trajectories, advance)
    unjudged = 0
    for (evaluation, row), trajectory, verdict in zip(new, trajectories, verdicts, strict=True):
        if verdict.unjudged is not None:
            unjudged += 1
            continue
        _add(folder, evaluation, sources[evaluation], row, trajectory, verdict, judge.name)
    made = len(storage.list_files(storage.join(folder, "entries"), ".json"))
    manifest.finish(folder, KIND, identity, inputs, entries=made, unjudged=unjudged)
    return {"entries": made, "unjudged": unjudged, "skipped": False}


def _finished(evaluation: str) -> bool:
    manifest.require(evaluation, results.KIND)
    return True


def _spread(filmed: Sequence[_Recorded], config: BuildConfig) -> list[_Recorded]:
    """Takes turns between (policy, task, success), so that rare outcomes are in it too."""
    groups = defaultdict(list)
    for evaluation, row in filmed:
        groups[(evaluation, row["policy"], row["task"], row["success"])].append((evaluation, row))
    rng = np.random.default_rng(config.seed)
    piles = [[of[i] for i in rng.permutation(len(of))] for _, of in sorted(groups.items())]
    chosen: list[_Recorded] = []
    while len(chosen) < config.entries and any(piles):
        for pile in piles:
            if pile and len(chosen) < config.entries:
                chosen.append(pile.pop())
    return chosen


def _add(
    folder: str,
    evaluation: str,
    source: str,
    row: Mapping[str, Any],
    trajectory: Trajectory,
    verdict: Verdict,
    judge: str,
) -> None:
    """Its files first and the entry last: an entry that exists is whole."""
    id = _entry_id(source, row)
    kept = {
        results.trajectory_url(evaluation, row): storage.join(folder, "trajectories", f"{id}.parquet"),
        storage.join(evaluation, row["video"]): storage.join(folder, "videos", f"{id}.mp4"),
    }
    for url, copy in kept.items():
        storage.write_bytes(copy, storage.read_bytes(url))
    _frames(folder, id).read(_scene_steps(trajectory))
    marks: dict[Dimension, int | None] = {}
    for dimension in DIMENSIONS:
        mark = verdict.mark(dimension)
        marks[dimension] = None if mark is None else round(mark)
    version = Version(1, marks, _rationale(verdict), judge, _now(), reviewed=False)
    texts = tuple(text for _, text in statements(trajectory))
    control_hz = results.read_json(storage.join(evaluation, results.SUMMARY))["control_hz"]
    _write_entry(folder, Entry(id, source, control_hz, {**row, "video": f"videos/{id}.mp4"}, texts, (version,)))


def _rationale(verdict: Verdict) -> str:
    """The judge's words; of a judge without words, what its marks are made of."""
    if verdict.rationale:
        return verdict.rationale[:_MOST_RATIONALE]
    return "\n".join(f"{d}: {'; '.join(c.detail for c in of)}" for d, of in verdict.explanation.items())


def _entry_id(source: str, row: Mapping[str, Any]) -> str:
    return f"{results.row_stem(row)}-{source[:6]}"


def _entry_url(folder: str, id: str) -> str:
    return storage.join(folder, "entries", f"{id}.json")


def _write_entry(folder: str, entry: Entry) -> None:
    storage.write_bytes(_entry_url(folder, entry.id), (json.dumps(asdict(entry), indent=1) + "\n").encode())


def _frames(folder: str, id: str) -> Frames:
    return Frames(storage.join(folder, "videos", f"{id}.mp4"), storage.join(folder, "frames", f"{id}.parquet"))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- finding in it ----------------------------------------------------------------------------------------------------


class Retriever:
    """Dual retrieval over the entries as they are now. Safe to use from several threads."""

    def __init__(self, base: KnowledgeBase, texts: TextEmbedder, images: ImageEmbedder):
        """Raises: DataError if the base is empty."""
        self._base, self._texts, self._images = base, texts, images
        self._entries = {e.id: e for e in base.entries()}
        if not self._entries:
            raise DataError(f"'{base.folder}' has no entries.", "build it again from a filmed evaluation")
        self._tasks = self._vectors(
            f"texts-{texts.name}", lambda ids: texts.embed_texts([self._entries[i].row["instruction"] for i in ids])
        )
        self._scenes = self._vectors(
            f"images-{images.name}",
            lambda ids: np.stack([self._scene(base.trajectory(self._entries[i])) for i in ids]),
        )
        self._shown: dict[tuple[str, int], Example] = {}

    @property
    def identity(self) -> Mapping[str, str]:
        return {"base": self._base.digest(), "texts": self._texts.name, "images": self._images.name}

    def find(self, trajectory: Trajectory, count: int) -> tuple[str, ...]:
        """Ids of the `count` nearest entries, the nearest last. Never the trajectory itself: for an entry of the base
        this is leave-one-out. Raises: DataError if its film cannot be read."""
        ids = [id for id, entry in self._entries.items() if not _same_episode(entry.row, trajectory.row)]
        if not ids or count == 0:
            return ()
        (task,) = self._texts.embed_texts([trajectory.row["instruction"]])
        tasks = _nearest(ids, self._tasks, task, _SHORTLIST)
        return tuple(reversed(_nearest(tasks, self._scenes, self._scene(trajectory), count)))

    def show(self, ids: Sequence[str], pictures: int) -> tuple[Example, ...]:
        """What a judge is shown of these entries, with that many pictures of each."""
        return tuple(self._show(id, pictures) for id in ids)

    def _show(self, id: str, pictures: int) -> Example:
        if (id, pictures) not in self._shown:
            entry = self._entries[id]
            last = self._base.trajectory(entry).num_steps
            steps = np.linspace(0, last, pictures).round().astype(int).tolist()
            self._shown[id, pictures] = Example(
                id=id,
                task=entry.row["instruction"],
                texts=entry.texts,
                marks={MARK_NAMES[d]: m for d, m in entry.current.marks.items() if m is not None},
                rationale=entry.current.rationale,
                pictures=tuple(_frames(self._base.folder, id).read(steps)),
            )
        return self._shown[id, pictures]

    def _scene(self, trajectory: Trajectory) -> np.ndarray:
        assert trajectory.frames is not None
        jpegs = trajectory.frames.read(_scene_steps(trajectory))
        vector = self._images.embed_images([dataset.decode_image(j) for j in jpegs]).mean(axis=0)
        return vector / max(float(np.linalg.norm(vector)), 1e-12)

    def _vectors(self, name: str, embed: Callable[[list[str]], np.ndarray]) -> dict[str, np.ndarray]:
        """Id -> vector, from the folder where they have been made before; an entry's task and film never change."""
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
        url = storage.join(self._base.folder, "embeddings", f"{slug}.parquet")
        known: dict[str, np.ndarray] = {}
        if storage.exists(url):
            table = dataset.read_table(url, _VECTORS.names)
            pairs = zip(table["id"].to_pylist(), table["vector"].to_pylist(), strict=True)
            known = {id: np.array(vector, np.float32) for id, vector in pairs}
        missing = [id for id in self._entries if id not in known]
        if missing:
            known |= dict(zip(missing, embed(missing), strict=True))
            rows = [{"id": id, "vector": known[id].tolist()} for id in sorted(known)]
            dataset.write_table(url, pa.Table.from_pylist(rows, schema=_VECTORS))
        return known


def _nearest(ids: Sequence[str], vectors: Mapping[str, np.ndarray], to: np.ndarray, count: int) -> list[str]:
    """The nearest first; ties in the order of the ids."""
    cosine = np.stack([vectors[id] for id in ids]) @ to
    return [ids[i] for i in np.argsort(-cosine, kind="stable")[:count]]


def _same_episode(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return all(a[name] == b[name] for name in ("suite", "policy", "task", "variant", "episode_id", "seed"))


def _scene_steps(trajectory: Trajectory) -> list[int]:
    return [0, trajectory.num_steps // 2, trajectory.num_steps]
