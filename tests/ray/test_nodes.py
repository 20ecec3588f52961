"""The whole pipeline by `dualvla submit` on nodes that share no folder, all artefacts in S3: what one node gives.

`tests/nodes.py` makes the nodes, moto the store.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nodes
import pytest
import s3fs
from e2e.test_run import outcome
from nodes import Nodes, running_nodes
from s3_faults import moto_server

from dualvla_pipelines import lineage

pytestmark = [
    pytest.mark.slow,
    pytest.mark.sim,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not nodes.available(), reason="nodes of their own need the right to make namespaces (root)"),
]
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_DEFAULT_REGION": "us-east-1"}
_ARTEFACTS = ("*.parquet", "*.safetensors", "manifest.json", "run.json", "*.mp4")


@dataclass(frozen=True)
class Store:
    """A moto server with the bucket `runs`."""

    url: str

    def download(self, url: str, folder: Path) -> Path:
        fs = s3fs.S3FileSystem(endpoint_url=self.url, skip_instance_cache=True, use_listings_cache=False)
        for name in fs.find(url):
            target = folder / name.removeprefix(url.removeprefix("s3://") + "/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(fs.cat_file(name))
        return folder


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with pytest.MonkeyPatch.context() as patch, moto_server() as port:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        found = Store(f"http://127.0.0.1:{port}")
        s3fs.S3FileSystem(endpoint_url=found.url, skip_instance_cache=True).mkdir("runs")
        yield found


@pytest.fixture(scope="module")
def cluster(store: Store) -> Iterator[Nodes]:
    with running_nodes(2, **KEYS, AWS_ENDPOINT_URL=store.url) as found:
        yield found


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What the same command gives on this machine alone, in a local folder."""
    out = tmp_path_factory.mktemp("one") / "run"
    command = [sys.executable, "-m", "dualvla", "run", "--recipe", "debug", "--out", str(out)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return outcome(out)


def test_three_nodes_without_a_shared_folder_give_what_one_node_gives(
    cluster: Nodes, store: Store, one_node: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-m", "dualvla", "submit", "--json", "--address", cluster.head.address]
    command += ["--python", sys.executable, "--", "run", "--recipe", "debug", "--out", "s3://runs/three"]
    done = subprocess.run(command, env=cluster.head.env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    found = outcome(store.download("s3://runs/three", tmp_path / "run"))
    assert found.keys() == one_node.keys()
    assert [name for name in found if found[name] != one_node[name]] == []

    for node in cluster.nodes:  # nothing that a stage made lies on a node: not in its working folder, home or /tmp
        left = [p for pattern in _ARTEFACTS for p in node.folder.rglob(pattern) if "session_" not in str(p)]
        assert left == [], node.name
    sessions = [next(iter(node.folder.glob("ray/session_*"))) for node in cluster.nodes]
    assert len({s.parent.parent for s in sessions}) == 3  # each node has a temporary folder of its own
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
    records = lineage.find(["s3://runs/three"])
    assert all(r.folder.startswith("s3://") and r.finished for r in records)
    (dual,) = [r for r in records if r.folder.endswith("/dual")]
    assert all(node.record is not None for _, node in lineage.walk(lineage.lineage(dual, records)))
