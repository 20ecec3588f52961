"""`dualvla kb edit` in a real Chromium, by keyboard alone: watch, mark, save, next; and hostile text stays text."""

import pytest
from eval_fakes import SayingPolicy
from judge_fakes import evaluation

from dualvla.webpage import PageServer
from dualvla_eval.judges import get_judge
from dualvla_eval.kb_page import make_page
from dualvla_eval.knowledge import BuildConfig, KnowledgeBase, build

EVIL = '<img src=x onerror="document.title=1"><script>document.title="owned"</script>'


@pytest.fixture
def base(tmp_path, monkeypatch):
    folder = evaluation(tmp_path / "eval", monkeypatch, {"evil": SayingPolicy(EVIL)}, episodes=3)
    build([folder], str(tmp_path / "kb"), get_judge("rubric"), BuildConfig())
    return KnowledgeBase(str(tmp_path / "kb"))


@pytest.fixture
def page(browser, base):
    """The open page; whatever it complains about fails the test."""
    complaints = []
    with PageServer(make_page(base, "Ada")) as server:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(server.url)
        page.wait_for_function("() => document.querySelector('video').readyState >= 2")
        yield page
        page.close()
    assert [c for c in complaints if "400 (Bad Request)" not in c] == []  # a refused save is an answer


def test_three_rollouts_are_corrected_without_a_mouse(page, base):
    ids = base.ids()
    for number, id in enumerate(ids, 1):
        page.wait_for_function(
            "id => document.querySelector('nav [aria-current=true]').dataset.id === id "
            "&& document.querySelector('video').readyState >= 2",
            arg=id,
        )
        for key in ("3", "x", "0", "7"):
            page.keyboard.press(key)
        page.keyboard.press("-")
        page.keyboard.press("r")
        page.keyboard.type("went 4 round, j")  # keys that mean something elsewhere
        page.keyboard.press("Escape")
        page.keyboard.press("Enter")
        page.wait_for_function(
            "n => document.getElementById('count').textContent.startsWith(n + ' of 3')", arg=str(number)
        )
    for id in ids:
        current = base.entry(id).current
        assert current.marks == {"A": 3, "I": 10, "R": 0, "RA": 6}
        assert (current.number, current.by, current.reviewed) == (2, "Ada", True)
        assert current.rationale.endswith("went 4 round, j")


def test_the_film_can_be_wound_to_a_step(page):
    page.keyboard.press(" ")
    page.wait_for_function("() => document.querySelector('video').paused")
    page.locator("#steps button").nth(1).click()
    step = int(page.locator("#steps li").nth(1).get_attribute("data-step"))
    page.wait_for_function("t => Math.abs(document.querySelector('video').currentTime - t) < 0.15", arg=step / 5)
    before = page.locator("video").evaluate("v => v.currentTime")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("t => document.querySelector('video').currentTime > t + 0.1", arg=before)


def test_what_somebody_else_saved_is_not_overwritten(page, base):
    entry = base.entries()[0]
    base.revise(entry.id, 1, {**entry.current.marks, "A": 1}, "first", "Bea")
    page.keyboard.press("9")
    page.keyboard.press("Enter")
    page.get_by_text("was changed by Bea").wait_for()
    assert base.entry(entry.id).current.marks["A"] == 1


def test_undo_and_hostile_text(page):
    marks = page.locator("#marks output").all_inner_texts()
    page.keyboard.press("1")
    assert page.locator("#marks output").all_inner_texts() != marks
    page.keyboard.press("u")
    assert page.locator("#marks output").all_inner_texts() == marks
    assert EVIL in page.locator("#steps").inner_text()
    assert page.title() == "Knowledge base"
