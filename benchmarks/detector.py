"""The learned event-boundary detector beside what needs no training: F1 at relative distance 0.05 to 0.5.

    python benchmarks/detector.py [--suite blocks] [--work runs/detector] [--out benchmarks/results/detector.json]

Makes the data, trains one detector and judges it on scenes it has not seen: for `blocks` with the usual camera and
light, and with a second camera and light that it has not seen either; for `simpler-widowx` (needs SimplerEnv's files)
with the tasks' one camera. What lies finished in --work is not made again. About half an hour of CPU each.
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
# Every data set: all tasks of the suite, episodes per task, seed, variant. Another seed shows other scenes.
TRAINED_ON = {
    "blocks": {"train-base": (100, 0, "base"), "train-varied": (100, 0, "varied")},
    "simpler-widowx": {"train": (40, 0, "base")},
}
JUDGED_ON = {
    "blocks": {"test-base": (60, 1, "base"), "test-second": (60, 1, "second")},
    "simpler-widowx": {"test": (20, 1, "base")},
}
SEEN = {
    "test-base": "tasks, camera and light as in training; scenes unseen",
    "test-second": "tasks as in training; camera, light, table and scenes unseen (training showed the usual camera and"
    " varied ones at least 20 degrees of azimuth away, and mirrored pictures of both)",
    "test": "tasks, camera and light as in training; scenes unseen",
}
# Nothing of the training data need be held out for tests; a tenth of many, or a seventh of few, sets the threshold.
SHARES = {"blocks": 0.1, "simpler-widowx": 0.15}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=sorted(TRAINED_ON), default="blocks")
    parser.add_argument("--work", type=Path, default=Path("runs/detector"), help="data sets and the detector")
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    arguments = parser.parse_args()
    console.setup_logging(verbose=False)
    trained_on, judged_on = TRAINED_ON[arguments.suite], JUDGED_ON[arguments.suite]
    settings = ["--set", "shares.test=0", "--set", f"shares.validation={SHARES[arguments.suite]}"]
    for name, (episodes, seed, variant) in {**trained_on, **judged_on}.items():
        scenes = ["--suite", arguments.suite, "--variant", variant, "--seed", str(seed), "--episodes", str(episodes)]
        cli.call("collect", [*scenes, "--workers", "1", "--out", str(arguments.work / name)])
    model = str(arguments.work / "detector")
    started = time.process_time()
    trained = cli.call("detector", ["train", *(str(arguments.work / name) for name in trained_on), model, *settings])
    cpu_s = time.process_time() - started
    result: dict[str, Any] = {
        "machine": MACHINE,
        "suite": arguments.suite,
        "trained": {key: trained[key] for key in ("episodes", "boundaries", "threshold", "validation")},
        "data": {name: {"episodes_per_task": e, "seed": s, "variant": v} for name, (e, s, v) in trained_on.items()},
        "judged": {},
    }
    if not trained["skipped"]:
        result["trained"]["cpu_s"] = round(cpu_s)
    for name in judged_on:
        judged = cli.call("detector", ["eval", model, str(arguments.work / name)])
        print(f"\n{name}: {SEEN[name]}", cli.parse("detector", ["eval", "", ""])[0].render(judged), sep="\n")
        facts = ("episodes", "frames", "boundaries", "relative_distances", "methods", "lead", "tasks")
        result["judged"][name] = {"seen": SEEN[name], **{key: judged[key] for key in facts}}
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
        logging.info("written to %s", arguments.out)


if __name__ == "__main__":
    main()
