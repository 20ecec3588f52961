"""What the stages count, as Prometheus metrics of the Ray cluster: each node's metrics port has them beside Ray's own.

    ray_dualvla_stage_total{stage, figure, run}     done, samples, rows_out, rows_quarantined, retries
    ray_dualvla_stage_remaining{stage, run}         what still waits in the stage's queue

Only on a cluster: a private Ray has no metrics port. Knows no stage.
"""

from __future__ import annotations

import functools
import os
import threading
import time

from ray.util.metrics import Counter, Gauge

from dualvla import console

TOTAL, REMAINING = "dualvla_stage_total", "dualvla_stage_remaining"
_REPEAT_S = 0.5


class _Export:
    def __init__(self) -> None:
        self._run = os.environ.get(console.RUN_VARIABLE, "")
        self._total = Counter(TOTAL, "What a stage has counted", ("stage", "figure", "run"))
        self._remaining = Gauge(REMAINING, "What a stage has left to do", ("stage", "run"))
        self._left: dict[str, float] = {}
        threading.Thread(target=self._repeat, name="dualvla-metrics", daemon=True).start()

    def __call__(self, stage: str, figure: str, amount: float) -> None:
        if figure == "remaining":
            self._left[stage] = amount
        elif amount > 0:  # Ray refuses to count nothing
            self._total.inc(amount, {"stage": stage, "figure": figure, "run": self._run})

    def _repeat(self) -> None:
        """Ray forgets a gauge that was not set between two reports, and a stage that stands still sets none."""
        while True:
            for stage, amount in list(self._left.items()):
                self._remaining.set(amount, {"stage": stage, "run": self._run})
            time.sleep(_REPEAT_S)


@functools.cache
def export() -> None:
    """Exports what this process counts from now on."""
    console.watch(_Export())
