"""`score`, `judge eval` and `kb` as a user types them: what is printed, what is refused."""

import json
import threading
import urllib.request

import pytest
from eval_fakes import FakePolicy, SayingPolicy
from judge_fakes import KEY, FakeEndpoint, evaluation

from dualvla import cli
from dualvla.webpage import PageServer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    policies = {"good": FakePolicy(), "loud": SayingPolicy("plan: give 10. subtask: give 10. move: up.")}
    with pytest.MonkeyPatch.context() as patch:
        return evaluation(tmp_path_factory.mktemp("commands") / "eval", patch, policies, episodes=2, videos=2)


def run(capsys, *argv):
    code = cli.main(list(argv))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_model_s_scores_and_where_the_difference_comes_from(capsys, folder, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FakeEndpoint() as endpoint:
        argv = ["score", folder, "--judge", "openai:fake", "--set", f"openai.base_url={endpoint.url}"]
        code, out, err = run(capsys, *argv)
        assert (code, len(endpoint.requests)) == (0, 4)
        again, unchanged, _ = run(capsys, *argv)
        assert (again, len(endpoint.requests)) == (0, 4)
    assert "VLA Score, judge openai:fake" in out
    assert "good - loud" in out
    assert "unchanged" in unchanged
    assert "4 to ask, 0 known already; about" in err
    assert KEY not in out + err


def test_a_budget_that_is_too_small_is_said_before_anything_is_asked(capsys, folder, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FakeEndpoint() as endpoint:
        argv = ["--judge", "openai:other", "--set", f"openai.base_url={endpoint.url}", "--set", "max_tokens=1000"]
        code, _, err = run(capsys, "score", folder, *argv)
    assert (code, endpoint.requests) == (2, [])
    assert "more than the 1,000 allowed" in err
    assert "--set max_tokens=" in err


def test_the_rubric_takes_no_settings(capsys, folder):
    code, _, err = run(capsys, "score", folder, "--set", "frames=4")
    assert (code, "leave --set and --kb out" in err) == (2, True)


def test_trust_in_the_rubric_and_a_knowledge_base(capsys, folder, tmp_path):
    code, out, _ = run(capsys, "kb", "build", folder, str(tmp_path / "kb"), "--entries", "3")
    assert (code, out.splitlines()[0]) == (0, "3 entries")
    code, out, _ = run(capsys, "kb", "build", folder, str(tmp_path / "kb"), "--entries", "3", "--json")
    assert (code, json.loads(out)["skipped"]) == (0, True)
    code, out, _ = run(capsys, "judge", "eval", folder, "--kb", str(tmp_path / "kb"), "--out", str(tmp_path / "trust"))
    assert code == 0
    assert "moments shuffled" in out
    assert json.loads((tmp_path / "trust" / "judge_eval.json").read_text())["leave_one_out"] is None
    code, _, err = run(capsys, "judge", "eval", folder, "--repeats", "0")
    assert (code, "--repeats must be 1 or more" in err) == (2, True)


def test_the_page_is_served_until_it_is_put_away(capsys, folder, tmp_path, monkeypatch):
    run(capsys, "kb", "build", folder, str(tmp_path / "kb"))
    seen = []

    def visit(server):
        with urllib.request.urlopen(f"{server.url}api/entries", timeout=10) as answer:
            seen.append(json.loads(answer.read()))

    def serve(server):  # what Ctrl-C ends
        with server:
            worker = threading.Thread(target=visit, args=(server,))
            worker.start()
            worker.join()

    monkeypatch.setattr(PageServer, "serve", serve)
    code, out, err = run(capsys, "kb", "edit", str(tmp_path / "kb"), "--as", "Ada")
    assert (code, "0 of 4 entries reviewed" in out) == (0, True)
    assert "Open http://127.0.0.1:" in err
    assert seen[0]["author"] == "Ada"
    assert len(seen[0]["entries"]) == 4
