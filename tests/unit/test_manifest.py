"""Manifests: a folder is claimed by one run, finished once, and never mistaken for another's."""

from pathlib import Path

import pytest

from dualvla.errors import DataError, OutputError
from dualvla.io import manifest

CONFIG, INPUTS = {"mode": "both", "seed": 0}, {"data": "aa"}


def test_begin_finish_skip(tmp_path: Path) -> None:
    folder = str(tmp_path / "out")
    assert manifest.begin(folder, "dataset", CONFIG, INPUTS)
    assert manifest.begin(folder, "dataset", CONFIG, INPUTS)  # unfinished: resume
    assert manifest.read(folder) is None
    manifest.finish(folder, "dataset", CONFIG, INPUTS, rows=3)
    assert not manifest.begin(folder, "dataset", dict(reversed(CONFIG.items())), INPUTS)
    assert manifest.require(folder, "dataset")["rows"] == 3


def test_a_finished_folder_keeps_nothing_that_a_killed_writer_left(tmp_path: Path) -> None:
    left = tmp_path / "out" / "videos" / ".film.mp4.0123abcd.tmp"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half a fil")
    (left.parent / ".hidden.tmp").write_bytes(b"somebody else's")
    manifest.finish(str(tmp_path / "out"), "dataset", CONFIG, INPUTS)
    assert [p.name for p in left.parent.iterdir()] == [".hidden.tmp"]


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("kind", "config", "inputs", "difference"),
    [
        ("dataset", CONFIG | {"seed": 1}, INPUTS, "config 'seed' is 0 there and 1 here"),
        ("dataset", CONFIG | {"extra": 1}, INPUTS, "config 'extra' is None there and 1 here"),
        ("dataset", CONFIG, {"data": "bb"}, "input 'data'"),
        ("report", CONFIG, INPUTS, "a dataset, not a report"),
    ],
)
def test_folder_of_another_run_is_refused(
    tmp_path: Path, finished: bool, kind: str, config: dict[str, object], inputs: dict[str, str], difference: str
) -> None:
    folder = str(tmp_path)
    manifest.begin(folder, "dataset", CONFIG, INPUTS)
    if finished:
        manifest.finish(folder, "dataset", CONFIG, INPUTS)
    with pytest.raises(OutputError, match=difference) as caught:
        manifest.begin(folder, kind, config, inputs)
    assert caught.value.exit_code == 2


def test_require_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        manifest.require(tmp_path / "nowhere", "dataset")
    with pytest.raises(DataError, match="not a finished dataset"):
        manifest.require(tmp_path, "dataset")
    manifest.finish(str(tmp_path), "checkpoint", {}, {})
    with pytest.raises(DataError, match="holds a checkpoint, not a dataset"):
        manifest.require(tmp_path, "dataset")
    (tmp_path / manifest.NAME).write_text('{"kind": "data')
    with pytest.raises(DataError, match="not valid JSON"):
        manifest.require(tmp_path, "dataset")


def test_input_digest_follows_every_file_of_the_input(tmp_path: Path) -> None:
    digests = []
    for content in ("one", "two"):
        manifest.finish(str(tmp_path), "dataset", {}, {}, files={"part": manifest.digest(content)})
        digests.append(manifest.input_digests({"data": str(tmp_path)}))
    assert digests[0] != digests[1]
