"""What the rubric judge notices on suite `blocks`: `dualvla judge eval` over more than 100 real trajectories each.

    python benchmarks/judge_sensitivity.py [--episodes 60] [--out results/judge_sensitivity.json]

The scripted expert and the expert sent to any object roll out the same episodes; its successes are made worse in one
known way at a time. The baseline is each trajectory as it was recorded: the figures are paired differences in marks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

from dualvla import cli, console

_RESULT = Path(__file__).parent / "results" / "judge_sensitivity.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=60, help="of each of the five tasks and both policies")
    parser.add_argument("--out", default=str(_RESULT))
    arguments = parser.parse_args()
    console.setup_logging(verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        rollouts = ["--policy", "expert", "--policy", "expert-random-object", "--suite", "blocks", "--videos", "0"]
        cli.call("eval", [*rollouts, "--episodes", str(arguments.episodes), "--out", f"{folder}/eval"])
        started = time.perf_counter()
        command, parsed = cli.parse("judge", ["eval", f"{folder}/eval", "--trajectories", "200"])
        found = command.run(parsed)
        seconds = time.perf_counter() - started
    print(command.render(found))
    kept = {name: found[name] for name in ("judge", "n", "sensitivity", "safety", "interval")}
    machine = f"{os.cpu_count()} cores ({platform.machine()}), {platform.system()}, Python {platform.python_version()}"
    result = {"machine": machine, "episodes_per_task": arguments.episodes, "judging_s": round(seconds, 1), **kept}
    Path(arguments.out).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
