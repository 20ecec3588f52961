"""Resume states appear whole or not at all, and damage costs no more than the steps since the one before."""

from pathlib import Path

import pytest

from dualvla.io import storage
from dualvla_pipelines import resume


def everything(_):
    return True


def fill(root, step, text="state"):
    folder = Path(resume.open_new(root, step))
    (folder / "inner").mkdir()
    (folder / "inner" / "state.pt").write_text(f"{text} {step}")
    return folder


def save(root, step, text="state", keep=2):
    folder = fill(root, step, text)
    resume.commit(str(folder), step, resume.put(folder, str(folder), everything), {"workers": 1}, keep)


def newest(root, tmp_path):
    """(step, what is in it) of the newest whole state, or None."""
    for saved in resume.states(root):
        folder = resume.get(saved, saved.files, tmp_path / "scratch")
        if folder is not None:
            return saved.step, (folder / "inner" / "state.pt").read_text()
    return None


@pytest.fixture
def root(tmp_path):
    return str(tmp_path / "resume")


def test_the_newest_of_those_kept_is_found(root, tmp_path):
    assert newest(root, tmp_path) is None
    for step in (2, 4, 10):
        save(root, step)
    assert newest(root, tmp_path) == (10, "state 10")
    assert [saved.step for saved in resume.states(root)] == [10, 4]
    for step in (12, 14, 16):
        save(root, step, keep=3)
    assert [saved.step for saved in resume.states(root)] == [16, 14, 12]
    assert resume.states(root)[0].facts == {"workers": 1}


def test_a_write_that_was_killed_is_never_seen(root, tmp_path):
    save(root, 2)
    fill(root, 4, "half")
    assert newest(root, tmp_path) == (2, "state 2")
    save(root, 4)  # and does not stand in the way
    assert newest(root, tmp_path) == (4, "state 4")


@pytest.mark.parametrize("damage", [lambda file: file.write_text("state 5"), lambda file: file.unlink()])
def test_a_state_whose_hashes_disagree_is_passed_over(root, tmp_path, damage):
    save(root, 2)
    save(root, 4)
    damage(Path(resume.states(root)[0].url, "inner", "state.pt"))
    assert newest(root, tmp_path) == (2, "state 2")
    Path(resume.states(root)[1].url, "hashes.json").write_text("{")
    assert newest(root, tmp_path) is None


def test_an_old_state_whose_removal_was_killed_half_way_is_no_state(root, tmp_path, monkeypatch):
    save(root, 2)

    def killed(folder):
        next(Path(folder).rglob("*.pt")).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove_tree", killed)
        with pytest.raises(KeyboardInterrupt):
            save(root, 4, keep=1)
    assert [saved.step for saved in resume.states(root)] == [4]
    resume.discard_unfinished(root)
    assert len(list(Path(root).iterdir())) == 1


def test_only_what_a_worker_wants_is_looked_at(root, tmp_path):
    save(root, 2)
    (saved,) = resume.states(root)
    Path(saved.url, "inner", "state.pt").write_text("of another worker, and damaged")
    assert resume.get(saved, [], tmp_path) is not None
    assert resume.get(saved, saved.files, tmp_path) is None


def test_the_workers_of_a_killed_driver_do_not_write_into_the_next_ones_state(root, tmp_path):
    orphaned, ours = fill(root, 2, "hal"), fill(root, 2, "whole")
    resume.commit(str(ours), 2, resume.put(ours, str(ours), everything), {}, keep=2)
    (orphaned / "inner" / "more.pt").write_text("f")
    assert newest(root, tmp_path) == (2, "whole 2")
    resume.discard_unfinished(root)
    assert not orphaned.exists()
    assert newest(root, tmp_path) == (2, "whole 2")
