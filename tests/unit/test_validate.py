"""Validate: each thing that can be wrong with a data set is found, with its place; nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from inline import run_inline

from dualvla import cli
from dualvla.errors import DataError
from dualvla.io import dataset, manifest
from dualvla_pipelines import checks, validate

MakeDataset = Callable[..., str]
MakeRows = Callable[..., list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def _inline(monkeypatch: pytest.MonkeyPatch) -> None:
    run_inline(monkeypatch, validate)


def rewrite(folder: str, part: int, change: Callable[[pa.Table], pa.Table]) -> None:
    """Changes a part as its writer would have: the manifest agrees with it."""
    url = dataset.part_url(folder, part)
    dataset.write_table(url, change(dataset.read_table(url)))
    found = manifest.require(folder, dataset.KIND)
    facts = {name: found[name] for name in ("episodes", "rows_in", "rows_out", "rows_quarantined")}
    facts["files"] = found["files"] | {url.rsplit("/", 1)[-1]: manifest.file_digest(url)}
    manifest.finish(folder, dataset.KIND, found["config"], found["inputs"], **facts)


def set_row(row: int, **values: Any) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        rows = [r | {"images": dict(r["images"])} for r in table.to_pylist()]
        rows[row] |= values
        return dataset.rows_to_table(rows)

    return change


def test_a_fit_data_set_has_no_findings(make_dataset: MakeDataset) -> None:
    result = cli.call("validate", [make_dataset()])
    assert result["ok"]
    assert (result["rows"], result["episodes"], result["errors"], result["warnings"]) == (76, 10, 0, 0)
    assert result["findings"] == []


WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    ("finite", {"ee_pose": [np.nan] * 6}, "ee_pose is not finite", "error"),
    ("finite", {"action": [0.0, np.inf, 0, 0, 0, 0, 1]}, "action is not finite", "error"),
    ("units", {"ee_pose": [312.0, 0, 0, 0, 0, 0]}, "312 m from the base: millimetres for metres?", "error"),
    ("units", {"ee_pose": [0.3, 0, 0, 0, 0, 90.0]}, "90 rad: degrees for radians?", "error"),
    ("action range", {"action": [5.0, 0, 0, 0, 0, 0, 1]}, "one step moves 5 m", "error"),
    ("action range", {"action": [0, 0, 0, 15.0, 0, 0, 1]}, "one step turns 15 rad", "error"),
    ("gripper", {"gripper": [-1.0]}, "gripper is -1, not in [0, 1]: unknown convention", "error"),
    ("gripper", {"action": [0.0, 0, 0, 0, 0, 0, 100.0]}, "the gripper command is 100", "error"),
    ("image", {"images": {"main": b"\x89PNG\r\n\x1a\n cut"}}, "cannot be decoded", "error"),
    ("image", {"images": {}}, "there is no image", "error"),
    ("image", {"images": {"main": dataset.encode_png(np.zeros((9, 9, 3), np.uint8))}}, "changes to 9 x 9", "error"),
    ("gap", {"step": 9}, "step 9 follows step 4", "error"),
    ("order", {"step": 4}, "step 4 follows step 4", "error"),
    ("order", {"timestamp_s": 0.1}, "timestamp_s does not grow", "error"),
    ("gap", {"timestamp_s": 1.19}, "s pass before this step", "warning"),
    ("control rate", {"control_hz": 7.0}, "control_hz changes from 5", "error"),
    ("dimensions", {"ee_pose": [0.0] * 7}, "ee_pose has 7 numbers", "error"),
    ("dimensions", {"gripper": []}, "gripper has 0 numbers where ee_pose has 6", "error"),
    ("dimensions", {"ee_pose": [0.0] * 12, "gripper": [1.0, 1.0]}, "the number of arms changes", "error"),
    ("dimensions", {"action": [0.0] * 8}, "action has 8 numbers", "error"),
    ("dimensions", {"action_space": "joints"}, "action_space 'joints' is none of", "error"),
    ("domain", {"domain": "robots"}, "domain 'robots' is none of", "error"),
    ("episode_id", {"episode_id": None}, "there is no episode_id", "error"),
]


@pytest.mark.parametrize(("check", "values", "message", "severity"), WRONG)
def test_each_fault_is_found_at_its_place(
    make_dataset: MakeDataset, check: str, values: dict[str, Any], message: str, severity: str
) -> None:
    folder = make_dataset()
    rewrite(folder, 1, set_row(12 + 5, **values))  # the second episode's step 5
    result = cli.call("validate", [folder])
    assert result["ok"] == (severity == "warning")
    found = [f for f in result["findings"] if f["check"] == check and message in f["message"]]
    assert len(found) == 1, result["findings"]
    assert (found[0]["file"], found[0]["severity"]) == ("data/part-00001.parquet", severity)
    assert found[0]["step"] == values.get("step", 5)
    assert found[0]["episode_id"] == values.get("episode_id", "synthetic/robot/1-1")
    others = {f["check"] for f in result["findings"]} - {check}
    assert others <= {"gap", "order", "image"}, result["findings"]  # what follows from the same row


def test_a_whole_episode_in_other_units_or_at_another_rate_is_found(make_dataset: MakeDataset) -> None:
    folder = make_dataset(parts=1, episodes=1, questions=0)

    def slow(table: pa.Table) -> pa.Table:
        rows = [r | {"images": dict(r["images"]), "control_hz": 50.0} for r in table.to_pylist()]
        return dataset.rows_to_table(rows)

    rewrite(folder, 0, slow)
    result = cli.call("validate", [folder])
    assert result["ok"]
    assert result["counts"] == {"control rate": 1}
    assert result["findings"][0]["message"] == "timestamps are 0.2 s apart, control_hz says 0.02 s"


def test_openings_in_metres_are_doubted(make_dataset: MakeDataset) -> None:
    folder = make_dataset(parts=2)

    def in_metres(table: pa.Table) -> pa.Table:
        rows = [row | {"images": dict(row["images"])} for row in table.to_pylist()]
        return dataset.rows_to_table([row | {"gripper": row["gripper"] and [0.08]} for row in rows])

    for part in range(2):
        rewrite(folder, part, in_metres)
    result = cli.call("validate", [folder])
    assert result["ok"]
    assert result["counts"] == {"gripper": 1}
    assert "metres" in result["findings"][0]["message"]


def test_missing_columns_and_types_are_named(make_dataset: MakeDataset) -> None:
    folder = make_dataset(parts=1)

    def change(table: pa.Table) -> pa.Table:
        table = table.drop_columns(["split"])
        at = table.schema.get_field_index("action")
        return table.set_column(at, "action", table["action"].cast(pa.list_(pa.float64())))

    rewrite(folder, 0, change)
    result = cli.call("validate", [folder])
    messages = [f["message"] for f in result["findings"] if f["check"] == "schema"]
    assert messages == ["there is no column 'split'", "'action' is list<element: double>, not list<item: float>"] or (
        messages[0] == "there is no column 'split'" and "'action' is" in messages[1]
    )


def test_damaged_changed_and_unknown_files_are_named(make_dataset: MakeDataset) -> None:
    folder = make_dataset(parts=3)
    cut, changed = Path(dataset.part_url(folder, 0)), dataset.part_url(folder, 1)
    cut.write_bytes(cut.read_bytes()[:-50])
    dataset.write_table(changed, dataset.read_table(changed).slice(0, 12))
    extra = dataset.part_url(folder, 9)
    dataset.write_table(extra, dataset.read_table(dataset.part_url(folder, 2)).slice(0, 12))
    result = cli.call("validate", [folder])
    found = {(f["file"], f["message"].split(":")[0]) for f in result["findings"]}
    assert ("data/part-00000.parquet", "not a readable parquet file") in found
    assert ("data/part-00001.parquet", "its content is not what the manifest promises") in found
    assert ("data/part-00009.parquet", "the manifest does not name this file") in found
    assert any("is split between part-00002.parquet and part-00009.parquet" in f["message"] for f in result["findings"])
    assert any("readable rows, the manifest says 114" in f["message"] for f in result["findings"])


def test_long_lists_are_cut_but_counted(make_dataset: MakeDataset) -> None:
    folder = make_dataset(parts=1, episodes=1, questions=0, steps=40)
    rewrite(
        folder, 0,
        lambda table: dataset.rows_to_table(
            [r | {"images": dict(r["images"]), "gripper": [30.0]} for r in table.to_pylist()]
        ),
    )  # fmt: skip
    result = cli.call("validate", [folder, "--findings", "3"])
    assert result["counts"]["gripper"] == 41  # and the whole set's openings never change
    assert sum(f["check"] == "gripper" for f in result["findings"]) == 3
    assert cli.commands()["validate"].load().render(result).count("unknown convention") == 3


def test_an_unfinished_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a finished dataset"):
        cli.call("validate", [str(tmp_path)])


def test_an_empty_table_has_no_findings() -> None:
    assert checks.check_rows(dataset.rows_to_table([])) == []
