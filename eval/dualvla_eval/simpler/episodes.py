"""Every numbered SimplerEnv episode by suite, task, variant and number. Knows the tables, no simulator."""

from __future__ import annotations

from dualvla_eval.simpler import widowx_tasks
from dualvla_eval.simpler.specs import EpisodeSetup


def setup(suite: str, task: str, variant: str, episode_id: int) -> EpisodeSetup:
    """A pure function of its arguments. Raises: UsageError for a task, variant or number that does not exist."""
    if suite == widowx_tasks.SUITE:
        return widowx_tasks.setup(task, episode_id)
    from dualvla_eval.simpler import google_tasks

    return google_tasks.setup(suite, task, variant, episode_id)
