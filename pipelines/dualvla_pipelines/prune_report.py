"""What pruning did to a data set, so that a person can see whether it pruned the right thing: `OUT/report`.

`report.json` has the numbers, `index.html` shows them with pictures of example episodes (`timeline-*.png`). Made from a
pruned data set alone; knows neither Ray nor how labels are made. Pictures and text statistics come from a sample of
parts that is bounded whatever the size of the data, drawn by hash and not picked.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dualvla import config as configs
from dualvla.errors import DataError, UsageError
from dualvla.io import dataset, manifest, storage
from dualvla.pruning import combine, motion_changes
from dualvla.pruning.statistics import text_statistics, tokens
from dualvla_pipelines import prune_page, timeline
from dualvla_pipelines.labelling import decode_frames, episode_key

log = logging.getLogger(__name__)

FOLDER, JSON, PAGE = "report", "report.json", "index.html"
_PARTS = 16  # read for the sample
_EVENT_TOLERANCE = 0.05  # of the episode's length, as in F1 at relative distance 0.05
_COUNTS = ("frames", "scene_frames", "action_frames", "kept_frames", "tokens_before", "tokens_after")
_COLUMNS = (
    "episode_id", "step", "timestamp_s", "domain", "task", "instruction", "ee_pose", "gripper", "reasoning", "events",
    "scene_label", "action_label", "keep_reasoning",
)  # fmt: skip


@dataclass(frozen=True)
class ReportConfig:
    """timelines: pictures of example episodes. sample_episodes: at most about how many the text statistics read.

    tokenizer: `tokenizer.json` of a policy (or its checkpoint folder), to estimate the tokens *it* would emit.
    """

    timelines: int = 6
    sample_episodes: int = 400
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        for name in ("timelines", "sample_episodes"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} = {getattr(self, name)} is negative.", f"pass {name} of 0 or more")


def choose_parts(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The parts a report samples, sorted: evenly spread, and one more for each of the first tasks that they miss.

    tasks: part -> the tasks of its robot episodes.
    """
    names = [name for name, own in tasks.items() if own]
    spread = np.unique(np.linspace(0, len(names) - 1, min(_PARTS, len(names))).round().astype(int)).tolist()
    chosen = {names[i]: None for i in spread}
    covered = {task for name in chosen for task in tasks[name]}
    for name in names:
        missing = set(tasks[name]) - covered
        if missing and len(chosen) < 2 * _PARTS:
            chosen[name] = None
            covered |= missing
    return sorted(chosen)


def ensure(out: str, config: ReportConfig) -> str:
    """Makes the report of the pruned data set `out`, unless it is there already. Returns the URL of its page."""
    folder = storage.join(out, FOLDER)
    url, options = storage.join(folder, JSON), configs.to_dict(config)
    if not storage.exists(url) or json.loads(storage.read_bytes(url))["options"] != options:
        report = build(out, config)
        storage.write_bytes(storage.join(folder, PAGE), prune_page.render(report).encode())
        storage.write_bytes(url, (json.dumps(report, indent=2) + "\n").encode())  # last: it says that all is there
    return storage.join(folder, PAGE)


def build(out: str, config: ReportConfig) -> dict[str, Any]:
    """Writes the pictures into `out/report` and returns what `report.json` holds.

    Top level: name, mode, options, `total` and `tasks` (robot frames and tokens, `keep_ratio`, episodes, episodes
    without reasoning), `rows_*` and `files_lost`, `text` (statistics of all, of kept, and of as many random texts of a
    sample), `events` (null without any), `policy_tokens` (null without a tokenizer), `timelines` (one dict a picture,
    `file` relative to the folder).
    """
    found = manifest.require(out, dataset.KIND)
    if "sampled_parts" not in found:
        raise DataError(f"'{out}' is not a pruned data set.", "run `dualvla prune` first")
    parts = found["sampled_parts"]
    urls = {name: storage.join(out, "data", name) for name in parts}
    sample = _sample(urls, math.ceil(config.sample_episodes / max(len(parts), 1)))
    tasks = {name: _rates(counts) for name, counts in found["tasks"].items()}
    total = _rates(_sum(found["tasks"].values()))
    return {
        "schema_version": 1,
        "name": out.rstrip("/").rsplit("/", 1)[-1],
        "mode": found["mode"],
        "options": configs.to_dict(config),
        **{name: found[name] for name in ("rows_in", "rows_out", "rows_quarantined", "rows_lost", "files_lost")},
        "quarantine_reasons": found["quarantine_reasons"],
        "total": total,
        "tasks": tasks,
        "text": _texts(sample),
        "events": _events(sample),
        "policy_tokens": _policy_tokens(sample, total, config.tokenizer) if config.tokenizer else None,
        "timelines": _timelines(out, sample, config.timelines, found["config"]["camera"]),
    }


@dataclass(frozen=True)
class _Sampled:
    """An episode of the sample: all columns but the images, as lists of N values. part: URL of its file."""

    part: str
    first_row: int
    columns: Mapping[str, list[Any]]

    @property
    def episode_id(self) -> str:
        return self.columns["episode_id"][0]

    @property
    def keep(self) -> np.ndarray:
        return np.array(self.columns["keep_reasoning"], dtype=bool)

    @property
    def random(self) -> np.ndarray:
        """As many frames as are kept, drawn by hash: what chance would have kept."""
        return combine(self.keep, self.keep, "random", episode_key(self.episode_id))

    def texts(self, frames: np.ndarray) -> list[str]:
        return [self.columns["reasoning"][i] for i in np.flatnonzero(frames) if self.columns["reasoning"][i]]


def _sample(urls: Mapping[str, str], per_part: int) -> list[_Sampled]:
    """Up to `per_part` robot episodes of each part, by hash, in the order of the hashes."""
    chosen = []
    for url in urls.values():
        table = dataset.read_table(url, _COLUMNS)
        ids = pa.compute.if_else(pa.compute.equal(table["domain"], "robot"), table["episode_id"], None)
        runs = ids.combine_chunks().to_pylist()
        starts = [i for i, name in enumerate(runs) if name is not None and (i == 0 or runs[i - 1] != name)]
        for first in sorted(starts, key=lambda i: episode_key(runs[i]))[:per_part]:
            length = next((n for n, name in enumerate(runs[first:]) if name != runs[first]), len(runs) - first)
            chosen.append(_Sampled(url, first, table.slice(first, length).to_pydict()))
    return sorted(chosen, key=lambda episode: episode_key(episode.episode_id))


def _sum(counts: Any) -> dict[str, int]:
    names = (*_COUNTS, "episodes", "episodes_without_reasoning")
    rows = list(counts)
    return {name: sum(row[name] for row in rows) for name in names}


def _rates(counts: Mapping[str, int]) -> dict[str, Any]:
    frames = counts["frames"]
    return {**counts, "keep_ratio": counts["kept_frames"] / frames if frames else None}


def _texts(sample: Sequence[_Sampled]) -> dict[str, Any]:
    """Statistics of the sample's reasoning: `all` of it, what is `kept`, and as many `random` texts an episode."""
    sets = {
        "all": [episode.texts(np.ones(len(episode.keep), dtype=bool)) for episode in sample],
        "kept": [episode.texts(episode.keep) for episode in sample],
        "random": [episode.texts(episode.random) for episode in sample],
    }
    return {"episodes": len(sample)} | {
        name: configs.to_dict(text_statistics(episodes)) for name, episodes in sets.items()
    }


def _events(sample: Sequence[_Sampled]) -> dict[str, Any] | None:
    """How many recorded events have a kept frame near, beside as many random frames. None without any event."""
    near = {"kept": 0, "random": 0}
    count = 0
    for episode in sample:
        events = np.flatnonzero([bool(names) for names in episode.columns["events"]])
        count += len(events)
        for name, frames in (("kept", episode.keep), ("random", episode.random)):
            at = np.flatnonzero(frames)
            if len(at):
                away = np.abs(events[:, None] - at[None, :]).min(axis=1)
                near[name] += int((away <= _EVENT_TOLERANCE * len(frames)).sum())
    if not count:
        return None
    return {"count": count, "tolerance": _EVENT_TOLERANCE} | {f"{k}_share": n / count for k, n in near.items()}


def _policy_tokens(sample: Sequence[_Sampled], total: Mapping[str, Any], tokenizer: str) -> dict[str, Any]:
    """The policy's own tokens, before and after, estimated from its tokens per token of ours on the sample."""
    from tokenizers import Tokenizer

    url = tokenizer if tokenizer.endswith(".json") else storage.join(tokenizer, "tokenizer.json")
    model = Tokenizer.from_str(storage.read_bytes(url).decode())
    texts = [text for episode in sample for text in episode.texts(np.ones(len(episode.keep), dtype=bool))]
    distinct = sorted(set(texts))
    theirs = dict(zip(distinct, (len(e) for e in model.encode_batch(distinct, add_special_tokens=False)), strict=True))
    ratio = sum(theirs[text] for text in texts) / max(1, sum(len(tokens(text)) for text in texts))
    return {
        "per_token": ratio,
        "before": round(ratio * total["tokens_before"]),
        "after": round(ratio * total["tokens_after"]),
    }


def _timelines(out: str, sample: Sequence[_Sampled], count: int, camera: str | None) -> list[dict[str, Any]]:
    """Draws `count` episodes, one of each task in turn."""
    by_task: dict[str, list[_Sampled]] = {}
    for episode in sample:
        by_task.setdefault(episode.columns["task"][0] or "", []).append(episode)
    longest = max((len(episodes) for episodes in by_task.values()), default=0)
    turns = [by_task[t][i] for i in range(longest) for t in sorted(by_task) if i < len(by_task[t])][:count]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow works outside of Python's lock
        drawn = pool.map(lambda at: _timeline(out, f"timeline-{at[0]:02d}.png", at[1], camera), enumerate(turns))
        return [one for one in drawn if one is not None]


def _timeline(out: str, name: str, episode: _Sampled, camera: str | None) -> dict[str, Any] | None:
    """Draws one episode, and returns what is in the picture; None if its images are broken."""
    images = dataset.read_table(episode.part, ["images"])["images"].slice(episode.first_row, len(episode.keep))
    try:
        frames = decode_frames(images, camera)
    except DataError as error:  # modes that need no image let broken ones pass
        log.warning("no timeline of '%s': %s", episode.episode_id, error)
        return None
    storage.write_bytes(storage.join(out, FOLDER, name), timeline.draw(_as_timeline(episode, frames)))
    columns = episode.columns
    return {
        "file": name,
        "episode_id": episode.episode_id,
        "task": columns["task"][0],
        "instruction": columns["instruction"][0],
        "frames": len(frames),
        "kept_frames": int(episode.keep.sum()),
        "steps": [
            {"step": step, "scene": scene, "action": action, "kept": kept, "reasoning": text, "events": events}
            for step, scene, action, kept, text, events in zip(
                *(columns[c] for c in ("step", "scene_label", "action_label", "keep_reasoning", "reasoning", "events")),
                strict=True,
            )
        ],
    }


def _as_timeline(episode: _Sampled, frames: np.ndarray) -> timeline.Episode:
    columns = episode.columns
    motion, mean = motion_changes(np.array(columns["ee_pose"]))
    scene = columns["scene_label"]
    return timeline.Episode(
        title=f"{columns['task'][0] or ''} · {columns['instruction'][0] or ''} · {episode.episode_id}",
        frames=frames,
        time_s=np.array([t or 0.0 for t in columns["timestamp_s"]]),
        motion=motion,
        motion_mean=mean,
        gripper=np.clip(np.array(columns["gripper"]), 0.0, 1.0),
        scene=None if None in scene else np.array(scene, dtype=bool),
        action=np.array(columns["action_label"], dtype=bool),
        keep=episode.keep,
        reasoning=[text or "" for text in columns["reasoning"]],
        events=[names or [] for names in columns["events"]],
    )
