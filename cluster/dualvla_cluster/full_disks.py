"""Nodes whose disk is full are taken out of the cluster: nothing can be set up on them, and Ray would go on trying.

Ray places work by CPUs and memory only, so that every stage would fail on such a node again and again. Draining it is
what Kubernetes does to a pod under disk pressure: it gets no more work, and leaves once it is idle. Knows no stage.
"""

from __future__ import annotations

import logging

import ray

from dualvla.errors import PlatformError
from dualvla_cluster.jobs import Jobs

log = logging.getLogger(__name__)

_LEAST_FREE_BYTES = 100e6  # below, not even our packages and a worker's log have room
_drained: set[str] = set()  # by this process: each is told once


def drain(dashboard: str) -> None:
    """Of the connected cluster. dashboard: HOST:PORT; where none answers, all nodes stay. The head is never drained.

    Raises: PlatformError if no node with CPUs is left.
    """
    try:
        free = Jobs(f"http://{dashboard}").free_disk_bytes()
    except PlatformError as error:
        log.debug("no word of the nodes' disks: %s", error)
        return
    full = {node: left for node, left in free.items() if left < _LEAST_FREE_BYTES and node not in _drained}
    if not full:
        return
    working = {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0.0) > 0}
    if working <= full.keys() | _drained:
        raise PlatformError(
            f"The disk of every node with CPUs is full: {', '.join(sorted(node[:8] for node in working))}.",
            "`dualvla runs clean` frees some, as does a smaller DUALVLA_CACHE_GB",
        )
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
    for node, left in full.items():
        why = f"its disk is full: {left / 1e6:.0f} MB are free"
        accepted, refusal = gcs.drain_node(node, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, why, 0)
        _drained.add(node)
        log.warning("node %s gets no more work, %s%s", node[:8], why, "" if accepted else f"; Ray refused: {refusal}")
