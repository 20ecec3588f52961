"""What an endpoint counts and measures, in Prometheus' terms; and the numbers of all replicas as one page.

Each replica has a registry of its own and reports its page to the hub; `merge` labels each sample with its replica.
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

STAGES = ("decode", "queue", "infer", "safety", "total")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_PREFIX = "dualvla_serve"


class Metrics:
    """One replica's. Implements `batching.Meter`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._seconds = Histogram(
            f"{_PREFIX}_request_seconds",
            "Time of a request, by stage",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._stages = {stage: self._seconds.labels(stage) for stage in STAGES}
        self._batch = Histogram(
            f"{_PREFIX}_batch_size", "Observations per call of the policy", buckets=_SIZES, registry=self.registry
        )
        self._queue = self._gauge("queue_length", "Observations that wait for the policy")
        self._requests = self._counter("requests", "Requests, by protocol and outcome", "protocol", "outcome")
        self._interventions = self._counter("interventions", "What the safety layer changed or stopped", "kind")
        self.sessions = self._gauge("sessions", "Sessions with a connection")
        self.connections = self._gauge("connections", "Open WebSocket connections")
        self.emergency_stop = self._gauge("emergency_stop", "1 while the emergency stop is in force")
        self._models = self._gauge("model_info", "1 for the version of each model that answers", "model", "version")
        self.recording_dropped = self._counter("recording_dropped", "Steps that could not be recorded in time")
        self.estimated_batch = self._gauge("estimated_batch_seconds", "What a batch of one is expected to take")
        self.key_reloads = self._gauge("key_reloads", "Times the keys file was read again")

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"{_PREFIX}_{name}", text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", text, labels, registry=self.registry)

    def stage(self, name: str, milliseconds: float) -> None:
        self._stages[name].observe(milliseconds / 1000)

    def batch(self, size: int, seconds: float) -> None:
        self._batch.observe(size)

    def waiting(self, number: int) -> None:
        self._queue.set(number)

    def outcome(self, protocol: str, outcome: str) -> None:
        self._requests.labels(protocol, outcome).inc()

    def intervention(self, kind: str) -> None:
        self._interventions.labels(kind).inc()

    def model(self, name: str, version: str, answers: bool) -> None:
        self._models.labels(name, version).set(1 if answers else 0)

    def page(self) -> str:
        return generate_latest(self.registry).decode()


def merge(pages: Mapping[str, str]) -> str:
    """Replica -> its page, as one page whose samples say which replica they are of."""
    families: dict[str, Metric] = {}
    for replica, page in pages.items():
        for family in text_string_to_metric_families(page):
            kept = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                kept.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)

    class _Page:
        def collect(self) -> list[Metric]:
            return list(families.values())

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Page())
    return generate_latest(registry).decode()


def latency(pages: Mapping[str, str]) -> dict[str, dict[str, list[float]]]:
    """Stage -> {"le": upper bounds in ms, "counts": requests up to each, of all replicas}, for the status page."""
    sums: dict[str, dict[float, float]] = {stage: {} for stage in STAGES}
    for page in pages.values():
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name == f"{_PREFIX}_request_seconds_bucket" and sample.labels["le"] != "+Inf":
                    bounds = sums[sample.labels["stage"]]
                    le = float(sample.labels["le"]) * 1000
                    bounds[le] = bounds.get(le, 0.0) + sample.value
    return {s: {"le": sorted(b), "counts": [b[le] for le in sorted(b)]} for s, b in sums.items()}
