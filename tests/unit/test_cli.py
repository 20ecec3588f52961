"""The command line: exit codes, what goes to which stream, and a start that loads nothing heavy."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from dualvla import cli, errors

HEAVY = {"torch", "ray", "pyarrow", "pandas", "transformers", "deepspeed", "sapien", "PIL"}


class FakeEntry:
    """An entry point whose command runs the given function."""

    def __init__(self, run: Callable[[argparse.Namespace], dict[str, Any]]):
        self._command = cli.Command("a fake", lambda parser: parser.add_argument("--count", type=int), run)

    def load(self) -> cli.Command:
        return self._command


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[argparse.Namespace], dict[str, Any]]], None]:
    def register(run: Callable[[argparse.Namespace], dict[str, Any]]) -> None:
        monkeypatch.setattr(cli, "commands", lambda: {"fake": FakeEntry(run)})

    return register


def raising(error: BaseException) -> Callable[[argparse.Namespace], dict[str, Any]]:
    def run(_: argparse.Namespace) -> dict[str, Any]:
        raise error

    return run


@pytest.mark.parametrize(
    ("argv", "message", "fix"),
    [
        (["prun"], "Unknown command 'prun'.", "did you mean 'prune'?"),
        (["prune"], "the following arguments are required: IN, OUT", "see `dualvla prune --help`"),
        (["prune", "a", "b", "--mod", "both"], "unrecognized arguments: --mod both", "see `dualvla prune --help`"),
        (["prune", "a", "b", "--seed", "x"], "invalid int value: 'x'", "see `dualvla prune --help`"),
    ],
)
def test_wrong_usage_exits_with_2_and_a_fix(
    argv: list[str], message: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert f"fix: {fix}" in err
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (errors.TrainingError("the loss is NaN"), 1, "the loss is NaN"),
        (errors.DataError("truncated", "again"), 2, "fix: again"),
        (KeyboardInterrupt(), 130, "the same command resumes"),
        (ModuleNotFoundError("no", name="sapien.core"), 2, 'pip install "dualvla[sim]"'),
        (ModuleNotFoundError("no", name="torch"), 2, 'pip install "dualvla[train]"'),
    ],
)
def test_exit_codes(
    fake: Callable[..., None], error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(raising(error))
    assert cli.main(["fake"]) == code
    assert message in capsys.readouterr().err


def test_a_bug_is_not_dressed_up_as_a_usage_error(fake: Callable[..., None]) -> None:
    fake(raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["fake"])


def test_json_is_alone_on_stdout(fake: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    fake(lambda arguments: {"count": arguments.count})
    assert cli.main(["fake", "--count", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"count": 3}
    assert cli.call("fake", ["--count", "4"]) == {"count": 4}


def test_a_result_that_is_not_ok_exits_with_1(fake: Callable[..., None]) -> None:
    fake(lambda _: {"ok": False})
    assert cli.main(["fake"]) == 1


def run_main(*argv: str) -> tuple[str, set[str]]:
    """Standard output of `dualvla argv`, and the top-level modules it had loaded at its end."""
    code = f"""
import sys
from dualvla.cli import main
try:
    main({list(argv)!r})
finally:
    print(*sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout, {name.split(".")[0] for name in done.stderr.split()}


def test_help_starts_fast_and_loads_nothing_heavy() -> None:
    seconds = []
    for _ in range(3):
        before = os.times()
        out, loaded = run_main("--help")
        after = os.times()
        assert "doctor" in out
        assert not loaded & HEAVY
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 0.5  # of processor time, which other work on the machine does not stretch


@pytest.mark.parametrize("command", sorted(cli.commands()))
def test_every_command_explains_itself_without_loading_anything_heavy(command: str) -> None:
    out, loaded = run_main(command, "--help")
    assert out.startswith(f"usage: dualvla {command} ")
    assert not loaded & HEAVY


@pytest.mark.parametrize("module", ["dualvla.client", "dualvla.schema", "dualvla.policy", "dualvla.wire"])
def test_the_robots_side_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {name.split(".")[0] for name in done.stdout.split()} & HEAVY


@pytest.mark.parametrize(
    "kind", [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.DualVLAError)]
)
def test_errors_survive_a_process_border(kind: type[errors.DualVLAError]) -> None:
    sent = kind("what", "how")
    found = pickle.loads(pickle.dumps(sent))  # noqa: S301 (as Ray does with what an actor raises)
    assert (type(found), found.message, found.fix, found.exit_code) == (kind, "what", "how", sent.exit_code)
    assert str(kind("what")) == "what"
