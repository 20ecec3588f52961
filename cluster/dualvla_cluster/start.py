"""What a submitted job runs on the cluster: `python -m dualvla_cluster.start COMMAND...`.

Compares versions and looks secrets up, then runs the command as a shell would. Knows no command.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from dualvla import cli
from dualvla.errors import DualVLAError
from dualvla_cluster import secrets, shipping

EXPECTED = "DUALVLA_EXPECTED"


def main(argv: Sequence[str]) -> int:
    try:
        shipping.check(json.loads(os.environ.get(EXPECTED, "{}")))
        secrets.resolve()
    except DualVLAError as error:
        print(f"error: {error.message}\nfix: {error.fix}", file=sys.stderr)
        return error.exit_code
    return cli.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
