"""The report in a real Chromium: no console errors, films play, filters and steps work, hostile text stays text."""

import shutil

import pytest
from eval_fakes import FakePolicy, SayingPolicy, fake_suite, run_items_here

from dualvla_eval import sweep
from dualvla_eval.judges import get_judge
from dualvla_eval.policies import PolicyRef
from dualvla_eval.report.site import write_report
from dualvla_eval.score import score_folder

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
EVIL = '<script>document.title="owned"</script>'

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "_run_items", run_items_here)
        for name, policy in (("good", FakePolicy()), ("evil", SayingPolicy(EVIL))):
            sweep.run_sweep(
                str(folder / name),
                fake_suite(),
                [PolicyRef(name, "expert")],
                sweep.SweepConfig({"touch": 3}, videos_per_task=2),
                workers=1,
                load_policy=lambda *_, chosen=policy, **__: chosen,
            )
            score_folder(str(folder / name), get_judge("rubric"))
    return write_report([str(folder)], str(folder / "report"))["index"]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, index):
    """The open report; whatever it complains about fails the test."""
    complaints = []
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url))
    page.goto(f"file://{index}")
    yield page
    page.close()
    assert complaints == []


def test_a_film_plays_and_its_steps_follow(page):
    rollout = page.locator(".rollout").first
    rollout.get_by_text("Steps and reasoning").click()
    video = rollout.locator("video")
    video.evaluate("v => v.play()")
    page.wait_for_function("() => document.querySelector('video').currentTime > 0.5")
    assert video.evaluate("v => [v.videoWidth > 0, v.error]") == [True, None]
    rollout.locator(".steps li.now").wait_for()


def test_a_step_moves_its_film_there(page):
    rollout = page.locator(".rollout").first
    rollout.get_by_text("Steps and reasoning").click()
    page.wait_for_function("() => document.querySelector('video').readyState >= 1")
    rollout.locator(".seek").nth(3).click()
    page.wait_for_function("() => Math.abs(document.querySelector('video').currentTime - 0.7) < 0.1")


def test_filters_show_what_was_asked_and_are_part_of_the_address(page):
    assert page.locator("#count").inner_text() == "4 of 4"
    page.locator("select[name=policy]").select_option("good")
    assert page.locator("#count").inner_text() == "2 of 4"
    assert page.locator(".rollout:visible h3").all_inner_texts() == ["good touch 0", "good touch 1"]
    page.reload()
    assert page.locator("#count").inner_text() == "2 of 4"


def test_hostile_text_is_shown_and_not_run(page):
    assert page.title() == "DualVLA report"
    evil = page.locator(".rollout[data-policy=evil]").first
    evil.get_by_text("Steps and reasoning").click()
    assert EVIL in evil.locator("q").first.inner_text()


def test_light_and_dark_differ_and_text_stays_readable(page):
    colors = "() => ['backgroundColor', 'color'].map(k => getComputedStyle(document.body)[k])"
    before = page.evaluate(colors)
    page.locator("#theme").click()
    after = page.evaluate(colors)
    assert before[0] != after[0]
    for background, ink in (before, after):
        assert contrast(background, ink) > 7


def contrast(a, b):
    """WCAG contrast ratio of two CSS rgb() colours."""
    lighter, darker = sorted((luminance(a), luminance(b)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(color):
    channels = [int(c) / 255 for c in color.strip("rgba() ").split(",")[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
