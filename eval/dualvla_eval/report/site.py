"""Writes the report: static pages, their style and scripts, the data of every rollout, films and exported tables.

Everything is relative and nothing is fetched, so that it opens from disk. Knows which files there are, not what
stands in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any

import dualvla
from dualvla import console
from dualvla.io import manifest, storage
from dualvla_eval import results
from dualvla_eval.report import pages, rollouts, training
from dualvla_eval.report import track as tracking
from dualvla_eval.report.exports import FORMATS
from dualvla_eval.report.gather import Episode, Gathered, gather
from dualvla_eval.report.leaderboard import Palette

KIND = "report"
INDEX = "index.html"

_STATIC = ("site.css", "site.js", "rollouts.css", "rollouts.js", "player.js")
_WRITERS = 8  # threads: a file waits for its disk or its store


def write_report(folders: Sequence[str], out: str, *, track: Sequence[str] = ()) -> dict[str, Any]:
    """Returns {"out", "index", "skipped", "tracked"}; skips a report that was made from the same inputs, and makes one
    of the same folders again when they have changed.

    track: settings of `dualvla.io.tracking` to send the figures to, each time. tracked: setting -> names of its runs.
    Raises: DataError if there is nothing to report on; OutputError if `out` belongs to another report; UsageError and
    PlatformError for a tracker that does not exist or is not installed.
    """
    given = [f.rstrip("/") for f in folders if f.rstrip("/") != out.rstrip("/")]
    gathered = gather(given)
    config, inputs = {"folders": given}, {"dualvla": dualvla.__version__, **gathered.inputs}
    index = storage.join(out, INDEX)
    tracked = {setting: tracking.track(gathered, setting) for setting in track}
    result = {"out": out, "index": index, "tracked": tracked}
    if not _claim(out, config, inputs):
        return {**result, "skipped": True}
    _write_rollouts(gathered, out)
    for picture in (t for data in gathered.pruned for t in training.timelines(data)):
        storage.write_bytes(storage.join(out, picture["file"]), storage.read_bytes(picture["source"]))
    for name in _STATIC:
        storage.write_bytes(storage.join(out, name), _static(name).encode())
    made = pages.pages(gathered)
    for table in {t.name: t for page in made for t in page.tables}.values():
        for ending, write in FORMATS.items():
            storage.write_bytes(storage.join(out, "tables", f"{table.name}.{ending}"), write(table).encode())
    for name, html in pages.render(made).items():
        storage.write_bytes(storage.join(out, name), html.encode())
    manifest.finish(out, KIND, config, inputs, rollouts=len(gathered.episodes))
    return {**result, "skipped": False}


def _claim(out: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
    """Whether there is anything to write. The manifest comes last, so the next call makes good an interrupted one.

    Raises: OutputError if `out` holds anything but a report of the same folders.
    """
    urls = [storage.join(out, name) for name in (manifest.NAME, manifest.STARTED)]
    found = [results.read_json(url) for url in urls if storage.exists(url)]
    if found and found[0]["kind"] == KIND and found[0]["config"] == config:
        return found[0]["inputs"] != inputs or not storage.exists(urls[0])
    return manifest.begin(out, KIND, config, inputs)


def _static(name: str) -> str:
    return resources.files("dualvla_eval.report").joinpath("static", name).read_text(encoding="utf-8")


def _write_rollouts(found: Gathered, out: str) -> None:
    """The index, and for every episode its data and its film."""
    if not found.policies:
        return
    storage.write_bytes(storage.join(out, rollouts.INDEX), rollouts.index_script(found, Palette(found)).encode())
    episodes = found.episodes
    with console.progress("report: rollouts", len(episodes)) as advance, ThreadPoolExecutor(_WRITERS) as writers:
        for _ in writers.map(_writer(out), episodes):
            advance(1)


def _writer(out: str) -> Callable[[Episode], None]:
    def write(episode: Episode) -> None:
        film = rollouts.video_file(episode)
        if film is not None:
            source = storage.join(episode.evaluation.folder, episode.row["video"])
            storage.write_bytes(storage.join(out, film), storage.read_bytes(source))
        storage.write_bytes(storage.join(out, rollouts.data_file(episode)), rollouts.rollout_script(episode).encode())

    return write
