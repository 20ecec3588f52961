"""The report: what policies said stays text, every folder finds its place, and a second run changes nothing."""

import json
import re
from dataclasses import replace

import pytest
from eval_fakes import FakePolicy, SayingPolicy, fake_suite, run_items_here

from dualvla.errors import DataError, OutputError, UsageError
from dualvla.io import manifest
from dualvla_eval import sweep
from dualvla_eval.judges import get_judge
from dualvla_eval.policies import PolicyRef
from dualvla_eval.report.site import write_report
from dualvla_eval.score import score_folder

EVIL = '<script>document.title="owned"</script><img src=x onerror="document.title=1">'


class Silent(SayingPolicy):
    def __init__(self):
        super().__init__(None)

    def reply(self, observation, session):
        return replace(super().reply(observation, session), keyframe=False, reasoning_tokens=0)


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Evaluates a policy on the fake suite into tmp_path/run/NAME."""
    monkeypatch.setattr(sweep, "_run_items", run_items_here)

    def go(name, policy, control=False):
        folder = str(tmp_path / "run" / name)
        ref = PolicyRef(name, "expert-random-object" if control else "expert")
        config = sweep.SweepConfig({"touch": 3}, videos_per_task=1)
        sweep.run_sweep(folder, fake_suite(), [ref], config, workers=1, load_policy=lambda *_, **__: policy)
        return folder

    return go


def write_checkpoint(folder):
    folder.mkdir(parents=True)
    lines = [{"step": i, "loss": 1 / i, "flow": 0.5 / i, "kd": 0.0, "lr": 1e-3} for i in range(1, 400)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    manifest.begin(str(folder), "checkpoint", {}, {})
    manifest.finish(str(folder), "checkpoint", {}, {})


def page_of(tmp_path):
    return (tmp_path / "report" / "index.html").read_text()


def test_a_run_folder_becomes_one_page(tmp_path, evaluate):
    score_folder(evaluate("mine", FakePolicy()), get_judge("rubric"))
    evaluate("lost", FakePolicy(), control=True)
    write_checkpoint(tmp_path / "run" / "specialist")
    result = write_report([str(tmp_path / "run")], str(tmp_path / "report"))
    page = page_of(tmp_path)
    assert result["index"].endswith("report/index.html")
    controls = page[page.index('id="controls"') : page.index('id="training"')]
    assert "lost" in controls
    assert "mine" not in controls
    assert "specialist: losses over 399 steps" in page
    assert re.search(r"</i>flow</span>", page)
    assert "</i>kd</span>" not in page  # a term that this stage does not have
    assert "rubric-1" in page
    assert "InstructVLA-G" in page
    assert len(list((tmp_path / "report" / "videos").iterdir())) == 2


def test_what_a_policy_says_stays_text(tmp_path, evaluate):
    score_folder(evaluate("evil", SayingPolicy(EVIL)), get_judge("rubric"))
    write_report([str(tmp_path / "run")], str(tmp_path / "report"))
    page = page_of(tmp_path)
    assert "&lt;script&gt;document.title" in page
    assert "<script>document" not in page
    assert "<img" not in page


def test_nothing_is_fetched_from_elsewhere(tmp_path, evaluate):
    evaluate("mine", FakePolicy())
    write_report([str(tmp_path / "run")], str(tmp_path / "report"))
    sources = re.findall(r'(?:src|href)="([^"#]+)', page_of(tmp_path))
    assert sources
    for source in sources:
        assert source == "data:," or (tmp_path / "report" / source).is_file()


def test_a_report_is_made_once_and_again_after_the_scores(tmp_path, evaluate):
    folder = evaluate("mine", FakePolicy())
    out = str(tmp_path / "report")
    assert not write_report([folder], out)["skipped"]
    assert write_report([folder], out)["skipped"]
    score_folder(folder, get_judge("rubric"))
    with pytest.raises(OutputError, match="another run"):
        write_report([folder], out)


def test_folders_without_anything_to_show_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        write_report([str(tmp_path / "nowhere")], str(tmp_path / "report"))
    with pytest.raises(DataError, match="no finished folder"):
        write_report([str(tmp_path)], str(tmp_path / "report"))


def test_scores_are_kept_until_the_judge_or_the_evaluation_changes(tmp_path, evaluate):
    folder = evaluate("mine", FakePolicy())
    first = score_folder(folder, get_judge("rubric"))
    assert first["policies"]["mine"]["n"] == 3
    assert score_folder(folder, get_judge("rubric")) == {**first, "skipped": True}


def test_a_reasoning_policy_that_says_nothing_has_no_reasoning_and_no_alignment(tmp_path, evaluate):
    scored = score_folder(evaluate("silent", Silent()), get_judge("rubric"))["policies"]["silent"]
    assert (scored["R"], scored["RA"], scored["score"]) == (0, 0, 0)
    assert scored["without_reasoning"] == scored["n"] == 3
    assert scored["success"] == 100


def test_an_unknown_judge_is_named_with_the_nearest_one():
    with pytest.raises(UsageError, match="did you mean 'rubric'"):
        get_judge("rubrik")
    with pytest.raises(UsageError, match="choose from: .*rubric"):
        get_judge("gpt-4o")
