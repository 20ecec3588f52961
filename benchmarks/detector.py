"""The learned event-boundary detector beside what needs no training: F1 at relative distance 0.05 to 0.5.

    python benchmarks/detector.py [--work runs/detector] [--out benchmarks/results/detector.json]

Makes the data, trains one detector and judges it twice on scenes it has not seen: with the usual camera and light, and
with a second camera and light that it has not seen either. What lies finished in --work is not made again. About half
an hour of CPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("LP_NUM_THREADS", "1")  # before the renderer is loaded
os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core, so that the time of training means something

from dualvla import cli, console

MACHINE = "2 x86-64 cores, no GPU, Debian 12; training on 1 thread"
# Every data set: all five tasks, episodes per task, seed, variant. Another seed shows other scenes.
TRAINED_ON = {"train-base": (100, 0, "base"), "train-varied": (100, 0, "varied")}
JUDGED_ON = {"test-base": (60, 1, "base"), "test-second": (60, 1, "second")}
# Nothing of the training data need be held out for tests.
SETTINGS = ["--set", "shares.test=0", "--set", "shares.validation=0.1"]
SEEN = {
    "test-base": "tasks, camera and light as in training; scenes unseen",
    "test-second": "tasks as in training; camera, light, table and scenes unseen (training showed the usual camera and"
    " varied ones at least 20 degrees of azimuth away, and mirrored pictures of both)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/detector"), help="data sets and the detector")
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    arguments = parser.parse_args()
    console.setup_logging(verbose=False)
    for name, (episodes, seed, variant) in {**TRAINED_ON, **JUDGED_ON}.items():
        options = ["--episodes", str(episodes), "--seed", str(seed), "--variant", variant, "--workers", "1"]
        cli.call("collect", [*options, "--out", str(arguments.work / name)])
    model = str(arguments.work / "detector")
    started = time.process_time()
    trained = cli.call("detector", ["train", *(str(arguments.work / name) for name in TRAINED_ON), model, *SETTINGS])
    cpu_s = time.process_time() - started
    result: dict[str, Any] = {
        "machine": MACHINE,
        "trained": {key: trained[key] for key in ("episodes", "boundaries", "threshold", "validation")},
        "data": {name: {"episodes_per_task": e, "seed": s, "variant": v} for name, (e, s, v) in TRAINED_ON.items()},
        "judged": {},
    }
    if not trained["skipped"]:
        result["trained"]["cpu_s"] = round(cpu_s)
    for name in JUDGED_ON:
        judged = cli.call("detector", ["eval", model, str(arguments.work / name)])
        print(f"\n{name}: {SEEN[name]}", cli.parse("detector", ["eval", "", ""])[0].render(judged), sep="\n")
        facts = ("episodes", "frames", "boundaries", "relative_distances", "methods", "lead", "tasks")
        result["judged"][name] = {"seen": SEEN[name], **{key: judged[key] for key in facts}}
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
        logging.info("written to %s", arguments.out)


if __name__ == "__main__":
    main()
