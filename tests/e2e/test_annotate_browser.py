"""The annotation page in a real Chromium: scrub, mark, save, reload; nothing on the console."""

import json

import numpy as np
import pytest

from dualvla.io import dataset, manifest
from dualvla.webpage import PageServer
from dualvla_pipelines.annotate import Annotator

EVIL = "<img src=x onerror=\"document.title='owned'\">"
FRAMES = 12


def gray(frame):
    return 20 * frame


@pytest.fixture
def folder(tmp_path, make_rows):
    """Three episodes whose frames can be told apart by their grey level."""
    data = str(tmp_path / "data")
    manifest.begin(data, dataset.KIND, {}, {})
    rows = [row for name in "abc" for row in make_rows(f"blocks/touch/{name}", FRAMES)]
    for row in rows:
        row["images"] = {"main": dataset.encode_png(np.full((16, 16, 3), gray(row["step"]), np.uint8))}
        row["instruction"] = f"touch the cube {EVIL}"
    dataset.write_table(dataset.part_url(data, 0), dataset.rows_to_table(rows))
    dataset.finish_dataset(data, {}, {}, rows_in=len(rows))
    return data


@pytest.fixture
def marks(tmp_path):
    return tmp_path / "marks.json"


@pytest.fixture
def page(browser, folder, marks):
    """The open page; whatever it complains about fails the test."""
    complaints = []
    with PageServer(Annotator(folder, str(marks), "ada", 50).page()) as server:
        page = browser.new_page(viewport={"width": 1200, "height": 860})
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(request.url) if not page_left(request) else None)
        page.goto(server.url)
        shown(page, gray(0))  # keys mean nothing before
        yield page
        page.close()
    assert complaints == []


def page_left(request):
    """Pictures that were still on their way when the page was closed are nobody's fault."""
    return request.failure == "net::ERR_ABORTED"


def shown(page, level):
    page.wait_for_function(
        "level => document.getElementById('view').getContext('2d').getImageData(9, 9, 1, 1).data[0] === level",
        arg=level,
    )


def test_scrub_mark_save_and_find_it_again(page, marks):
    page.get_by_text("0 of 3").wait_for()
    shown(page, gray(0))
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    shown(page, gray(4))
    page.keyboard.press("Space")
    page.keyboard.press("End")
    shown(page, gray(FRAMES - 1))
    page.locator("#slider").fill("9")
    shown(page, gray(9))
    page.get_by_role("button", name="Mark", exact=False).first.click()
    page.keyboard.press("[")
    shown(page, gray(4))
    assert page.locator("#marks button").all_inner_texts() == ["4", "9"]
    page.keyboard.press("Enter")
    page.get_by_text("1 of 3").wait_for()
    first = page.locator("nav button").nth(0).get_attribute("title")
    assert json.loads(marks.read_text())["episodes"][first]["boundaries"] == [4, 9]

    page.keyboard.press("Enter")  # the second: nothing happens in it
    page.get_by_text("2 of 3").wait_for()
    page.reload()
    page.get_by_text("2 of 3").wait_for()
    assert page.locator("nav button[aria-current=true]").get_attribute("title") not in json.loads(marks.read_text())
    page.locator("nav button").nth(0).click()
    assert page.locator("#marks button").all_inner_texts() == ["4", "9"]


def test_a_mark_is_taken_away_again_and_what_is_not_saved_shows(page, marks):
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    assert page.locator("nav .changed").count() == 1
    page.keyboard.press("Space")
    assert page.locator("nav .changed").count() == 0
    assert page.locator("#marks button").count() == 0
    assert not marks.exists()


def test_play_runs_to_the_end(page):
    page.keyboard.press("p")
    shown(page, gray(FRAMES - 1))
    page.get_by_role("button", name="Play").wait_for()


def test_text_of_the_data_is_shown_and_not_run(page):
    assert EVIL in page.locator("#instruction").inner_text()
    assert page.title() == "Annotate event boundaries"


def test_a_server_that_is_gone_is_said(browser, folder, marks):
    server = PageServer(Annotator(folder, str(marks), "ada", 50).page())
    with server:
        page = browser.new_page()
        page.goto(server.url)
        page.get_by_text("0 of 3").wait_for()
        page.wait_for_load_state("networkidle")  # a frame that is still to come keeps the mark back
    page.keyboard.press("Enter")
    page.get_by_text("Not saved.").wait_for()
    assert page.locator("#count").inner_text() == "0 of 3"
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_readable(page, scheme):
    page.emulate_media(color_scheme=scheme)
    for selector in ("body", "nav button", "#help", "#save"):
        ink, behind = page.locator(selector).first.evaluate(
            """node => {
                let behind = node;
                const color = n => getComputedStyle(n).backgroundColor;
                while (color(behind) === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
                return [getComputedStyle(node).color, color(behind)];
            }"""
        )
        assert contrast(ink, behind) > 4.5, (selector, ink, behind)


def contrast(a, b):
    """WCAG contrast ratio of two CSS rgb() colours."""
    lighter, darker = sorted((luminance(a), luminance(b)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(color):
    channels = [int(c) / 255 for c in color.strip("rgba() ").split(",")[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
