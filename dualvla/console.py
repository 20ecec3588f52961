"""What a person sees while and after a command runs: progress on stderr, tables on stdout. Knows no method.

The same figures go to whoever watches (`watch`), such as the metrics of a cluster. Environment: DUALVLA_LOG=json makes
every line of the log a JSON object; DUALVLA_RUN names the run in it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime

log = logging.getLogger("dualvla")

RUN_VARIABLE, LOG_VARIABLE = "DUALVLA_RUN", "DUALVLA_LOG"
_LOG_EVERY_S = 15.0
_OWN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime"}

Watcher = Callable[[str, str, float], None]
"""(stage, figure, amount): `remaining` is how many are left now, every other figure is how many more there are."""

_watchers: list[Watcher] = []


def watch(watcher: Watcher) -> None:
    """From now on, tells `watcher` what this process counts. Once is enough."""
    if watcher not in _watchers:
        _watchers.append(watcher)


def tell(stage: str, figure: str, amount: float) -> None:
    """`amount` more rows, samples, quarantined rows, retries, ... of a stage."""
    for watcher in _watchers:
        watcher(stage, figure, amount)


@contextlib.contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line every 15 s in a log. Call the yielded function with how many more are done."""
    stage, remaining = description.split()[0], total - done
    tell(stage, "remaining", remaining)
    with _shown(description, total, done) as show:

        def advance(n: int) -> None:
            nonlocal remaining
            remaining -= n
            show(n)
            tell(stage, "done", n)
            tell(stage, "remaining", remaining)

        try:
            yield advance
        finally:  # what a limit or an error left undone waits no longer
            tell(stage, "remaining", 0)


@contextlib.contextmanager
def _shown(description: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(description, total=total, completed=done)
            yield lambda n: bar.update(task, advance=n)
        return

    started = last = time.monotonic()
    count = done

    def advance(n: int) -> None:
        nonlocal count, last
        count += n
        now = time.monotonic()
        if now - last >= _LOG_EVERY_S or count >= total:
            last = now
            log.info("%s: %d/%d after %.0f s", description, count, total, now - started)

    yield advance


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """A plain-text table; columns after the first are right-aligned."""
    from rich.console import Console
    from rich.table import Table

    view = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        view.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        view.add_row(*row)
    console = Console(width=width or 200, no_color=True)
    with console.capture() as capture:
        console.print(view)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def setup_logging(verbose: bool) -> None:
    """Logs to stderr; stdout belongs to results."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    if os.environ.get(LOG_VARIABLE) == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())
    for noisy in ("httpx", "httpcore", "urllib3", "fsspec", "s3fs", "aiobotocore", "botocore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class JsonFormatter(logging.Formatter):
    """time, level, logger, message, the run if there is one, and whatever was given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = {"time": at, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        if RUN_VARIABLE in os.environ:
            fields["run"] = os.environ[RUN_VARIABLE]
        fields |= {name: value for name, value in vars(record).items() if name not in _OWN}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)
