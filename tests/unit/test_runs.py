"""`dualvla runs`: lineage from a policy back to the raw rows by hashes; what retention lets go, and what never."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dualvla import cli
from dualvla.io import manifest
from dualvla_pipelines import lineage, retention
from dualvla_pipelines.retention import Retention


def make(folder: Path, kind: str, inputs: dict[str, Path] | None = None, age_days: float = 0.0, **config: Any) -> Path:
    """A finished folder with one file, and hashes of real inputs."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(folder.name.encode())
    digests = manifest.input_digests({name: str(path) for name, path in (inputs or {}).items()})
    manifest.begin(str(folder), kind, config, digests)
    files = {n: manifest.file_digest(folder / n) for n in ("config.json", "model.safetensors")}
    manifest.finish(str(folder), kind, config, digests, files=files)
    age(folder, age_days)
    return folder


def age(folder: Path, days: float) -> None:
    for file in folder.iterdir():
        os.utime(file, (time.time() - days * 86400,) * 2)


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """data -> pruned, specialist -> reasoning -> dual -> evaluation, as a run makes them."""
    root = tmp_path / "run"
    data = make(root / "data", "dataset")
    pruned = make(root / "pruned", "dataset", {"data": data})
    specialist = make(root / "specialist", "checkpoint", {"data": data}, stage="specialist")
    reasoning = make(root / "reasoning", "checkpoint", {"data": data, "init": specialist}, stage="reasoning")
    teachers = {"data": pruned, "init": reasoning, "action_teacher": specialist}
    dual = make(root / "dual", "checkpoint", teachers, stage="dual")
    make(root / "eval" / "compared", "evaluation", {"policy:dual": dual})
    return root


def ask(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any]]:
    code = cli.main(["runs", *argv, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_policy_leads_back_to_the_raw_rows(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = ask(capsys, "lineage", str(chain / "dual"))
    assert code == 0
    roles = {(link["role"], Path(link["folder"]).name) for link in found["lineage"]}
    assert ("action_teacher", "specialist") in roles
    assert ("data", "pruned") in roles
    assert ("data", "data") in roles
    deepest = max(found["lineage"], key=lambda link: link["depth"])
    assert Path(deepest["folder"]).name == "data"


def test_what_was_moved_is_found_and_what_was_changed_is_not_taken_for_it(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (chain / "data").rename(tmp_path / "elsewhere")
    code, found = ask(capsys, "lineage", str(chain / "specialist"))
    assert (code, found["lineage"][-1]["what"]) == (1, "in none of the roots")
    code, found = ask(capsys, "lineage", str(chain / "specialist"), "--root", str(tmp_path))
    assert (code, found["lineage"][-1]["folder"]) == (0, str(tmp_path / "elsewhere"))
    path = tmp_path / "elsewhere" / "manifest.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    assert ask(capsys, "lineage", str(chain / "specialist"), "--root", str(tmp_path))[0] == 1


def test_data_from_outside_end_the_chain_by_their_fingerprint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "data")
    inputs = {"source": "f" * 64}
    manifest.begin(folder, "dataset", {}, inputs)
    manifest.finish(folder, "dataset", {}, inputs, files={})
    code, found = ask(capsys, "lineage", folder)
    assert (code, found["lineage"][-1]["what"], found["lineage"][-1]["digest"]) == (0, "raw files", "f" * 64)


def test_a_damaged_file_in_the_chain_is_named(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (chain / "specialist" / "model.safetensors").write_bytes(b"other weights")
    assert ask(capsys, "lineage", str(chain / "dual"))[0] == 0
    code, found = ask(capsys, "lineage", str(chain / "dual"), "--verify")
    assert code == 1
    assert {tuple(link["damaged"]) for link in found["lineage"]} == {(), ("model.safetensors",)}


def test_the_version_an_endpoint_tells_names_its_checkpoint(chain: Path) -> None:
    from dualvla_serve.checkpoint import source

    records = lineage.find([str(chain)])
    assert lineage.served(source(str(chain / "reasoning")).version, records).folder == str(chain / "reasoning")


def test_nothing_is_deleted_without_yes_and_then_only_what_was_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(5):
        make(tmp_path / f"try-{number}", "checkpoint", age_days=5 - number, stage="specialist", seed=number)
    before = sorted(p.name for p in tmp_path.iterdir())
    _, shown = ask(capsys, "clean", str(tmp_path), "--keep", "2")
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert [Path(f["folder"]).name for f in shown["folders"]] == ["try-2", "try-1", "try-0"]
    assert all(f["bytes"] > 0 for f in shown["folders"])
    ask(capsys, "clean", str(tmp_path), "--keep", "2", "--yes")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["try-3", "try-4"]


def test_what_something_kept_was_made_from_stays_however_old(tmp_path: Path) -> None:
    old = make(tmp_path / "a", "checkpoint", age_days=900, stage="specialist")
    for number in range(4):
        make(tmp_path / f"b{number}", "checkpoint", age_days=number, stage="specialist", seed=number)
    student = make(tmp_path / "dual", "checkpoint", {"init": old}, stage="dual")
    gone = {Path(d.record.folder).name for d in retention.choose(lineage.find([str(tmp_path)]), Retention(keep=2))}
    assert gone == {"b2", "b3"}
    for number in range(3):  # newer duals: the old one goes, and with it the reason to keep its teacher
        make(tmp_path / f"dual-{number}", "checkpoint", stage="dual", seed=number)
    age(student, 30)
    gone = {Path(d.record.folder).name for d in retention.choose(lineage.find([str(tmp_path)]), Retention(keep=2))}
    assert gone >= {"a", "dual", "b2", "b3"}


@pytest.mark.parametrize(("days", "goes"), [(6.0, False), (8.0, True)])
def test_unfinished_folders_and_caches_go_by_age(
    tmp_path: Path, make_dataset: Callable[..., str], days: float, goes: bool
) -> None:
    manifest.begin(str(tmp_path / "half"), "checkpoint", {}, {})
    cache = make(tmp_path / "cache", "teacher-cache", age_days=days)
    make(tmp_path / "student", "checkpoint", {"teacher_cache": cache}, stage="dual")
    age(tmp_path / "half", days)
    rules = Retention(cache_days=7, unfinished_days=7)
    gone = {Path(d.record.folder).name for d in retention.choose(lineage.find([str(tmp_path)]), rules)}
    assert gone == ({"half", "cache"} if goes else set())


def test_an_unfinished_run_with_finished_stages_is_not_taken_away_whole(chain: Path) -> None:
    manifest.begin(str(chain), "run", {}, {})
    os.utime(chain / "started.json", (0, 0))
    assert retention.choose(lineage.find([str(chain)]), Retention()) == []


def test_the_list_tells_what_it_cost(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest.begin(str(chain), "run", {}, {})
    (chain / "run.json").write_text(
        json.dumps({"stages": {"train": {"wall_s": 90, "usd": 1.5}, "eval": {"wall_s": 30}}})
    )
    _, found = ask(capsys, "list", str(chain.parent))
    (run,) = [r for r in found["runs"] if r["kind"] == "run"]
    assert (run["wall_s"], run["usd"], run["finished"]) == (120.0, 1.5, False)
    assert len(found["runs"]) == 7
    assert cli.main(["runs", "list", str(chain.parent)]) == 0
    assert "$1.50" in capsys.readouterr().out
