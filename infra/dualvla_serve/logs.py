"""Structured logs: one JSON object a line on stderr. What a client sent, and keys, never become part of one."""

from __future__ import annotations

import logging
import sys

from dualvla.console import JsonFormatter

LOGGER = "dualvla.serve"


def use_json() -> None:
    """This process's logs of serving, as JSON on stderr, and nowhere else."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger(LOGGER)
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
