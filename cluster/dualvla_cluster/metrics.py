"""What the stages count, as Prometheus metrics of the Ray cluster: each node's metrics port has them beside Ray's own.

    ray_dualvla_stage_total{stage, figure, run}     done, samples, rows_out, rows_quarantined, retries
    ray_dualvla_stage_remaining{stage, run}         what still waits in the stage's queue

Only on a cluster: a private Ray has no metrics port. Knows no stage.
"""

from __future__ import annotations

import os

from ray.util.metrics import Counter, Gauge

from dualvla import console

TOTAL, REMAINING = "dualvla_stage_total", "dualvla_stage_remaining"


class _Export:
    def __init__(self) -> None:
        self._run = os.environ.get(console.RUN_VARIABLE, "")
        self._total = Counter(TOTAL, "What a stage has counted", ("stage", "figure", "run"))
        self._remaining = Gauge(REMAINING, "What a stage has left to do", ("stage", "run"))

    def __call__(self, stage: str, figure: str, amount: float) -> None:
        if figure == "remaining":
            self._remaining.set(amount, {"stage": stage, "run": self._run})
        elif amount > 0:  # Ray refuses to count nothing
            self._total.inc(amount, {"stage": stage, "figure": figure, "run": self._run})


def export() -> None:
    """Exports what this process counts from now on."""
    console.watch(_Export())
