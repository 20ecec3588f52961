"""The status page in a real Chromium, on a real endpoint: what an operator sees, and what hostile text may not do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from serve.local_endpoint import LocalEndpoint, endpoint
from serve_fakes import example

from dualvla.client import PolicyClient

INFER, ADMIN = "infer-key-0123456789", "admin-key-0123456789"
EVIL = '<img src=x onerror="document.title=1"><script>document.title="owned"</script>'

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEndpoint]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"{INFER}\n{ADMIN} admin\n")
    with endpoint(keys_file=str(file), status_page=True) as found:
        yield found


@pytest.fixture
def robots(running: LocalEndpoint) -> Iterator[Callable[[], None]]:
    """Two robots that ask ten times a second; what the second one is told is hostile."""
    stop = threading.Event()

    def robot(name: str, instruction: str) -> None:
        with PolicyClient(f"ws://{running.address}", INFER, session=name) as client:
            for step in range(10_000):
                if stop.wait(0.1):
                    return
                client.infer(example(step, instruction, id=f"{name}/{step}"))

    threads = [threading.Thread(target=robot, args=one) for one in (("arm-1", "touch the cube"), ("arm-2", EVIL))]
    for thread in threads:
        thread.start()

    def leave() -> None:
        stop.set()
        for thread in threads:
            thread.join(20)

    yield leave
    leave()


@pytest.fixture
def page(browser: Any, running: LocalEndpoint) -> Iterator[Any]:
    """The open page; whatever it complains about fails the test."""
    complaints: list[str] = []
    context = browser.new_context(http_credentials={"username": "operator", "password": ADMIN})
    page = context.new_page()
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.goto(f"http://{running.address}/status")
    yield page
    context.close()
    assert not complaints, complaints


def test_an_operator_sees_who_is_connected_and_what_a_robot_sees_and_thinks(page: Any, robots: object) -> None:
    page.wait_for_selector("tr[data-session=arm-1]")
    page.wait_for_selector("tr[data-session=arm-2]")
    assert "2 connected" in page.inner_text("#count")
    page.click("tr[data-session=arm-1]")
    page.wait_for_selector("#frame:not([hidden])")
    assert "touch the cube at" in page.inner_text("#reasoning")
    first = page.eval_on_selector("#frame", "image => [image.naturalWidth, image.naturalHeight, image.src]")
    assert first[:2] == [24, 16]
    page.wait_for_function("before => document.getElementById('frame').src !== before", arg=first[2])
    page.wait_for_function("() => document.querySelectorAll('#histogram rect').length > 0")
    assert "p50" in page.inner_text("#summary")
    page.select_option("#stage", "infer")
    assert page.locator("#histogram rect").count() > 0


def test_what_robots_say_is_text_and_nothing_else(page: Any, robots: object) -> None:
    page.wait_for_selector("tr[data-session=arm-2]")
    page.click("tr[data-session=arm-2]")
    page.wait_for_function("() => document.getElementById('reasoning').textContent.includes('onerror')")
    assert EVIL in page.inner_text("#sessions")
    assert page.locator("#sessions img, #reasoning img, #sessions script").count() == 0
    assert page.title() == "DualVLA endpoint"


def test_an_operator_stops_every_robot_and_lets_them_go_on(page: Any, running: LocalEndpoint) -> None:
    answers = iter(["the arm is too near", "it is gone"])
    page.on("dialog", lambda dialog: dialog.accept(next(answers)))
    page.wait_for_function("() => document.getElementById('state').textContent === 'running'")
    page.click("#stop")
    page.wait_for_selector("#banner:not([hidden])")
    assert "the arm is too near" in page.inner_text("#banner")
    state = running.replica.stop_view.stopped()
    assert state is not None
    assert state.reason == "the arm is too near"
    page.click("#clear")
    page.wait_for_selector("#banner", state="hidden")
    assert running.replica.stop_view.stopped() is None


def test_a_session_that_ends_leaves_the_page_in_order(page: Any, robots: Callable[[], None]) -> None:
    page.wait_for_selector("tr[data-session=arm-1]")
    page.click("tr[data-session=arm-1]")
    page.wait_for_selector("#frame:not([hidden])")
    robots()
    page.wait_for_selector("tr[data-session=arm-1]", state="detached")
    page.wait_for_selector("#none:not([hidden])")
    assert "has ended" in page.inner_text("#hint")
    assert not page.is_visible("#frame")


def test_an_endpoint_that_goes_away_is_told(browser: Any) -> None:
    with endpoint(status_page=True) as gone:
        page = browser.new_page()
        page.goto(f"http://{gone.address}/status")
        page.wait_for_function("() => document.getElementById('state').textContent === 'running'")
    page.wait_for_function("() => document.getElementById('state').textContent === 'not answering'")
    assert "What is shown is old" in page.inner_text("#banner")
    page.close()


def test_without_the_key_the_browser_is_asked_for_it(browser: Any, running: LocalEndpoint) -> None:
    for credentials in (None, {"username": "operator", "password": INFER}):
        context = browser.new_context(**({"http_credentials": credentials} if credentials else {}))
        answer = context.request.get(f"http://{running.address}/status")
        assert answer.status == 401
        assert answer.headers["www-authenticate"].startswith("Basic")
        context.close()
