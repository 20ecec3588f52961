"""The Grafana dashboard asks only for what an endpoint tells: every metric, label and stage of it."""

import json
import re
import urllib.request
from importlib import resources

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from serve.local_endpoint import listening
from serve_fakes import example

from dualvla.client import PolicyClient
from dualvla.errors import DualVLAError

FOLDER = resources.files("dualvla_serve") / "monitoring"
_METRIC = re.compile(r"dualvla_serve_\w+")
_LABEL = re.compile(r"(\w+)\s*(?:=~|!=|=)\s*\"")
_BY = re.compile(r"by \(([\w, ]+)\)")


@pytest.fixture(scope="module")
def told() -> dict[str, set[str]]:
    """Sample -> its labels, of an endpoint that answered, refused and intervened."""
    with listening(embodiment="generic") as address:
        with PolicyClient(f"ws://{address}") as client:
            client.infer(example(200))  # an action of 200 m is out of range
            with pytest.raises(DualVLAError):
                client.infer(example(instruction="nan"))
        with urllib.request.urlopen(f"http://{address}/metrics") as answer:
            page = answer.read().decode()
    samples = [s for family in text_string_to_metric_families(page) for s in family.samples]
    return {sample.name: set(sample.labels) for sample in samples}


def expressions() -> list[str]:
    board = json.loads((FOLDER / "grafana.json").read_text())
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def test_every_query_finds_its_metric_and_labels(told: dict[str, set[str]]) -> None:
    for expression in expressions():
        names = _METRIC.findall(expression)
        assert names
        assert set(names) <= told.keys(), expression
        labels = set(_LABEL.findall(expression)) | {
            label.strip() for group in _BY.findall(expression) for label in group.split(",")
        }
        assert labels <= told[names[0]], expression


def test_every_metric_is_on_the_dashboard(told: dict[str, set[str]]) -> None:
    shown = {name for expression in expressions() for name in _METRIC.findall(expression)}
    families = {re.sub(r"_(bucket|sum|count|created|total)$", "", name) for name in told}
    missing = {f for f in families if not any(name.startswith(f) for name in shown)}
    assert not missing


def test_no_panel_lies_on_another() -> None:
    board = json.loads((FOLDER / "grafana.json").read_text())
    cells: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        mine = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & mine, panel["title"]
        cells |= mine


def test_the_scrape_job_is_yaml_and_names_no_key() -> None:
    (job,) = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert set(job["authorization"]) == {"type", "credentials_file"}
