"""Resume states appear whole or not at all, and damage costs no more than the steps since the one before."""

from dualvla_pipelines import resume


def save(root, step, text="state"):
    folder = resume.open_new(root, step)
    (folder / "inner").mkdir()
    (folder / "inner" / "state.pt").write_text(f"{text} {step}")
    resume.commit(folder, step, {"workers": 1})


def test_the_newest_of_the_last_two_is_found(tmp_path):
    assert resume.newest(tmp_path) is None
    for step in (2, 4, 10):
        save(tmp_path, step)
    found = resume.newest(tmp_path)
    assert (found.step, found.facts) == (10, {"workers": 1})
    assert (found.folder / "inner" / "state.pt").read_text() == "state 10"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_write_that_was_killed_is_never_seen(tmp_path):
    save(tmp_path, 2)
    (resume.open_new(tmp_path, 4) / "state.pt").write_text("half")
    assert resume.newest(tmp_path).step == 2
    save(tmp_path, 4)  # and does not stand in the way
    assert resume.newest(tmp_path).step == 4


def test_a_state_whose_hashes_disagree_is_passed_over(tmp_path):
    save(tmp_path, 2)
    save(tmp_path, 4)
    (tmp_path / "step-00000004" / "inner" / "state.pt").write_text("state 5")
    assert resume.newest(tmp_path).step == 2
    (tmp_path / "step-00000002" / "hashes.json").unlink()
    assert resume.newest(tmp_path) is None


def test_the_workers_of_a_killed_driver_do_not_write_into_the_next_ones_state(tmp_path):
    orphaned, ours = resume.open_new(tmp_path, 2), resume.open_new(tmp_path, 2)
    (ours / "state.pt").write_text("whole")
    (orphaned / "state.pt").write_text("hal")
    resume.commit(ours, 2, {})
    found = resume.newest(tmp_path)
    assert (found.folder / "state.pt").read_text() == "whole"
    resume.discard_unfinished(tmp_path)
    assert not orphaned.exists()
    assert resume.newest(tmp_path) == found
