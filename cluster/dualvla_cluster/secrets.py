"""Secrets by reference: what travels with a job is where a secret lies on the cluster, never the secret.

    NAME=env:OTHER      the variable OTHER of the node's own environment (a Kubernetes secretKeyRef, say)
    NAME=file:/PATH     the content of a file on the node, such as a mounted secret

Each process of the job (driver and workers, on every node) looks them up for itself, into its environment. Knows no
secret store.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from dualvla.errors import PlatformError, UsageError

VARIABLE = "DUALVLA_SECRETS"
HOOK = "dualvla_cluster.secrets.resolve"  # for Ray's workers
_REFERENCE = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<kind>env|file):(?P<where>.+)")


def parse(texts: Iterable[str]) -> dict[str, str]:
    """`NAME=env:OTHER` or `NAME=file:/PATH` as name -> reference. Raises: UsageError, without repeating the value."""
    found = {}
    for text in texts:
        match = _REFERENCE.fullmatch(text)
        if match is None or (match["kind"] == "file" and not match["where"].startswith("/")):
            name = text.partition("=")[0]
            raise UsageError(
                f"--secret '{name}=...' is no reference.",
                f"write --secret {name}=env:VARIABLE or {name}=file:/PATH, as they are on the cluster",
            )
        found[match["name"]] = f"{match['kind']}:{match['where']}"
    return found


def resolve() -> None:
    """Puts every referenced secret into this process's environment. Raises: PlatformError naming what is not there."""
    for name, reference in json.loads(os.environ.get(VARIABLE, "{}")).items():
        kind, _, where = reference.partition(":")
        if kind == "env":
            value = os.environ.get(where)
        else:
            value = Path(where).read_text().rstrip("\n") if Path(where).is_file() else None
        if value is None:
            raise PlatformError(
                f"Secret {name}: there is no {'variable' if kind == 'env' else 'file'} '{where}' on this node.",
                "give it to every node of the cluster, or correct --secret",
            )
        os.environ[name] = value
