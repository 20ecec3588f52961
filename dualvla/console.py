"""What a person sees while and after a command runs: progress on stderr, tables on stdout. Knows no method."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence

log = logging.getLogger("dualvla")

_LOG_EVERY_S = 15.0


@contextlib.contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line every 15 s in a log. Call the yielded function with how many more are done."""
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
    for noisy in ("httpx", "httpcore", "urllib3", "fsspec", "s3fs", "aiobotocore", "botocore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
