"""A model judge against a real HTTP server that answers late, wrong, malformed, with 429 and with 5xx."""

import json
import logging
import time
from dataclasses import replace

import pytest
from judge_fakes import KEY, FakeEndpoint, Response, answer, evaluation, make_judge, trajectory

from dualvla.errors import ServerError, UsageError
from dualvla_eval import results
from dualvla_eval.frames import Frames
from dualvla_eval.judges import get_judge
from dualvla_eval.judges.chat import BudgetError
from dualvla_eval.judges.model import NOT_FILMED, Variant
from dualvla_eval.score import score_folder


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def some(tmp_path):
    return [trajectory(i, folder=tmp_path / "frames") for i in range(6)]


def nth_only(nth, bad):
    """The first `nth` answers to a conversation are bad."""
    return lambda request, n: bad if n <= nth else Response()


def test_marks_come_back_with_the_judge_s_words(tmp_path, some):
    with FakeEndpoint() as endpoint:
        judge = make_judge(endpoint, tmp_path / "store")
        verdicts = judge.judge(some)
    assert [(v.action, v.intention, v.reasoning, v.alignment, v.success) for v in verdicts] == [(7, 8, 6, 5, True)] * 6
    assert verdicts[0].rationale == "It moved well."
    assert judge.usage() == {"calls": 6, "prompt_tokens": 600, "completion_tokens": 60, "cached": 0}
    assert set(endpoint.keys) == {f"Bearer {KEY}"}
    assert set(endpoint.paths) == {"/v1/chat/completions"}


def test_the_form_and_the_sampling_are_asked_for(tmp_path, some):
    with FakeEndpoint() as endpoint:
        make_judge(endpoint, tmp_path / "store").judge(some[:1])
    (request,) = endpoint.requests
    assert (request["model"], request["temperature"], request["max_completion_tokens"]) == ("fake", 0.0, 1024)
    form = request["response_format"]["json_schema"]
    assert form["strict"]
    assert form["schema"]["properties"]["Result"]["required"] == [
        "Action",
        "Intention",
        "Reasoning",
        "Alignment",
        "Success",
    ]


def test_who_says_nothing_is_not_asked_about_reasoning(tmp_path):
    silent = trajectory(0, texts=(), folder=tmp_path / "frames", kind="specialist")
    with FakeEndpoint(lambda *_: Response(answer(reasoning=None))) as endpoint:
        (verdict,) = make_judge(endpoint, tmp_path / "store").judge([silent])
    assert (verdict.action, verdict.reasoning, verdict.alignment) == (7, None, None)
    assert "Alignment" not in json.dumps(endpoint.requests[0])


@pytest.mark.parametrize(
    "bad",
    [
        Response("slow down", 429),
        Response("broken", 500),
        Response("away", 503, headers={"Retry-After": "0.01"}),
        Response(body=b"<html>a proxy says no</html>"),
        Response(body=b'{"choices": []}'),
        Response(drop=True),
    ],
    ids=["429", "500", "503", "no JSON", "no choice", "hangs up"],
)
def test_a_passing_failure_is_asked_again_and_nothing_is_lost(tmp_path, some, bad):
    with FakeEndpoint(nth_only(2, bad)) as endpoint:
        judge = make_judge(endpoint, tmp_path / "store")
        verdicts = judge.judge(some)
    assert [v.action for v in verdicts] == [7] * 6
    assert set(endpoint.seen.values()) == {3}
    assert judge.usage()["calls"] == 18


def test_a_server_that_says_how_long_to_wait_is_obeyed(tmp_path, some):
    with FakeEndpoint(nth_only(1, Response("later", 429, headers={"Retry-After": "0.4"}))) as endpoint:
        started = time.monotonic()
        make_judge(endpoint, tmp_path / "store").judge(some[:1])
        assert time.monotonic() - started >= 0.4


def test_an_answer_that_comes_too_late_is_asked_for_again(tmp_path, some):
    with FakeEndpoint(nth_only(1, Response(delay_s=1.0))) as endpoint:
        (verdict,) = make_judge(endpoint, tmp_path / "store", "openai.timeout_s=0.2").judge(some[:1])
    assert verdict.action == 7
    assert len(endpoint.requests) == 2


def test_who_never_answers_is_unjudged_and_asked_again_by_the_next_run(tmp_path, some):
    with FakeEndpoint(lambda *_: Response("down", 500)) as endpoint:
        verdicts = make_judge(endpoint, tmp_path / "store", "attempts=2").judge(some)
    assert {v.unjudged for v in verdicts} == {"no answer: HTTP 500"}
    assert all(v.passing and v.action is None for v in verdicts)
    with FakeEndpoint() as endpoint:
        assert [v.action for v in make_judge(endpoint, tmp_path / "store").judge(some)] == [7] * 6


@pytest.mark.parametrize(
    "bad", ["", "The marks are 10.", answer(action=11), answer(action=7.5), answer(action=True), '{"Thought": 1}']
)
def test_a_malformed_answer_is_repaired_once(tmp_path, some, bad):
    def behave(request, nth):
        return Response(bad if len(request["messages"]) == 2 else answer(action=3))

    with FakeEndpoint(behave) as endpoint:
        (verdict,) = make_judge(endpoint, tmp_path / "store").judge(some[:1])
    assert verdict.action == 3
    assert [m["role"] for m in endpoint.requests[1]["messages"]] == ["system", "user", "assistant", "user"]


def test_what_stays_malformed_is_unjudged_never_zero_and_not_paid_for_again(tmp_path, some):
    with FakeEndpoint(lambda *_: Response("ten out of ten")) as endpoint:
        (verdict,) = make_judge(endpoint, tmp_path / "store").judge(some[:1])
        assert verdict.unjudged.startswith("no valid answer: it is not JSON")
        assert verdict.action is None
        assert len(endpoint.requests) == 2
        assert make_judge(endpoint, tmp_path / "store").judge(some[:1]) == [verdict]
        assert len(endpoint.requests) == 2
        make_judge(endpoint, tmp_path / "store", "retry_unjudged=true").judge(some[:1])
        assert len(endpoint.requests) == 4


def test_a_refused_conversation_is_unjudged_and_the_others_go_on(tmp_path, some):
    def behave(request, nth):
        return Response("filtered", 400) if "evil" in json.dumps(request) else Response()

    evil = trajectory(9, folder=tmp_path / "frames", instruction="evil")
    with FakeEndpoint(behave) as endpoint:
        verdicts = make_judge(endpoint, tmp_path / "store").judge([*some, evil])
    assert [v.unjudged is None for v in verdicts] == [True] * 6 + [False]
    assert len(endpoint.requests) == 7  # not asked again


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_ends_the_work_at_once_and_never_names_the_key(tmp_path, some, status, caplog):
    with (
        FakeEndpoint(lambda *_: Response(f"bad key {KEY}", status)) as endpoint,
        caplog.at_level(logging.DEBUG),
        pytest.raises(ServerError, match=f"HTTP {status}") as error,
    ):
        make_judge(endpoint, tmp_path / "store", "concurrency=1").judge(some)
    assert len(endpoint.requests) <= 2
    assert KEY not in str(error.value) + caplog.text
    kept = list((tmp_path / "store").rglob("*"))
    assert not any(KEY.encode() in path.read_bytes() for path in kept if path.is_file())


def test_a_verdict_is_never_paid_for_twice(tmp_path, some):
    with FakeEndpoint() as endpoint:
        first = make_judge(endpoint, tmp_path / "store").judge(some)
        judge = make_judge(endpoint, tmp_path / "store")
        assert judge.judge([*some, some[0]]) == [*first, first[0]]
        assert judge.usage()["calls"] == 0
        assert len(endpoint.requests) == 6
        make_judge(endpoint, tmp_path / "store", "frames=4").judge(some)  # other pictures: another question
        assert len(endpoint.requests) == 12


def test_equal_questions_are_asked_once(tmp_path, some):
    with FakeEndpoint() as endpoint:
        make_judge(endpoint, tmp_path / "store").judge([some[0]] * 5)
    assert len(endpoint.requests) == 1


def test_no_more_calls_are_in_flight_than_allowed(tmp_path):
    many = [trajectory(i, folder=tmp_path / "frames") for i in range(20)]
    with FakeEndpoint(lambda *_: Response(delay_s=0.05)) as endpoint:
        make_judge(endpoint, tmp_path / "store", "concurrency=4").judge(many)
    assert endpoint.most_in_flight == 4


@pytest.mark.parametrize("setting", ["max_calls=5", "max_tokens=100"])
def test_work_that_exceeds_the_budget_is_not_begun(tmp_path, some, setting):
    with FakeEndpoint() as endpoint, pytest.raises(UsageError, match="nothing was asked"):
        make_judge(endpoint, tmp_path / "store", setting).judge(some)
    assert endpoint.requests == []


def test_retries_count_too_and_what_was_judged_is_kept(tmp_path, some):
    def behave(request, nth):
        return Response("busy", 429) if len(endpoint.requests) > 3 else Response()

    with FakeEndpoint(behave) as endpoint:
        with pytest.raises(BudgetError, match="8 calls is used up"):
            make_judge(endpoint, tmp_path / "store", "max_calls=8", "concurrency=1").judge(some)
        assert len(endpoint.requests) == 8
        endpoint.behave = lambda *_: Response()
        judge = make_judge(endpoint, tmp_path / "store", "max_calls=3")
        assert [v.action for v in judge.judge(some)] == [7] * 6
        assert judge.usage()["cached"] == 3


def test_what_was_not_filmed_is_unjudged(tmp_path, some):
    (tmp_path / "bad.mp4").write_bytes(b"no film")
    damaged = replace(some[0], frames=Frames(str(tmp_path / "bad.mp4"), str(tmp_path / "none.parquet")))
    gone = replace(some[0], frames=Frames(str(tmp_path / "gone.mp4"), str(tmp_path / "none.parquet")))
    with FakeEndpoint() as endpoint:
        judge = make_judge(endpoint, tmp_path / "store")
        verdicts = judge.judge([replace(some[0], frames=None), damaged, gone, some[1]])
    why = [v.unjudged for v in verdicts]
    assert (why[0], why[3]) == (NOT_FILMED, None)
    assert "bad.mp4' is not a readable film" in why[1]
    assert "gone.mp4' does not exist" in why[2]
    assert len(endpoint.requests) == 1


def test_asking_differently_asks_anew_and_shuffling_moves_pictures_with_their_labels(tmp_path, some):
    with FakeEndpoint() as endpoint:
        judge = make_judge(endpoint, tmp_path / "store")
        judge.judge(some[:1])
        judge.ask_differently(Variant(repeat=1)).judge(some[:1])
        judge.ask_differently(Variant(shuffled=True)).judge(some[:1])
    first, again, shuffled = (r["messages"][1]["content"] for r in endpoint.requests)
    assert first == again
    assert first != shuffled

    def by_label(content):
        labels = [p["text"].splitlines()[-1] if p["type"] == "text" else p["image_url"]["url"] for p in content[1:-1]]
        return dict(zip(labels[::2], labels[1::2], strict=True))

    assert by_label(first) == by_label(shuffled)
    assert judge.usage()["calls"] == 3


def test_without_a_key_openai_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UsageError, match="OPENAI_API_KEY is not set"):
        get_judge("openai:gpt-4o", store=str(tmp_path))


def test_an_unknown_setting_is_refused(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'frames'"):
        get_judge("openai:m", ["frame=3"], store=str(tmp_path))
    with pytest.raises(UsageError, match="frames = 1"):
        get_judge("openai:m", ["frames=1"], store=str(tmp_path))


def test_a_whole_evaluation_from_its_films(tmp_path, monkeypatch):
    folder = evaluation(tmp_path / "eval", monkeypatch, episodes=3, videos=2)

    def score(endpoint):
        return score_folder(folder, make_judge(endpoint, tmp_path / "eval" / "verdicts", "attempts=1"))

    with FakeEndpoint() as endpoint:
        scored = score(endpoint)
        assert scored["policies"]["p"]["unjudged"] == 1  # not filmed
        policy = scored["policies"]["p"]
        assert policy["worst"] < policy["score"] < policy["best"]
        assert policy["worst"] == pytest.approx(policy["score"] * 2 / 3)
        assert policy["best"] == pytest.approx(policy["score"] * 2 / 3 + 100 / 3)
        assert score(endpoint)["skipped"]
    pictures = [p for p in endpoint.requests[0]["messages"][1]["content"] if p["type"] == "image_url"]
    steps = results.read_episodes(folder)[0]["steps"]
    assert len(pictures) == min(8, steps + 1)


def test_a_run_during_an_outage_is_finished_by_the_next_one(tmp_path, monkeypatch):
    folder = evaluation(tmp_path / "eval", monkeypatch)
    with FakeEndpoint(lambda *_: Response("down", 503)) as endpoint:
        judge = make_judge(endpoint, tmp_path / "verdicts", "attempts=1")
        scored = score_folder(folder, judge)
        assert (scored["try_again"], scored["policies"]["p"]["score"]) == (3, None)
    with FakeEndpoint() as endpoint:
        scored = score_folder(folder, make_judge(endpoint, tmp_path / "verdicts"))
    assert (scored["try_again"], scored["policies"]["p"]["unjudged"]) == (0, 0)
    row = results.read_episodes(folder)[0]
    assert results.read_trajectory(folder, row).frames is not None
