"""Runs the Ray commands' plain work in this process: for tests of what they do, not of where."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest


def run_inline(
    patch: pytest.MonkeyPatch, *modules: Any, order: Callable[[Sequence[Any]], Sequence[Any]] = list
) -> None:
    """Replaces `run_each` in the modules. order: in which the items are worked through."""

    def run_each(
        work: Callable[[Any], Any], items: Sequence[Any], workers: int | None, description: str, give_up: Any
    ) -> Iterator[tuple[Any, Any]]:
        for item in order(items):
            yield item, work(item)

    for module in modules:
        patch.setattr(module, "run_each", run_each)
