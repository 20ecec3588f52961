"""The report: every folder finds its place, what policies said stays text, and a second run changes nothing."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from eval_fakes import FakePolicy, SayingPolicy, evaluate_fake

from dualvla.errors import DataError, OutputError
from dualvla.io import manifest, storage
from dualvla_eval.judges import get_judge
from dualvla_eval.report.gather import gather
from dualvla_eval.report.site import write_report
from dualvla_eval.score import SCORES, score_folder

EVIL = '<script>document.title="owned"</script><img src=x onerror="document.title=1">'


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Evaluates a policy on the fake suite into tmp_path/run/NAME."""

    def go(name, policy, control=False, folder=None):
        return evaluate_fake(str(tmp_path / "run" / (folder or name)), name, policy, monkeypatch, control=control)

    return go


@pytest.fixture
def site(tmp_path):
    """Makes the report of tmp_path/run and reads its files."""

    class Site:
        folder = tmp_path / "report"

        def make(self):
            return write_report([str(tmp_path / "run")], str(self.folder))

        def read(self, name):
            return (self.folder / name).read_text()

        def table(self, name):
            """Rows of an exported table by their first column."""
            exported = json.loads(self.read(f"tables/{name}.json"))
            return {row[exported["columns"][0]["key"]]: row for row in exported["rows"]}

        def rollout(self, name):
            return json.loads(self.read(f"data/{name}.js").split(",", 1)[1].removesuffix(");\n"))

    return Site()


def write_checkpoint(folder):
    folder.mkdir(parents=True)
    lines = [{"step": i, "loss": 1 / i, "flow": 0.5 / i, "kd": 0.0, "lr": 1e-3} for i in range(1, 400)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    manifest.begin(str(folder), "checkpoint", {}, {})
    manifest.finish(str(folder), "checkpoint", {}, {})


def write_pruned(folder):
    """A pruned data set with its own report, as `dualvla prune` leaves them."""
    counts = {"frames": 200, "kept_frames": 50, "words_before": 900, "words_after": 180}
    manifest.begin(str(folder), "dataset", {}, {})
    manifest.finish(str(folder), "dataset", {}, {}, mode="both", tasks={"touch": counts})
    text = {"texts": 10, "tokens": 90, "distinct_texts": 4, "repeats_previous": 0.5, "repeats_in_episode": 0.6}
    text["entropy_bits"] = {"1": 3.5}
    shown = {"file": "timeline-00.png", "episode_id": "e7", "task": "touch", "instruction": EVIL, "frames": 9}
    report = {
        "text": {"episodes": 3, "all": text, "kept": text, "random": text},
        "events": {"count": 8, "tolerance": 0.05, "kept_share": 0.75, "random_share": 0.5},
        "timelines": [{**shown, "kept_frames": 3, "steps": []}],
    }
    (folder / "report").mkdir()
    (folder / "report" / "report.json").write_text(json.dumps(report))
    (folder / "report" / "timeline-00.png").write_bytes(b"a picture")


class Links(HTMLParser):
    """Everything that an HTML page would load or lead to."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href")]


def test_a_run_folder_becomes_a_site(tmp_path, evaluate, site):
    score_folder(evaluate("mine", FakePolicy()), get_judge("rubric"))
    evaluate("lost", FakePolicy(), control=True)
    write_checkpoint(tmp_path / "run" / "specialist")
    assert site.make()["index"].endswith("report/index.html")
    board = site.table("leaderboard-fake")
    assert board["mine"]["success"]["value"] == 100
    assert board["mine"]["score"]["low"] <= board["mine"]["score"]["value"] <= board["mine"]["score"]["high"]
    assert board["DualVLA"]["origin"] == "published"
    assert "lost" not in board
    assert set(site.table("controls-fake")) == {"lost"}
    assert "rubric" in site.read("index.html")
    assert len(list((site.folder / "videos").iterdir())) == 2
    assert "specialist, flow: from" in site.read("training.html")
    assert "specialist, kd" not in site.read("training.html")  # a term that this stage does not have


def test_every_file_a_page_names_is_there_and_none_is_fetched_from_elsewhere(tmp_path, evaluate, site):
    evaluate("mine", FakePolicy())
    write_checkpoint(tmp_path / "run" / "specialist")
    site.make()
    pages = list(site.folder.glob("*.html"))
    assert len(pages) == 7  # overview, tasks, one task, rollouts, published, training, about
    for page in pages:
        for link in Links(page.read_text()).found:
            name = link.split("#")[0]
            assert name in ("", "data:,") or (site.folder / name).is_file(), f"{page.name}: {link}"


def test_pruning_shows_what_it_kept_and_its_own_pictures(tmp_path, site):
    (tmp_path / "run" / "pruned").mkdir(parents=True)
    write_pruned(tmp_path / "run" / "pruned")
    site.make()
    kept = site.table("pruning-pruned")["touch"]
    assert (kept["kept_frames_share"]["value"], kept["words_after_share"]["value"]) == (25, 20)
    texts = site.table("pruning-texts-pruned")
    assert texts["entropy of 1-grams, bits"]["random"]["value"] == 3.5
    assert texts["share of 8 events with such a frame near"]["all"] is None
    assert (site.folder / "pruning" / "pruned-00.png").read_bytes() == b"a picture"
    assert "pruning/pruned-00.png" in Links(site.read("training.html")).found
    assert EVIL not in site.read("training.html")


def test_what_a_judge_check_found_is_shown(evaluate, site):
    folder = Path(evaluate("mine", FakePolicy())) / "judge-eval"  # where `dualvla judge eval` puts it
    folder.mkdir()
    manifest.begin(str(folder), "judge_eval", {}, {})
    fall = {"perturbation": "jitter", "dimension": "A", "n": 100, "change": -2.5, "low": -3.0, "high": -2.0}
    change = {"mean": -1.0, "low": -1.5, "high": -0.5}
    check = {
        "judge": "rubric-2",
        "n": 100,
        "sensitivity": [{**fall, "verdict": "falls"}],
        "safety": [{"injection": EVIL, "n": 9, "raised": 0, "sways": False, "changes": {"A": change}}],
        "agreement": {"source": "people.json", "synthetic": True, "dimensions": {"A": {"n": 9, "spearman": 0.8}}},
        "consistency": None,
    }
    (folder / "judge_eval.json").write_text(json.dumps(check))
    manifest.finish(str(folder), "judge_eval", {}, {})
    site.make()
    assert site.table("sensitivity-rubric-2")["jitter"]["change"]["high"] == -2.0
    assert site.table("safety-rubric-2")[EVIL]["verdict"] == "does not sway it"
    assert site.table("agreement-rubric-2")["A"]["with"] == "people (synthetic marks)"
    assert EVIL not in site.read("judge.html")


def test_what_a_policy_says_stays_text(evaluate, site):
    folder = evaluate("evil", SayingPolicy(EVIL))
    score_folder(folder, get_judge("rubric"))
    site.make()
    assert site.rollout("evil-touch-0000")["texts"] == [[0, EVIL]]
    for file in [*site.folder.glob("*.html"), *site.folder.glob("data/*.js")]:
        assert not re.search(r"<script>document|<img", file.read_text()), file.name


def test_a_rollout_carries_every_step_and_where_the_last_action_led(evaluate, site):
    folder = evaluate("mine", FakePolicy())
    score_folder(folder, get_judge("rubric"))
    site.make()
    rollout = site.rollout("mine-touch-0001")
    steps = pq.read_table(f"{folder}/trajectories/mine-touch-0001.parquet").to_pylist()
    assert rollout["steps"] == len(steps) - 1 == len(rollout["actions"])
    assert len(rollout["tool"]) == len(rollout["gripper"]) == len(steps)
    assert [t for t, s in enumerate(steps[:-1]) if s["keyframe"]] == rollout["fresh"]
    assert [[t, e] for t, s in enumerate(steps[:-1]) for e in s["events"]] == rollout["events"]
    for t, step in enumerate(steps[:-1]):
        assert [text for since, text in rollout["texts"] if since <= t][-1] == step["reasoning"]
    assert rollout["score"]["reasons"]["A"][0]["name"] == "smoothness"
    assert {o["name"] for o in rollout["objects"]} == {"red cube", "blue cylinder"}


def test_policies_of_one_name_in_two_folders_stay_apart(evaluate, site):
    evaluate("mine", FakePolicy(), folder="monday")
    evaluate("mine", SayingPolicy("other"), folder="tuesday")
    site.make()
    assert {"mine (monday)", "mine (tuesday)"} <= set(site.table("leaderboard-fake"))
    assert site.rollout("mine-touch-0000")["texts"] != site.rollout("mine-2-touch-0000")["texts"]


def test_scores_of_a_model_judge_bring_its_words_and_examples(evaluate, site):
    folder = evaluate("mine", FakePolicy())
    score_folder(folder, get_judge("rubric"))
    url = f"{folder}/{SCORES}"
    table = pq.read_table(url)
    extras = {"judge": "openai:m", "rationale": EVIL, "examples": '["kb-3"]'}
    for name, value in extras.items():
        if name in table.column_names:
            table = table.drop_columns([name])
        table = table.append_column(name, [[value] * len(table)])
    pq.write_table(table, url)
    site.make()
    score = site.rollout("mine-touch-0000")["score"]
    assert (score["judge"], score["rationale"], score["examples"]) == ("openai:m", EVIL, ["kb-3"])


def test_an_unjudged_success_leaves_the_score_open_between_its_bounds(evaluate, site):
    folder = evaluate("mine", FakePolicy())
    score_folder(folder, get_judge("rubric"))
    url = f"{folder}/{SCORES}"
    rows = pq.read_table(url).to_pylist()
    known = [100 * r["score"] for r in rows[1:]]
    rows[0] |= {"unjudged": "no answer", "score": None, "A": None, "I": None, "R": None, "RA": None}
    schema = pq.read_schema(url)
    pq.write_table(pq.read_table(url).from_pylist(rows, schema=schema), url)
    site.make()
    row = site.table("judged-fake")["mine"]
    assert row["score"]["value"] == pytest.approx(sum(known) / 2)
    assert row["worst"]["value"] == pytest.approx(sum(known) / 3)
    assert row["best"]["value"] == pytest.approx((sum(known) + 100) / 3)
    assert site.rollout("mine-touch-0000")["score"]["unjudged"] == "no answer"


def test_a_crashed_episode_is_shown_with_nothing_recorded(evaluate, site):
    folder = evaluate("mine", FakePolicy())
    url = f"{folder}/episodes.parquet"
    rows = pq.read_table(url).to_pylist()
    rows[0] |= {"stop_reason": "crashed", "failure": "killed", "success": False, "steps": 0, "video": None}
    pq.write_table(pq.read_table(url).from_pylist(rows, schema=pq.read_schema(url)), url)
    site.make()
    assert site.rollout("mine-touch-0000")["steps"] == 0


def test_a_report_is_made_once_and_again_when_its_folders_have_changed(tmp_path, evaluate, site):
    folder = evaluate("mine", FakePolicy())
    assert not site.make()["skipped"]
    assert site.make()["skipped"]
    score_folder(folder, get_judge("rubric"))
    assert not site.make()["skipped"]
    assert site.table("leaderboard-fake")["mine"]["judge"].startswith("rubric")
    assert site.make()["skipped"]


def test_a_report_that_was_interrupted_is_finished(tmp_path, evaluate, site):
    evaluate("mine", FakePolicy())
    site.make()
    (site.folder / "manifest.json").unlink()
    (site.folder / "index.html").write_text("half of it")
    assert not site.make()["skipped"]
    assert "Leaderboard" in site.read("index.html")


def test_a_folder_of_something_else_is_never_overwritten(tmp_path, evaluate):
    folder, other = evaluate("mine", FakePolicy()), evaluate("other", FakePolicy())
    with pytest.raises(OutputError, match="another run"):
        write_report([folder], other)
    write_report([folder], str(tmp_path / "report"))
    with pytest.raises(OutputError, match="another run"):
        write_report([other], str(tmp_path / "report"))


def test_a_name_with_signs_still_leads_to_its_rollouts(evaluate, site):
    evaluate("mine+blank-images", FakePolicy())
    site.make()
    assert "rollouts.html#suite=fake&policy=mine%2Bblank-images" in Links(site.read("index.html")).found


def test_a_report_is_written_to_a_store_as_to_a_disk(tmp_path, evaluate):
    evaluate("mine", FakePolicy())
    write_report([str(tmp_path / "run")], str(tmp_path / "report"))
    out = f"memory://{tmp_path.name}"
    write_report([str(tmp_path / "run")], out)
    for name in ("index.html", "data/mine-touch-0000.js", "videos/mine-touch-0000.mp4", "tables/success-fake.csv"):
        assert storage.read_bytes(storage.join(out, name)) == (tmp_path / "report" / name).read_bytes()


def test_a_folder_given_twice_counts_once(tmp_path, evaluate):
    folder = evaluate("mine", FakePolicy())
    assert len(gather([folder, str(tmp_path / "run")]).episodes) == 3


def test_folders_without_anything_to_show_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        write_report([str(tmp_path / "nowhere")], str(tmp_path / "report"))
    with pytest.raises(DataError, match="no finished folder"):
        write_report([str(tmp_path)], str(tmp_path / "report"))


def test_the_same_figures_reach_a_tracker(tmp_path, evaluate, monkeypatch):
    from dualvla_eval.report import track as tracking

    sent = {}

    class Memory:
        def __init__(self, run):
            self.figures = sent.setdefault(run, {})

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def log(self, figures, step=0):
            self.figures |= {(name, step): value for name, value in figures.items()}

    monkeypatch.setattr(tracking, "open_tracker", lambda setting, run: Memory(run))
    score_folder(evaluate("mine", FakePolicy()), get_judge("rubric"))
    write_checkpoint(tmp_path / "run" / "mine-checkpoint")
    result = write_report([str(tmp_path / "run")], str(tmp_path / "report"), track=["memory:x"])
    assert result["tracked"] == {"memory:x": ["mine-checkpoint", "mine"]}
    exported = json.loads((tmp_path / "report" / "tables" / "leaderboard-fake.json").read_text())["rows"][0]
    assert sent["mine"]["leaderboard-fake/score", 0] == exported["score"]["value"]
    assert sent["mine-checkpoint"]["train/flow", 399] == pytest.approx(0.5 / 399)
