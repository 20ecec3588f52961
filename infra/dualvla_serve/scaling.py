"""How many replicas: as many as keep the queue in front of each short. Named to Ray Serve by its import path.

Serve's own measure, ongoing requests, would count a WebSocket for as long as a robot is connected.
"""

from __future__ import annotations

import math
from typing import Any

METRIC = "waiting"  # what Replica reports through `record_autoscaling_stats`


def by_queue(context: Any) -> tuple[int, dict[str, Any]]:
    """context: ray.serve.config.AutoscalingContext; its `target_ongoing_requests` is the queue wanted per replica.

    Returns the wanted number of replicas (Serve clips it to its bounds and applies its delays) and the policy's state.
    """
    queued = sum((context.aggregated_metrics or {}).get(METRIC, {}).values())
    return wanted(queued, context.config.target_ongoing_requests), {}


def wanted(queued: float, target: float) -> int:
    return max(1, math.ceil(queued / target))
