"""What a job counts reaches a Prometheus that scrapes its node; dashboard and alerts ask for nothing else."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray_head import TOKEN, dualvla, free_ports, running_head

MONITORING = Path(__file__).parents[2] / "infra" / "monitoring"
_JOB = """#!/bin/sh
exec "{python}" - <<'END'
import logging, time
from dualvla import console
from dualvla_cluster.connect import connect
console.setup_logging(False)
connect()
with console.progress("pruning (parts)", 5) as advance:
    advance(2)
    for figure, amount in (("rows_out", 40), ("rows_quarantined", 3), ("samples", 64), ("retries", 1)):
        console.tell("pruning", figure, amount)
    logging.getLogger("dualvla").warning("a line of the log")
    time.sleep(600)
END
"""
_LONG_S = 8  # after which Ray has forgotten a gauge that is not set again
_NEED_A_GPU = {"ray_node_gram_used", "ray_node_gpus_utilization"}


def expressions() -> list[str]:
    board = json.loads((MONITORING / "pipelines.json").read_text())
    alerts = yaml.safe_load((MONITORING / "alerts.yml").read_text())
    rules = [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]] + rules


def scraped(port: int) -> dict[tuple[str, str | None], Any]:
    """(name, label `figure`) -> sample."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        page = answer.read().decode()
    found = [s for family in text_string_to_metric_families(page) for s in family.samples]
    return {(s.name, s.labels.get("figure")): s for s in found}


@pytest.mark.slow
def test_what_a_job_counts_is_scraped_and_is_all_that_is_asked_for(tmp_path: Path) -> None:
    import sys

    python = tmp_path / "python"
    python.write_text(_JOB.format(python=sys.executable))
    python.chmod(0o755)
    (port,) = free_ports(1)
    with running_head(metrics_port=port, RAY_metrics_report_interval_ms="500") as head:
        argv = ("submit", "--json", "--detach", "--address", head.address, "--env", "DUALVLA_LOG=json")
        sent = dualvla(head, *argv, "--python", str(python), "--", "report", "x")
        assert sent.returncode == 0, sent.stderr
        job = json.loads(sent.stdout)["id"]
        last = {(f"ray_dualvla_stage_{name}", figure) for name, figure in (("total", "retries"), ("remaining", None))}
        last |= {("ray_node_mem_used", None)}
        deadline, samples = time.monotonic() + 120, {}
        while missing := last - samples.keys():
            assert time.monotonic() < deadline, missing
            samples |= scraped(port)
            time.sleep(0.5)
        time.sleep(_LONG_S)
        while ("ray_dualvla_stage_remaining", None) not in scraped(port):
            assert time.monotonic() < deadline, "a stage that stands still is no longer told"
            time.sleep(0.5)
        values = {figure: s.value for (name, figure), s in samples.items() if name == "ray_dualvla_stage_total"}
        assert values == {"done": 2, "rows_out": 40, "rows_quarantined": 3, "samples": 64, "retries": 1}
        assert samples["ray_dualvla_stage_remaining", None].value == 3
        assert samples["ray_dualvla_stage_total", "done"].labels["run"] == job
        request = urllib.request.Request(
            f"{head.address}/api/prometheus/sd", headers={"Authorization": f"Bearer {TOKEN}"}
        )
        with urllib.request.urlopen(request) as answer:  # how prometheus.yml finds the nodes
            assert str(port) in answer.read().decode()
        logs = dualvla(head, "jobs", "logs", job, "--address", head.address).stdout
        (line,) = [json.loads(text) for text in logs.splitlines() if "a line of the log" in text]
        assert (line["run"], line["level"]) == (job, "WARNING")
        dualvla(head, "jobs", "stop", job, "--address", head.address)
    told = {name for name, _ in samples} | _NEED_A_GPU
    for expression in expressions():
        names = set(re.findall(r"\bray_\w+", expression))
        assert names
        assert names <= told, expression


def test_no_panel_lies_on_another() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in json.loads((MONITORING / "pipelines.json").read_text())["panels"]:
        at = panel["gridPos"]
        mine = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & mine, panel["title"]
        cells |= mine
