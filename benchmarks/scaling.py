"""How the stages scale: Ray's overhead by 10,000 no-op tasks of each stage's shape, and what follows on paper.

    python benchmarks/scaling.py [--tasks 10000] [--reuse] [--page docs/scaling.md] [--out FILE]

The projection is arithmetic over the overheads measured here, the rates in benchmarks/results, and assumptions that the
page lists. --reuse takes the overheads of the last run from FILE. Baseline: the same no-ops called in one process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualvla_cluster.resources import Profile, get_profile

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# What no benchmark here could measure, each with where it comes from.
FRAMES_PER_EPISODE = 36  # of bridge
STEPS_PER_EPISODE = 60  # of SimplerEnv's tasks, mean over WidowX and Google Robot
PARAMETERS = 2.2e9  # Eagle2-2B
TOKENS = 600  # of a sample: image, prompt, reasoning, queries
GPU_FLOPS = 312e12 * 0.35  # A100 bf16, and the share of it that a well-fed step reaches
TEACHER_FORWARDS = 1  # per sample without a cache: the teacher of its domain
SIM_STEPS_PER_S = 10.0  # SimplerEnv on one core: half of 17 to 23 measured on two (docs of the suite)
POLICY_HZ = 2.51  # published, A100, with language, no chunking
POLICY_BATCH_GAIN = 4.0  # of eight observations in one forward pass over eight of one: decoding is bound by memory
BATCH = 512
ROWS_PER_PART, ROWS_PER_LARGE_PART = 5_000, 50_000  # the latter are 0.6 GB
STORE_GB_PER_S = 10.0  # of an object store, all workers together
SETUP_S = 120.0  # image pulled, Ray joined, model loaded


class NoOp:
    """The shape of a worker: holds something, is given a small item, returns a small result."""

    def run(self, item: int) -> int:
        return item


class AsyncNoOp:
    async def run(self, item: int) -> int:
        return item


def measure(tasks: int, stages: Sequence[str] | None) -> dict[str, float]:
    """Stage -> seconds that one no-op costs, start-up left out. stages: only these."""
    import ray

    from dualvla_cluster import pool
    from dualvla_cluster.connect import connect

    connect(num_cpus=4)
    items = list(range(tasks))

    def through_pool(rules: pool.Rules, kind: type, actors: int) -> float:
        actor = ray.remote(num_cpus=0.1)(kind)
        if rules.slots > 1:
            actor = ray.remote(num_cpus=0.1, max_concurrency=rules.slots)(kind)
        started, first = 0.0, True
        for _ in pool.run(actor.remote, "run", items, num_actors=actors, rules=rules):
            if first:
                started, first = time.perf_counter(), False
        return (time.perf_counter() - started) / (tasks - 1)

    def data() -> float:
        """Parts as `dualvla prune` sends them: a name, a block, an actor."""
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        rows = ray.data.from_items([{"name": str(i)} for i in items], override_num_blocks=tasks).map(
            _Row, compute=ray.data.ActorPoolStrategy(size=2), num_cpus=0.2
        )
        started, first = 0.0, True
        for _ in rows.iter_rows():
            if first:
                started, first = time.perf_counter(), False
        return (time.perf_counter() - started) / (tasks - 1)

    def group() -> float:
        """Tasks in the bundles of a placement group, as training's workers are placed."""
        placed = ray.util.placement_group([{"CPU": 0.5}] * 2, strategy="PACK")
        ray.get(placed.ready())
        where = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(placed)
        task = ray.remote(num_cpus=0.5)(_nothing).options(scheduling_strategy=where)
        ray.get([task.remote(i) for i in range(8)])
        started = time.perf_counter()
        ray.get([task.remote(i) for i in items])
        took = (time.perf_counter() - started) / tasks
        ray.util.remove_placement_group(placed)
        return took

    shapes: dict[str, Callable[[], float]] = {
        "collect, ingest, teach": lambda: through_pool(pool.Rules(), NoOp, 2),
        "prune": data,
        "train": group,
        "eval": lambda: through_pool(pool.Rules(slots=8), AsyncNoOp, 2),
        "serve": lambda: _calls(tasks),
        "one process": lambda: _in_process(tasks),
    }
    return {stage: shape() for stage, shape in shapes.items() if stages is None or stage in stages}


class _Row:
    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        return row


def _nothing(item: int) -> int:
    return item


def _calls(tasks: int) -> float:
    """One after another to an asynchronous actor: what a Serve replica's handle costs at least."""
    import ray

    actor = ray.remote(num_cpus=0.1)(AsyncNoOp).remote()
    ray.get(actor.run.remote(0))
    started = time.perf_counter()
    for item in range(tasks):
        ray.get(actor.run.remote(item))
    return (time.perf_counter() - started) / tasks


def _in_process(tasks: int) -> float:
    worker = NoOp()
    started = time.perf_counter()
    for item in range(tasks):
        worker.run(item)
    return (time.perf_counter() - started) / tasks


@dataclass(frozen=True)
class Stage:
    """items of `item_s` seconds on one worker each, given out one at a time at `overhead_s`. usd_per_hour: of all.
    gigabytes: that cross to and from the store."""

    name: str
    items: float
    item_s: float
    workers: int
    overhead_s: float
    usd_per_hour: float
    gigabytes: float = 0.0

    @property
    def limits(self) -> dict[str, float]:
        """Seconds that each would need alone."""
        return {
            "start": SETUP_S,
            "workers": math.ceil(self.items / self.workers) * self.item_s,
            "driver": self.items * self.overhead_s,
            "store": self.gigabytes / STORE_GB_PER_S,
        }

    @property
    def bound(self) -> str:
        return max(self.limits, key=self.limits.__getitem__)

    @property
    def seconds(self) -> float:
        return SETUP_S + max(seconds for name, seconds in self.limits.items() if name != "start")

    @property
    def most_workers(self) -> float:
        """With more, the one process that gives work out is the limit."""
        return self.item_s / self.overhead_s

    @property
    def usd(self) -> float:
        return self.seconds / 3600 * self.usd_per_hour


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def project(overhead: dict[str, float]) -> dict[str, list[Stage]]:
    """Job -> its stages, on the built-in profiles."""
    prune = _read("prune")
    plain, learned = prune["files"]["one_worker_frames_per_s"], prune["detector"]["own_frames_per_s"]
    row_bytes = 1e6 * prune["files"]["mb"] / prune["files"]["frames"]
    gpus64, spot = get_profile("nodes:8"), get_profile("spot:8")
    dispatch = overhead["collect, ingest, teach"]
    token_flops = PARAMETERS * TOKENS / GPU_FLOPS
    step_s = BATCH * token_flops * (6 + 2 * TEACHER_FORWARDS)

    def in_parts(name: str, rows: float, part: int, rate: float, machines: Profile, each_s: float) -> Stage:
        workers, usd = machines.work("prune").workers, machines.usd_per_hour("prune")
        return Stage(name, rows / part, part / rate, workers, each_s, usd, gigabytes=2 * rows * row_bytes / 1e9)

    def trained(name: str, samples: float) -> Stage:
        # Steps are not given out one by one: every worker knows them; what they share is a batch.
        return Stage(name, samples / BATCH, step_s, 64, step_s / BATCH, gpus64.usd_per_hour("train"))

    vla_it = [
        in_parts("prune", 650e3, ROWS_PER_PART, learned, gpus64, overhead["prune"]),
        Stage("teach", 650e3 / 512, 512 * 2 * token_flops, 64, dispatch, gpus64.usd_per_hour("teach")),
        trained("train, one epoch", 650e3),
        trained("train, ten epochs", 6.5e6),
    ]
    rows = 10e6 * FRAMES_PER_EPISODE
    million = [
        in_parts("ingest", rows, ROWS_PER_LARGE_PART, 0.5 * plain, spot, dispatch),
        in_parts("prune", rows, ROWS_PER_LARGE_PART, plain, spot, overhead["prune"]),
        in_parts("prune, learned detector", rows, ROWS_PER_LARGE_PART, learned, spot, overhead["prune"]),
    ]
    episodes = 2950.0 * 10
    gpu_s = STEPS_PER_EPISODE / (POLICY_HZ * POLICY_BATCH_GAIN)
    sweep = [
        Stage("simulate (cores)", episodes, STEPS_PER_EPISODE / SIM_STEPS_PER_S, spot.work("collect").workers,
              overhead["eval"], spot.usd_per_hour("collect")),
        Stage("policy (GPUs)", episodes, gpu_s, 64, overhead["eval"], spot.usd_per_hour("eval")),
    ]  # fmt: skip
    return {
        "VLA-IT, 650 k samples, 64 GPUs (profile nodes:8)": vla_it,
        "10 million episodes (profile spot:8)": million,
        "2,950 episodes x 10 checkpoints (profile spot:8; both run at once, the slower counts)": sweep,
    }


def page(found: dict[str, Any]) -> str:
    overhead, jobs = found["overhead_s"], project(found["overhead_s"])
    lines = [
        "# How it scales, measured where it could be and calculated where not",
        "",
        "Made by `python benchmarks/scaling.py`; edit that. No cluster of this size was at hand: the projections are",
        "arithmetic over measured rates and overheads, and over the assumptions listed at the end.",
        "",
        f"## Ray's overhead ({found['tasks']:,} no-op tasks of each stage's shape)",
        "",
        f"{found['machine']}; load of other work {found['load_average']:.1f}. In one process a no-op costs "
        f"{1e6 * overhead['one process']:.2f} us.",
        "",
        "| stage | shape | ms a task | tasks a second |",
        "|---|---|---|---|",
    ]
    shapes = {
        "collect, ingest, teach": "an item to a pool of actors",
        "prune": "a block of one row through Ray Data to a pool of actors",
        "train": "a task in a bundle of a placement group",
        "eval": "an item to an asynchronous actor with 8 slots",
        "serve": "one call after another to an asynchronous actor",
    }
    lines += [f"| {s} | {shape} | {1e3 * overhead[s]:.2f} | {1 / overhead[s]:,.0f} |" for s, shape in shapes.items()]
    for job, stages in jobs.items():
        header = "| stage | items | s an item | workers | minutes | cost | bound by | driver feeds |"
        lines += ["", f"## {job}", "", header, "|---|---|---|---|---|---|---|---|"]
        for s in stages:
            limit = min(s.most_workers, s.items)
            lines.append(
                f"| {s.name} | {s.items:,.0f} | {s.item_s:.3g} | {s.workers} | {s.seconds / 60:.1f} | "
                f"${s.usd:,.0f} | {s.bound} | {limit:,.0f} workers |"
            )
    return "\n".join([*lines, "", _conclusions(jobs), _assumed()])


_CONCLUSIONS = """## Where it stops, and why

- **One process gives the work out.** A stage stops scaling when workers finish items faster than the driver hands
  them over (last column), or when there are fewer items than workers. Larger parts move the first limit out, bring
  the second nearer, and take memory: a worker holds one part.
- **Pruning VLA-IT is bound by starting up**: {parts:.0f} parts, {prune_s:.0f} s, of which {setup:.0f} s are images,
  Ray and models. On two cores the work itself takes minutes (benchmarks/results/prune.json).
- **Training is bound by the GPUs**, and cannot use more of them than a batch has samples. {train_h:.1f} h for ten
  epochs on 64 A100 (the base's published 12 h is of more data and an unpublished number of epochs). ZeRO-3
  gathers the parameters of every layer and scatters their gradients at each step, about 13 GB a GPU with 2.2 B
  parameters in bf16: links of 8 x 200 Gb/s hide that, plain Ethernet does not, and this stage then stops at one
  machine. None of it was measured here.
- **10 million episodes are bound by the {bound}**: {plain_min:.0f} min to prune, {learned_min:.0f} min with a learned
  detector, for {terabytes:.1f} TB in and as much out. The driver could feed {fed:,.0f} workers of that speed.
- **The sweep is bound by its {slower}**: {sweep_min:.0f} min. It cannot be cut below its longest episode and the start
  of a simulator.
"""

_ASSUMED = """## Assumed

- {frames} frames an episode (bridge); parts of {small:,.0f} rows, of {large:,.0f} for 10 million episodes; ingest takes
  twice the time of pruning.
- {billions:.1f} B parameters, {tokens} tokens a sample; 6 FLOP a parameter and token to train, 2 for each of {teachers}
  online teacher; 35 % of an A100's 312 TFLOP/s; a global batch of {batch:.0f}.
- SimplerEnv: {steps} steps an episode, {sim:.0f} steps a second and core; the policy {hz} Hz alone (published), and
  {gain:.0f} times that in batches of eight.
- {setup:.0f} s before a stage works; a store that gives and takes {bandwidth:.0f} GB/s in all. Prices are those
  of the built-in profiles (`dualvla deploy profile`).
"""


def _conclusions(jobs: dict[str, list[Stage]]) -> str:
    vla_it, million, sweep = jobs.values()
    slower = max(sweep, key=lambda stage: stage.seconds)
    return _CONCLUSIONS.format(
        parts=vla_it[0].items,
        prune_s=vla_it[0].seconds,
        setup=SETUP_S,
        train_h=vla_it[3].seconds / 3600,
        bound=million[1].bound,
        plain_min=million[1].seconds / 60,
        learned_min=million[2].seconds / 60,
        terabytes=million[1].gigabytes / 2000,
        fed=million[1].most_workers,
        slower=slower.name,
        sweep_min=slower.seconds / 60,
    )


def _assumed() -> str:
    return _ASSUMED.format(
        frames=FRAMES_PER_EPISODE,
        small=ROWS_PER_PART,
        large=ROWS_PER_LARGE_PART,
        billions=PARAMETERS / 1e9,
        tokens=TOKENS,
        teachers=TEACHER_FORWARDS,
        batch=BATCH,
        steps=STEPS_PER_EPISODE,
        sim=SIM_STEPS_PER_S,
        hz=POLICY_HZ,
        gain=POLICY_BATCH_GAIN,
        setup=SETUP_S,
        bandwidth=STORE_GB_PER_S,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--reuse", action="store_true", help="do not measure again")
    parser.add_argument("--stage", action="append", help="measure only this one again, and keep the others")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "scaling.md")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.json")
    arguments = parser.parse_args()
    if arguments.reuse:
        found = json.loads(arguments.out.read_text())
    else:
        kept = json.loads(arguments.out.read_text())["overhead_s"] if arguments.stage else {}
        found = {
            "machine": f"{os.cpu_count()} {platform.machine()} cores, no GPU, Python {platform.python_version()}",
            "load_average": os.getloadavg()[0],
            "tasks": arguments.tasks,
            "overhead_s": kept | measure(arguments.tasks, arguments.stage),
        }
        alone = found["overhead_s"]["one process"]
        found["ratio_to_one_process"] = {s: t / alone for s, t in found["overhead_s"].items() if t != alone}
    found["projection"] = {
        job: {
            s.name: {"hours": s.seconds / 3600, "usd": s.usd, "bound_by": s.bound, "driver_feeds": s.most_workers}
            for s in stages
        }
        for job, stages in project(found["overhead_s"]).items()
    }
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    arguments.page.write_text(page(found))
    for stage, seconds in found["overhead_s"].items():
        print(f"{stage:24} {1e3 * seconds:8.3f} ms a task")
    print(f"wrote {arguments.out} and {arguments.page}")


if __name__ == "__main__":
    main()
