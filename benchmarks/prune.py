"""`dualvla prune` beside the least that its work could cost, each ratio within one run.

    python benchmarks/prune.py [--only kinematics,files,detector,memory] [--gib 4.2] [--folder DIR] [--out FILE]

kinematics  Eq. 4 over episodes of 50 frames laid end to end, against a numpy loop over frames, on one core
files       `prune --mode action` with one worker, against only reading and writing the same parquet with pyarrow;
            and with two workers, against one; cpu_ratio: the same work on 20 parts in this process, without Ray, in
            CPU seconds, which other work on the machine hardly changes
detector    `prune --mode scene --detector` with two workers on half of the data, against that detector (the default
            size, untrained) in two processes on frames decoded beforehand
memory      peak of driver and workers (proportional set size) on the whole data set, against a tenth of it

The data set: --gib of 256 px JPEGs of about 13 KB, no two alike, 50 frames an episode, 25 episodes a part. Ray is up
before anything is timed; starting the workers, the manifest and the report are part of the time. Results are merged
into --out, so that the parts can be run one at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch are loaded
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # else workers give way to all that the baseline does not give way to

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dualvla.io import dataset, manifest
from dualvla.pruning import action_labels_ragged
from dualvla.schema import step_schema

RESULTS = Path(__file__).parent / "results" / "prune.json"
STEPS, EPISODES_PER_PART, SIZE = 50, 25, 256
SAMPLES_VLA_IT, EPISODES_LARGE = 650_000, 1_000_000


def kinematics(episodes: int = 20_000) -> dict[str, float]:
    rng = np.random.default_rng(0)
    pose = np.cumsum(rng.normal(scale=0.01, size=(episodes * STEPS, 6)), axis=0)
    gripper = (rng.random(episodes * STEPS) > 0.05).astype(float)
    lengths = np.full(episodes, STEPS)
    few = 200
    seconds = best_of(5, lambda: action_labels_ragged(pose, gripper, lengths))
    loop = best_of(2, lambda: [eq4_loop(pose[i : i + STEPS], gripper[i : i + STEPS]) for i in starts(few)])
    expected = np.concatenate([eq4_loop(pose[i : i + STEPS], gripper[i : i + STEPS]) for i in starts(few)])
    assert (expected == action_labels_ragged(pose, gripper, lengths)[: few * STEPS]).all()
    rate, loop_rate = episodes * STEPS / seconds, few * STEPS / loop
    return {"frames_per_cpu_s": rate, "loop_frames_per_cpu_s": loop_rate, "ratio": rate / loop_rate}


def starts(episodes: int) -> range:
    return range(0, episodes * STEPS, STEPS)


def eq4_loop(pose: np.ndarray, gripper: np.ndarray) -> np.ndarray:
    """The baseline: the rule with numpy, one frame after the other."""
    pose = np.concatenate([pose[:, :3], np.unwrap(pose[:, 3:], axis=0)], axis=1)
    norm = np.zeros(len(pose))
    for k in range(1, len(pose) - 1):
        norm[k] = np.linalg.norm(pose[k + 1] - 2 * pose[k] + pose[k - 1])
    norm[0], norm[-1] = norm[1], norm[-2]
    fires, state, mean = np.zeros(len(pose), dtype=bool), bool(gripper[0] >= 0.5), norm.mean()
    for k in range(len(pose)):
        now = True if gripper[k] > 0.55 else False if gripper[k] < 0.45 else state
        fires[k] = norm[k] > mean + 1e-9 or now != state
        state = now
    return fires


def best_of(times: int, work: Callable[[], Any]) -> float:
    """CPU seconds of the fastest of several runs."""
    found = []
    for _ in range(times):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found)


def files(data: str, scratch: Path) -> dict[str, float]:
    size = sum(os.path.getsize(file) for file in dataset.open_dataset(data).files) / 1e6
    read_and_write(data, scratch / "warm", parts=4)
    seconds = {
        "pyarrow_only": wall(lambda: read_and_write(data, scratch / "plain")),
        "one_worker": wall(lambda: prune(data, scratch / "one", workers=1)),
        "two_workers": wall(lambda: prune(data, scratch / "two", workers=2)),
    }
    return {
        "mb": size,
        "frames": frames_of(data),
        **{f"{name}_mb_per_s": size / s for name, s in seconds.items()},
        "one_worker_frames_per_s": frames_of(data) / seconds["one_worker"],
        "ratio": seconds["pyarrow_only"] / seconds["one_worker"],
        "cpu_ratio": cpu_ratio(data, scratch),
        "two_workers_ratio": seconds["one_worker"] / seconds["two_workers"],
    }


def cpu_ratio(data: str, scratch: Path, parts: int = 20) -> float:
    from dualvla_pipelines.prune import PartPruner, PruneConfig, PruneJob

    pruner = PartPruner(PruneJob(data, str(scratch / "cpu"), PruneConfig(mode="action")))
    names = [Path(file).name for file in dataset.open_dataset(data).files[:parts]]
    plain, pruned = [], []
    for _ in range(4):  # in turn, and the best of each: caches and neighbours change meanwhile
        plain.append(best_of(1, lambda: read_and_write(data, scratch / "cpu-plain", parts)))
        pruned.append(best_of(1, lambda: [pruner(name) for name in names]))
        shutil.rmtree(scratch / "cpu")
    return min(plain) / min(pruned)


def read_and_write(data: str, out: Path, parts: int | None = None) -> None:
    """What any program must do at least, in the settings in which data sets are written."""
    pa.set_cpu_count(1)
    out.mkdir()
    for file in dataset.open_dataset(data).files[:parts]:
        table = pq.read_table(file, use_threads=False)
        pq.write_table(table, out / Path(file).name, compression="zstd", row_group_size=4096)
    shutil.rmtree(out)


def detector(data: str, scratch: Path) -> dict[str, float]:
    """The own rate is that of two processes, like the workers, each on a part's frames at their full size."""
    import ray
    import torch

    from dualvla.pruning.ddm import KIND, DDMConfig, DDMNet, save_detector

    torch.manual_seed(0)
    folder = str(scratch / "detector")
    save_detector(folder, DDMNet(DDMConfig()), threshold=0.5, gap=1)
    manifest.finish(folder, KIND, {}, {})
    actors = [ray.remote(num_cpus=0.5)(OwnRate).remote(folder, data) for _ in range(2)]
    ray.get([actor.run.remote(1) for actor in actors])
    repeats = 3
    own = wall(lambda: ray.get([actor.run.remote(repeats) for actor in actors]))
    for actor in actors:
        ray.kill(actor)
    own_rate = 2 * repeats * STEPS * EPISODES_PER_PART / own
    half = write_subset(data, scratch / "half", len(dataset.open_dataset(data).files) // 2)
    rate = frames_of(half) / wall(lambda: prune(half, scratch / "scene", workers=2, mode="scene", detector=folder))
    return {"frames": frames_of(half), "own_frames_per_s": own_rate, "frames_per_s": rate, "ratio": rate / own_rate}


class OwnRate:
    def __init__(self, folder: str, data: str):
        from dualvla.pruning.ddm import load_detector
        from dualvla_pipelines.labelling import decode_frames

        self._detector = load_detector(folder)
        frames = decode_frames(dataset.read_table(dataset.open_dataset(data).files[0], ["images"])["images"])
        self._episodes = np.split(frames, EPISODES_PER_PART)

    def run(self, repeats: int) -> None:
        for _ in range(repeats):
            self._detector(self._episodes)


def memory(data: str, scratch: Path) -> dict[str, float]:
    """The tenth comes first, so that nothing is left over for it from the whole."""
    tenth = write_subset(data, scratch / "tenth", len(dataset.open_dataset(data).files) // 10)
    peaks = {}
    for name, source in (("tenth", tenth), ("whole", data)):
        with peak_pss_mb() as peak:
            prune(source, scratch / f"memory-{name}", workers=2)
        peaks[name] = peak()
    return {"tenth_mb": peaks["tenth"], "whole_mb": peaks["whole"], "ratio": peaks["whole"] / peaks["tenth"]}


@contextlib.contextmanager
def peak_pss_mb() -> Iterator[Callable[[], float]]:
    """Of this process and Ray's workers; Ray's own services are not ours to bound."""
    largest, stop = 0.0, threading.Event()

    def watch() -> None:
        nonlocal largest
        me = psutil.Process()
        while not stop.wait(0.1):
            total = 0
            for process in (me, *me.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process == me or (process.cmdline()[:1] and process.cmdline()[0].startswith("ray::")):
                        total += process.memory_full_info().pss
            largest = max(largest, total / 1e6)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: largest
    finally:
        stop.set()
        thread.join()


def prune(data: str, out: Path, workers: int, mode: str = "action", detector: str | None = None) -> None:
    from dualvla_pipelines.prune import PruneConfig
    from dualvla_pipelines.prune import prune as run
    from dualvla_pipelines.ray_parts import Workers

    result = run(data, str(out), PruneConfig(mode=mode), detector=detector, workers=Workers(workers))
    assert result["rows_in"] == result["rows_out"] == frames_of(data)
    shutil.rmtree(out)


def frames_of(data: str) -> int:
    return dataset.open_dataset(data).manifest["rows_out"]


def wall(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def make_data(folder: str, gib: float) -> None:
    """Skips what lies there finished."""
    if manifest.read(folder) is not None:
        return
    rng = np.random.default_rng(0)
    pictures = [jpeg(rng) for _ in range(STEPS)]
    rows = STEPS * EPISODES_PER_PART
    parts = round(gib * 2**30 / (rows * (len(pictures[0]) + 8)))
    manifest.begin(folder, dataset.KIND, {"gib": gib}, {})
    for part in range(parts):
        dataset.write_table(dataset.part_url(folder, part), make_part(part, pictures, rng))
    dataset.finish_dataset(folder, {"gib": gib}, {}, rows_in=parts * rows)


def jpeg(rng: np.random.Generator) -> bytes:
    """A smooth picture with some grain."""
    coarse = Image.fromarray(rng.integers(0, 255, (12, 12, 3)).astype(np.uint8)).resize((SIZE, SIZE))
    pixels = np.clip(np.asarray(coarse) + rng.normal(0, 5, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, format="JPEG", quality=85)
    return sink.getvalue()


def make_part(part: int, pictures: list[bytes], rng: np.random.Generator) -> pa.Table:
    rows = STEPS * EPISODES_PER_PART
    pose = np.cumsum(rng.normal(scale=0.01, size=(EPISODES_PER_PART, STEPS, 6)), axis=1).reshape(rows, 6)
    step = np.tile(np.arange(STEPS), EPISODES_PER_PART)
    columns = {
        "episode_id": [f"bench/{part * EPISODES_PER_PART + i // STEPS:08d}" for i in range(rows)],
        "step": step,
        "timestamp_s": step / 5,
        "control_hz": np.full(rows, 5.0),
        "split": ["train"] * rows,
        "domain": ["robot"] * rows,
        "task": [f"task {part % 10}"] * rows,
        "instruction": ["put the carrot on the plate"] * rows,
        # What follows a JPEG's end is ignored: no two are alike, and each is read and written in full.
        "images": [{"main": pictures[i % STEPS] + (part * rows + i).to_bytes(8, "big")} for i in range(rows)],
        "ee_pose": list(pose),
        "gripper": [[float(k % STEPS < 25)] for k in step],
        "proprio": list(pose.astype(np.float32)),
        "action": list(rng.normal(size=(rows, 7)).astype(np.float32)),
        "action_space": ["ee_delta_pose+gripper"] * rows,
        "motion_primitive": ["move left"] * rows,
        "reasoning": [
            f"the carrot is {v} cm away; move to it, then close the gripper" for v in rng.integers(0, 40, rows)
        ],
    }
    schema = step_schema()
    nothing = [None] * rows
    return pa.table([pa.array(columns.get(field.name, nothing), type=field.type) for field in schema], schema=schema)


def write_subset(data: str, out: Path, parts: int) -> str:
    """A data set of the first parts, which are linked and not copied."""
    manifest.begin(out_url := str(out), dataset.KIND, {"parts": parts}, {})
    (out / "data").mkdir()
    for file in dataset.open_dataset(data).files[:parts]:
        os.link(file, out / "data" / Path(file).name)
    dataset.finish_dataset(out_url, {"parts": parts}, {}, rows_in=parts * STEPS * EPISODES_PER_PART)
    return out_url


def costs(found: dict[str, Any]) -> dict[str, float]:
    """Core hours extrapolated from the measured rates, at 50 frames an episode."""
    rates = {}
    if "files" in found:
        rates["action_only"] = found["files"]["one_worker_frames_per_s"]
    if "detector" in found:
        rates["detector"] = found["detector"]["frames_per_s"] / 2
    amounts = {"vla_it": SAMPLES_VLA_IT, "million_episodes": EPISODES_LARGE * STEPS}
    return {f"{a}_{r}_core_h": n / rate / 3600 for a, n in amounts.items() for r, rate in rates.items()}


PARTS: dict[str, Callable[[str, Path], dict[str, float]]] = {
    "kinematics": lambda data, scratch: kinematics(),
    "files": files,
    "detector": detector,
    "memory": memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="which parts, separated by commas")
    parser.add_argument("--gib", type=float, default=4.2, help="size of the data set (GiB)")
    parser.add_argument("--folder", default=None, help="where the data set is made, or lies already")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        data = str(Path(arguments.folder or scratch) / "bench-data")
        if chosen != ["kinematics"]:
            from dualvla_cluster.connect import connect

            make_data(data, arguments.gib)
            connect()
        found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        found["machine"] = f"{os.cpu_count()} {platform.machine()} cores, no GPU, {platform.system()}"
        for name in chosen:
            found[name] = PARTS[name](data, Path(scratch)) | {"load_average": os.getloadavg()[0]}
            found["costs"] = costs(found)
            arguments.out.write_text(json.dumps(found, indent=2) + "\n")
            print(f"{name:12}", *(f"{value:12.2f} {key}" for key, value in found[name].items()), sep="  ", flush=True)


if __name__ == "__main__":
    main()
