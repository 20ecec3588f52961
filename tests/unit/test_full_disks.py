"""What is said when no node has room: draining the last one would leave a job that waits for ever."""

from __future__ import annotations

import pytest
import ray

from dualvla.errors import PlatformError
from dualvla_cluster import full_disks


class FullDisks:
    def __init__(self, address: str) -> None: ...

    def free_disk_bytes(self) -> dict[str, float]:
        return {"one": 5e6, "two": 0.0}


def nodes(**cpus: float) -> list[dict[str, object]]:
    return [{"NodeID": name, "Alive": True, "Resources": {"CPU": number}} for name, number in cpus.items()]


def test_the_last_node_with_cpus_is_not_drained_but_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_disks, "Jobs", FullDisks)
    monkeypatch.setattr(ray, "nodes", lambda: nodes(head=0.0, one=2.0, two=2.0))
    with pytest.raises(PlatformError, match="every node with CPUs is full: one, two"):
        full_disks.drain("127.0.0.1:1")
    assert not full_disks._drained


def test_a_dashboard_that_does_not_answer_stops_nothing() -> None:
    full_disks.drain("127.0.0.1:1")
