"""`dualvla detector`: training that resumes to the same weights, and a judgement that keeps what was trained on out."""

import json

import numpy as np
import pytest
import torch

from dualvla import cli
from dualvla.errors import CheckpointError, DataError, OutputError, UsageError
from dualvla.io import dataset, manifest
from dualvla.pruning.ddm import load_detector
from dualvla_pipelines import detector
from dualvla_pipelines.clips import read_clips

SMALL = {
    "network.image_size": 16, "network.half_window": 2, "network.stem": 8, "network.widths": "[8, 16]",
    "network.depths": "[1, 1]", "network.levels": 2, "network.grid": 4, "network.dim": 16, "network.map_channels": 8,
    "network.queries": 2, "network.heads": 2, "shares.validation": 0.2, "shares.test": 0.2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(**more):
    return [part for key, value in {**SMALL, **more}.items() for part in ("--set", f"{key}={value}")]


def make_data(folder, rows_of, episodes, seed, frames=20):
    """A lamp goes on, and later another: the events. A large square moves at random all the while: it means nothing."""
    rng = np.random.default_rng(seed)
    rows = []
    for episode in range(episodes):
        steps = rows_of(f"lamps/{seed}/{episode:03d}", frames)
        events = np.sort(rng.choice(np.arange(3, frames - 2), 2, replace=False))
        while events[1] - events[0] < 4:
            events = np.sort(rng.choice(np.arange(3, frames - 2), 2, replace=False))
        for step, row in enumerate(steps):
            picture = np.full((16, 16, 3), 100, np.uint8)
            down, right = rng.integers(5, 12, 2)
            picture[down : down + 4, right : right + 4] = (220, 60, 60)
            for lamp, since in enumerate(events):
                picture[1:4, 2 + 6 * lamp : 5 + 6 * lamp] = (60, 200, 60) if step >= since else (60, 60, 60)
            row["images"] = {"main": dataset.encode_png(picture)}
            row["events"] = ["lamp:on"] if step in events else []
        rows += steps
    manifest.begin(folder, dataset.KIND, {"seed": seed}, {})
    dataset.write_table(dataset.part_url(folder, 0), dataset.rows_to_table(rows))
    dataset.finish_dataset(folder, {"seed": seed}, {}, rows_in=len(rows))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_rows):
    return make_data(str(tmp_path_factory.mktemp("lamps") / "data"), make_rows, 20, seed=0)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("detector") / "model")
    return out, cli.call("detector", ["train", data, out, *settings(steps=4, keep_every=2)])


def test_an_interrupted_training_goes_on_to_the_same_weights(trained, data, tmp_path, monkeypatch):
    out, _ = trained
    again = str(tmp_path / "again")
    keep = detector._keep

    def stop_after_the_first(*arguments):
        keep(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(detector, "_keep", stop_after_the_first)
        with pytest.raises(KeyboardInterrupt):
            cli.call("detector", ["train", data, again, *settings(steps=4, keep_every=2)])
    with pytest.raises(DataError, match="not a finished detector"):
        load_detector(again)
    kept = []
    with monkeypatch.context() as patch:
        patch.setattr(detector, "_keep", lambda *arguments: kept.append(arguments[-1]))
        cli.call("detector", ["train", data, again, *settings(steps=4, keep_every=2)])
    assert kept == [4]
    for name in ("model.safetensors", "config.json", "manifest.json"):
        with open(f"{out}/{name}", "rb") as one, open(f"{again}/{name}", "rb") as two:
            assert one.read() == two.read(), name


def test_a_finished_detector_is_left_alone_and_another_run_refused(trained, data):
    out, first = trained
    again = cli.call("detector", ["train", data, out, *settings(steps=4, keep_every=2)])
    assert again == {**first, "skipped": True}
    with pytest.raises(OutputError, match="belongs to another run"):
        cli.call("detector", ["train", data, out, *settings(steps=5)])


def test_a_damaged_resume_state_is_refused(data, tmp_path, monkeypatch):
    out = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(detector, "_fit", lambda *_: {}["stopped before the first epoch"])
        with pytest.raises(KeyError):
            cli.call("detector", ["train", data, str(out), *settings(steps=4, keep_every=2)])
    (out / "resume").mkdir()
    (out / "resume" / "state.safetensors").write_bytes(b"\x80\x04nothing")
    with pytest.raises(CheckpointError, match="is damaged"):
        cli.call("detector", ["train", data, str(out), *settings(steps=4, keep_every=2)])


def test_what_was_trained_on_is_left_out_of_the_judgement(trained, data, tmp_path, make_rows):
    out, counts = trained
    result = cli.call("detector", ["eval", out, data])
    assert (result["episodes"], result["episodes_left_out"]) == (4, 16)
    assert counts["episodes"] == {"train": 12, "validation": 4}
    other = make_data(str(tmp_path / "other"), make_rows, 3, seed=1)
    assert cli.call("detector", ["eval", out, other])["episodes"] == 3


def test_the_judgement_is_whole_and_its_parts_agree(trained, data, capsys):
    assert cli.main(["detector", "eval", trained[0], data, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["methods"]) == {"detector", "self-similarity", "frame differences", "every k-th frame"}
    for name, method in result["methods"].items():
        assert len(method["f1_curve"]) == len(result["relative_distances"]) == 10
        assert method["f1_curve"][0] == method["f1"]
        if name != "detector":
            lead = result["lead"][name]
            assert lead["f1"] == pytest.approx(result["methods"]["detector"]["f1"] - method["f1"])
            assert lead["low"] <= lead["f1"] <= lead["high"]
    assert result["boundaries"] == 2 * result["episodes"]
    assert cli.main(["detector", "eval", trained[0], data]) == 0
    assert "every k-th frame" in capsys.readouterr().out


def test_nothing_to_learn_from_is_an_error(make_dataset, tmp_path):
    with pytest.raises(DataError, match="no boundary"):
        cli.call("detector", ["train", make_dataset(), str(tmp_path / "out"), *settings()])
    with pytest.raises(UsageError, match="did you mean"):
        cli.call("detector", ["train", make_dataset("other"), str(tmp_path / "new"), "--set", "step=3"])


@pytest.mark.slow
def test_it_learns_which_changes_matter(make_rows, tmp_path):
    """The square's jumps are all that frame differences see; the lamps are what was learned."""
    folders = [make_data(str(tmp_path / str(seed)), make_rows, n, seed) for seed, n in ((2, 80), (3, 30))]
    model = str(tmp_path / "model")
    cli.call("detector", ["train", folders[0], model, *settings(steps=250, keep_every=50, learning_rate=0.002)])
    result = cli.call("detector", ["eval", model, folders[1]])
    assert result["methods"]["detector"]["f1"] > 0.8
    assert all(lead["low"] > 0.15 for lead in result["lead"].values()), result["lead"]
    fires = load_detector(model)([clip.frames for clip in read_clips(folders[1], detector.BoundaryRule())])
    assert 0.05 < np.mean(np.concatenate(fires)) < 0.4
