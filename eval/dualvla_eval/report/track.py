"""The report's figures as runs of a tracker: one run a policy or checkpoint, with its curves and its results.

Knows tables and checkpoints; which tracker it is, `dualvla.io.tracking` knows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from dualvla.io.tracking import open_tracker
from dualvla_eval.report import leaderboard
from dualvla_eval.report.gather import Gathered
from dualvla_eval.report.leaderboard import Palette
from dualvla_eval.report.tables import Table, scalars


def track(found: Gathered, setting: str) -> list[str]:
    """Writes every run and returns their names. Results stand at the last training step of their checkpoint, or at 0.

    Raises: UsageError for a setting that is none; PlatformError naming the package to install.
    """
    results: dict[str, dict[str, float]] = defaultdict(dict)
    for table in _tables(found):
        for policy, column, value in scalars(table):
            results[policy][f"{table.name}/{column}"] = value
    curves = {c.name: c.lines for c in found.checkpoints}
    names = list(dict.fromkeys([*curves, *results]))
    for name in names:
        with open_tracker(setting, name) as tracker:
            step = 0
            for line in curves.get(name, ()):
                step = int(line["step"])
                tracker.log({f"train/{term}": value for term, value in line.items() if term != "step"}, step)
            tracker.log(results.get(name, {}), step)
    return names


def _tables(found: Gathered) -> Iterator[Table]:
    palette = Palette(found)
    for suite in found.suites:
        yield leaderboard.leaderboard(found, suite, palette, ())
        for controls in (False, True):
            yield leaderboard.success_by_task(found, suite, palette, controls=controls)
    if found.answers:
        yield leaderboard.questions(found.answers, palette)
