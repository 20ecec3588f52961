"""The whole pipeline by `dualvla submit` on nodes that share no folder, all artefacts in S3: what one node gives, and
the same whatever is lost meanwhile.

`tests/nodes.py` makes the nodes, moto the store, a proxy before it the store's absence.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nodes
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import s3fs
from e2e.test_run import outcome
from nodes import Node, Nodes, running_nodes
from ray_head import free_ports
from s3_faults import FaultPlan, fault_proxy, moto_server

from dualvla.client import ClientOptions, PolicyClient
from dualvla.errors import ServerError
from dualvla.io.dataset import decode_image
from dualvla.schema import Observation
from dualvla_pipelines import lineage

pytestmark = [
    pytest.mark.slow,
    pytest.mark.sim,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not nodes.available(), reason="nodes of their own need the right to make namespaces (root)"),
]
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_DEFAULT_REGION": "us-east-1"}
_ARTEFACTS = ("*.parquet", "*.safetensors", "manifest.json", "run.json", "*.mp4")
_PATIENCE_S = 900.0
_AWAY_S = 30.0
_SMALL_DISK_MB = 500
_SLOW_SHARE = 0.4


@dataclass(frozen=True)
class Store:
    """A moto server with the bucket `runs`, behind a proxy that can take it away."""

    url: str
    plan: FaultPlan

    def download(self, url: str, folder: Path) -> Path:
        fs = s3fs.S3FileSystem(endpoint_url=self.url, skip_instance_cache=True, use_listings_cache=False)
        for name in fs.find(url):
            target = folder / name.removeprefix(url.removeprefix("s3://") + "/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(fs.cat_file(name))
        return folder


class Submitted:
    """`dualvla submit -- COMMAND` in a process of its own, and what it prints."""

    def __init__(self, cluster: Nodes, log: Path, *command: str):
        argv = [sys.executable, "-m", "dualvla", "submit", "--json", "--address", cluster.head.address]
        argv += ["--python", sys.executable, "--", *command]
        self.log = log
        with log.open("ab") as sink:
            self._before = sink.tell()
            self._process = subprocess.Popen(argv, env=cluster.head.env, stdout=sink, stderr=sink)

    def said(self) -> str:
        return self.log.read_bytes()[self._before :].decode(errors="replace")

    def wait_for(self, pattern: str) -> str:
        """What it printed that fits, once it has."""
        self.wait_until(lambda: re.search(pattern, self.said()) is not None)
        found = re.search(pattern, self.said())
        assert found is not None
        return found[0]

    def wait_until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not true():
            assert self._process.poll() is None, self.said()[-6000:]
            assert time.monotonic() < deadline, self.said()[-6000:]
            time.sleep(0.05)

    def end(self) -> int:
        return self._process.wait(_PATIENCE_S)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@dataclass(frozen=True)
class Clean:
    """A run that nothing happened to. url: where it lies in the store."""

    url: str
    found: dict[str, object]
    took_s: float


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    plan = FaultPlan()
    with pytest.MonkeyPatch.context() as patch, moto_server() as port, fault_proxy(port, plan) as url:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem(endpoint_url=url, skip_instance_cache=True).mkdir("runs")
        yield Store(url, plan)


@pytest.fixture
def cluster(store: Store) -> Iterator[Nodes]:
    with running_nodes(2, **KEYS, AWS_ENDPOINT_URL=store.url) as found:
        yield found


@pytest.fixture(scope="module")
def clean(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Clean:
    folder = tmp_path_factory.mktemp("clean")
    with running_nodes(2, **KEYS, AWS_ENDPOINT_URL=store.url) as cluster:
        started = time.monotonic()
        run = pipeline(cluster, folder / "log", "s3://runs/clean")
        assert run.end() == 0, run.said()[-6000:]
        took_s = time.monotonic() - started
        for node in cluster.nodes:  # nothing that a stage made lies on a node: not in its working folder, home or /tmp
            left = [p for pattern in _ARTEFACTS for p in node.folder.rglob(pattern) if "session_" not in str(p)]
            assert left == [], node.name
        sessions = [next(iter(node.folder.glob("ray/session_*"))) for node in cluster.nodes]
        assert len({s.parent.parent for s in sessions}) == 3  # each node has a temporary folder of its own
    return Clean("s3://runs/clean", outcome(store.download("s3://runs/clean", folder / "run")), took_s)


def pipeline(cluster: Nodes, log: Path, out: str) -> Submitted:
    return Submitted(cluster, log, "run", "--recipe", "debug", "--out", out)


def the_same(store: Store, out: str, expected: dict[str, object], folder: Path) -> None:
    found = outcome(store.download(out, folder))
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def content(folder: Path, pattern: str) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.glob(pattern) if f.is_file()}


def test_three_nodes_without_a_shared_folder_give_what_one_node_gives(
    clean: Clean, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-m", "dualvla", "run", "--recipe", "debug", "--out", str(tmp_path / "run")]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    one_node = outcome(tmp_path / "run")
    assert clean.found.keys() == one_node.keys()
    assert [name for name in one_node if clean.found[name] != one_node[name]] == []

    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
    records = lineage.find([clean.url])
    assert all(r.folder.startswith("s3://") and r.finished for r in records)
    (dual,) = [r for r in records if r.folder.endswith("/dual")]
    assert all(node.record is not None for _, node in lineage.walk(lineage.lineage(dual, records)))


def at_work(run: Submitted, cluster: Nodes, title: str) -> Node:
    """The worker node that holds a process of such a title, once one does."""

    def found() -> list[Node]:
        alive = [node for node in cluster.nodes[1:] if node.process.poll() is None]
        return [node for node in alive if any(map(re.compile(title).match, node.works_at()))]

    run.wait_until(lambda: bool(found()))
    return found()[0]


@dataclass(frozen=True)
class Scene:
    """A pipeline that runs, and what it runs on. out: where it writes."""

    run: Submitted
    cluster: Nodes
    store: Store
    out: str

    def wait_for_stage(self, name: str) -> None:
        self.run.wait_for(rf"\[\d+/\d+\] {name}\n")

    def wait_for_file(self, below: str) -> None:
        """Of the run's folder."""
        prefix = f"/{self.out.removeprefix('s3://')}/{below}/"
        self.run.wait_until(lambda: bool(self.store.plan.puts(prefix)))


Strike = Callable[[Scene], None]


def lose_a_worker(stage: str, title: str, after: str) -> Strike:
    """In the midst of the stage, once a file of it lies below `after`; and bring another, as an autoscaler does."""

    def strike(scene: Scene) -> None:
        scene.wait_for_stage(stage)
        scene.wait_for_file(after)
        at_work(scene.run, scene.cluster, title).lose()
        scene.cluster.add()

    return strike


def take_the_store_away(stage: str) -> Strike:
    def strike(scene: Scene) -> None:
        scene.wait_for_stage(stage)
        scene.store.plan.take_away(_AWAY_S)

    return strike


IN_PRUNE = lose_a_worker("prune", r"ray::MapWorker", "pruned/data")
IN_TRAIN = lose_a_worker("specialist", r"ray::RayTrainWorker", "specialist/resume")
IN_EVAL = lose_a_worker("eval compared", r"ray::SimulatorImpl", "eval/compared/parts")


def kill_the_driver(scene: Scene) -> None:
    scene.wait_for_stage("reasoning")
    on_head = psutil.Process(scene.cluster.nodes[0].process.pid).children(recursive=True)
    (driver,) = (p for p in on_head if p.cmdline()[1:3] == ["-m", "dualvla_cluster.start"])
    driver.kill()


def lose_the_head(scene: Scene) -> None:
    scene.wait_for_stage("reasoning")
    for node in scene.cluster.nodes:  # without it the others are of no use
        node.lose()


@contextlib.contextmanager
def nothing(cluster: Nodes) -> Iterator[None]:
    yield


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.5)


@contextlib.contextmanager
def full_disk(cluster: Nodes) -> Iterator[None]:
    cluster.nodes[-1].lose()
    node = cluster.add(disk_mb=_SMALL_DISK_MB)
    wait_until(lambda: len(nodes.free_disks(cluster.head)) == len(cluster.nodes) - 1)  # it tells, and will go on
    node.fill_disk()
    wait_until(lambda: min(nodes.free_disks(cluster.head)) < 1e6)
    yield


@contextlib.contextmanager
def slow_node(cluster: Nodes) -> Iterator[None]:
    with cluster.nodes[-1].slowed(_SLOW_SHARE):
        yield


@pytest.mark.soak
@pytest.mark.parametrize(
    ("state", "strikes"),
    [
        pytest.param(nothing, [IN_PRUNE], id="a node lost in prune"),
        pytest.param(nothing, [IN_TRAIN], id="a node lost in train"),
        pytest.param(nothing, [IN_EVAL], id="a node lost in eval"),
        pytest.param(nothing, [take_the_store_away("eval compared")], id="S3 down for 30 s"),
        pytest.param(full_disk, [], id="a node with a full disk"),
        pytest.param(slow_node, [], id="a slow node"),
    ],
)
def test_what_passes_or_is_lost_costs_time_only(
    state: Callable[[Nodes], contextlib.AbstractContextManager[None]],
    strikes: list[Strike],
    clean: Clean,
    cluster: Nodes,
    store: Store,
    tmp_path: Path,
) -> None:
    out = f"s3://runs/{tmp_path.name}"
    with state(cluster):
        started = time.monotonic()
        run = pipeline(cluster, tmp_path / "log", out)
        for strike in strikes:
            strike(Scene(run, cluster, store, out))
        assert run.end() == 0, run.said()[-6000:]
    assert time.monotonic() - started < 2 * clean.took_s + 60
    the_same(store, out, clean.found, tmp_path / "run")


@pytest.mark.soak
@pytest.mark.parametrize("strike", [kill_the_driver, lose_the_head])
def test_what_ends_the_job_is_mended_by_the_same_command(
    strike: Strike, clean: Clean, cluster: Nodes, store: Store, tmp_path: Path
) -> None:
    out = f"s3://runs/{tmp_path.name}"
    started = time.monotonic()
    run = pipeline(cluster, tmp_path / "log", out)
    strike(Scene(run, cluster, store, out))
    assert run.end() != 0
    assert "Traceback" not in run.said()
    took_s = time.monotonic() - started
    with contextlib.ExitStack() as stack:
        if strike is lose_the_head:
            cluster = stack.enter_context(running_nodes(2, **KEYS, AWS_ENDPOINT_URL=store.url))
        started = time.monotonic()
        run = pipeline(cluster, tmp_path / "log", out)
        assert run.end() == 0, run.said()[-6000:]
    assert took_s + time.monotonic() - started < 2 * clean.took_s + 60
    the_same(store, out, clean.found, tmp_path / "run")


def test_s3_down_for_half_a_minute_changes_no_byte_of_what_is_pruned(
    clean: Clean, cluster: Nodes, store: Store, tmp_path: Path
) -> None:
    out = f"s3://runs/{tmp_path.name}/pruned"
    run = Submitted(cluster, tmp_path / "log", "prune", f"{clean.url}/data", out, "--workers", "2")
    at_work(run, cluster, r"ray::MapWorker")
    store.plan.take_away(_AWAY_S)
    assert run.end() == 0, run.said()[-6000:]
    assert "503" in store.plan.faults()
    pruned = {name: content for name, content in clean.found.items() if name.startswith("pruned/")}
    found = content(store.download(out, tmp_path / "pruned"), "data/*.parquet")
    assert {f"pruned/{name}": data for name, data in found.items()} == pruned


def test_a_node_lost_in_teach_changes_no_byte_of_the_cache(
    clean: Clean, cluster: Nodes, store: Store, tmp_path: Path
) -> None:
    teachers = ["--action-teacher", f"{clean.url}/specialist", "--reasoning-teacher", f"{clean.url}/reasoning"]

    def teach(out: str) -> Submitted:
        log = tmp_path / "log"
        return Submitted(cluster, log, "teach", f"{clean.url}/pruned", out, *teachers, "--workers", "2")

    run = teach("s3://runs/taught")
    assert run.end() == 0, run.said()[-6000:]
    run = teach("s3://runs/taught-again")
    at_work(run, cluster, r"ray::(MapWorker|TeachWorker)").lose()
    cluster.add()
    assert run.end() == 0, run.said()[-6000:]
    first, again = (content(store.download(f"s3://runs/{n}", tmp_path / n), "**/*") for n in ("taught", "taught-again"))
    assert again == first


def observations(clean: Clean) -> list[Observation]:
    """Five that the policy may be asked about."""
    part = clean.found["data/data/part-00000.parquet"]
    assert isinstance(part, bytes)
    rows = [row for row in pq.read_table(io.BytesIO(part)).to_pylist() if row["domain"] == "robot"][:5]
    return [
        Observation(
            {name: decode_image(image) for name, image in dict(row["images"]).items()},
            row["instruction"],
            np.array(row["proprio"], np.float32),
            id=str(row["step"]),
        )
        for row in rows
    ]


def replicas(cluster: Nodes) -> int:
    titles = [title for node in cluster.nodes if node.process.poll() is None for title in node.works_at()]
    return sum(title.startswith("ray::ServeReplica") for title in titles)


def test_a_node_lost_in_serve_costs_robots_a_pause_and_no_answer(
    clean: Clean, cluster: Nodes, store: Store, tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    options = ["--replicas", "2", "--cpus", "1", "--port", str(port), "--state-dir", "s3://runs/state"]
    run = Submitted(cluster, tmp_path / "log", "serve", f"{clean.url}/dual", *options)
    try:
        run.wait_for(rf"ws://127\.0\.0\.1:{port}")
        with PolicyClient(f"ws://127.0.0.1:{port}", options=ClientOptions(attempts=10)) as client:

            def ask(observation: Observation) -> np.ndarray | None:
                client.reset()  # so that answers do not depend on what was asked before
                try:
                    return client.infer(observation)["actions"]
                except ServerError:
                    return None

            asked = observations(clean)
            before = [ask(observation) for observation in asked]
            at_work(run, cluster, r"ray::ServeReplica").lose()
            for observation, expected in zip(asked, before, strict=True):
                assert expected is not None
                deadline = time.monotonic() + 120
                while (answer := ask(observation)) is None:
                    assert time.monotonic() < deadline
                np.testing.assert_array_equal(answer, expected)
            cluster.add()
            run.wait_until(lambda: replicas(cluster) == 2)  # the second on either node
    finally:
        run.kill()
