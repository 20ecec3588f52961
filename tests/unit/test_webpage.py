"""The page server: what the page may do, and that nobody else may do anything."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import pytest

from dualvla.errors import DataError, PlatformError
from dualvla.webpage import Content, Page, PageServer

HTML = b'<!doctype html><script nonce="{{nonce}}">fetch("api/echo?a=1")</script>'


def refuse(_):
    raise DataError("There is no such episode.", "pick another")


def fail(_):
    raise RuntimeError("a secret detail")


PAGE = Page(
    HTML,
    get={"echo": dict, "image": lambda _: Content(b"\x89PNG", "image/png"), "fail": fail},
    post={"save": lambda payload: {"saved": payload}, "refuse": refuse},
    max_body_bytes=100,
)


@pytest.fixture(scope="module")
def server():
    with PageServer(PAGE) as running:
        yield running


@pytest.fixture
def ask(server):
    """ask(method, path after the secret, body, header=value...) -> (status, headers, body)."""
    address = urlsplit(server.url)

    def send(method, path, body=None, *, prefix=address.path, **headers):
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=10)
        sent = {"Content-Type": "application/json"} if body is not None else {}
        sent |= {"Origin": f"http://{address.netloc}"} if method == "POST" else {}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        sent = {name: value for name, value in sent.items() if value is not None}
        try:
            connection.request(method, prefix + path, body, sent)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    return send


def test_the_page_and_its_functions_answer(ask):
    status, headers, body = ask("GET", "")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    (nonce,) = re.findall(rb'nonce="([^"]+)"', body)
    assert f"script-src 'nonce-{nonce.decode()}'" in headers["Content-Security-Policy"]
    assert nonce not in ask("GET", "")[2]  # a new one each time
    assert json.loads(ask("GET", "api/echo?name=red%20cube&step=3")[2]) == {"name": "red cube", "step": "3"}
    assert ask("GET", "api/image")[1]["Content-Type"] == "image/png"
    assert json.loads(ask("POST", "api/save", b'{"a": [1]}')[2]) == {"saved": {"a": [1]}}


@pytest.mark.parametrize("prefix", ["/", "/wrong/", "/..%2f/", "//", "/?/"])
def test_without_the_secret_nothing_is_there(ask, prefix):
    assert ask("GET", "", prefix=prefix)[0] == 404
    assert ask("POST", "api/save", b"{}", prefix=prefix)[0] == 404


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example:80"])
def test_another_name_for_this_machine_is_refused(ask, host):
    assert ask("GET", "", Host=host)[0] == 403
    assert ask("POST", "api/save", b"{}", Host=host)[0] == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1", "http://127.0.0.1:1", ""])
def test_a_page_of_another_site_is_refused(ask, origin):
    assert ask("GET", "api/echo", Origin=origin)[0] == 403
    assert ask("POST", "api/save", b"{}", Origin=origin)[0] == 403


def test_a_post_must_say_where_it_comes_from(ask):
    assert ask("POST", "api/save", b"{}", Origin=None)[0] == 403


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b'{"a": "' + b"x" * 100 + b'"}', {}, 413),
        (b"{}", {"Content_Length": "-2"}, 411),
        (b"{}", {"Content_Length": "9" * 5000}, 413),
        (b"{}", {"Content_Type": "text/plain"}, 415),
        (b"[1]", {}, 400),
        (b"not json", {}, 400),
        (b"\xff\xfe", {}, 400),
        (b"[" * 100, {}, 400),
    ],
)
def test_bodies_that_are_not_what_was_agreed_are_refused(ask, body, headers, status):
    assert ask("POST", "api/save", body, **headers)[0] == status


def test_a_function_is_reached_by_its_own_method_only(ask):
    assert ask("GET", "api/save")[0] == 404
    assert ask("POST", "api/echo", b"{}")[0] == 404
    assert ask("GET", "echo")[0] == 404
    assert ask("DELETE", "api/echo")[0] == 501


def test_our_errors_reach_the_page_and_no_others_do(ask, caplog):
    status, _, body = ask("POST", "api/refuse", b"{}")
    assert (status, json.loads(body)) == (400, {"error": "There is no such episode.", "fix": "pick another"})
    with pytest.raises(http.client.RemoteDisconnected):
        ask("GET", "api/fail")
    assert "a secret detail" in caplog.text  # where the command runs
    assert ask("GET", "api/echo")[0] == 200  # and it goes on


def test_the_secret_is_never_logged(server, ask, caplog):
    caplog.set_level("DEBUG")
    ask("GET", "api/echo")
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.sendall(f"GET {address.path} two words HTTP/1.1\r\n\r\n".encode())
        assert b" 400 " in connection.recv(100)
    assert address.path.strip("/") not in caplog.text


def test_it_listens_on_this_machine_only_and_a_taken_port_is_named(server):
    port = urlsplit(server.url).port
    assert urlsplit(server.url).hostname == "127.0.0.1"
    with pytest.raises(PlatformError, match=f"Port {port} cannot be used"):
        PageServer(PAGE, port)


def test_ctrl_c_ends_it_cleanly():
    code = (
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # may be inherited as ignored
        "from dualvla.webpage import Page, PageServer\n"
        "server = PageServer(Page(b'', {}, {}))\n"
        "print(server.url, flush=True)\nserver.serve()\nprint('done')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    address = urlsplit(process.stdout.readline().strip())
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=10)
    connection.request("GET", address.path)
    assert connection.getresponse().status == 200  # an open connection does not hold it up
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "done\n", "")
