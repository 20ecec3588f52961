"""The `dualvla` command: finds subcommands through entry points and imports their heavy parts only when called.

Knows no subcommand: each package registers its own (`[project.entry-points."dualvla.commands"]`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NoReturn

import dualvla
from dualvla import console
from dualvla.errors import DualVLAError, PlatformError, UsageError, did_you_mean

GROUP = "dualvla.commands"
INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """One subcommand. The module that defines it imports nothing heavy at its top.

    run returns a JSON-ready result; `render` makes of it what a person reads. A result with `"ok": False` exits with 1,
    one with `"exit_code"` (of the process it stands for) with that.
    """

    summary: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], dict[str, Any]]
    render: Callable[[Mapping[str, Any]], str] = lambda result: "\n".join(f"{k}: {v}" for k, v in result.items())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}.", f"see `{self.prog} --help`")


# Which extra brings a top-level module that may be missing.
_EXTRA_OF = {
    "torch": "train", "transformers": "train", "deepspeed": "train", "safetensors": "train",
    "ray": "data", "pyarrow": "data", "pandas": "data", "fsspec": "data", "s3fs": "data", "PIL": "data",
    "av": "data", "google_crc32c": "data",
    "mani_skill": "sim", "sapien": "sim", "gymnasium": "sim", "jinja2": "sim",
    "fastapi": "serve", "uvicorn": "serve", "starlette": "serve", "pydantic": "serve", "requests": "serve",
    "openai": "judge", "scipy": "judge",
    "dualvla_pipelines": "all", "dualvla_eval": "all", "dualvla_serve": "all", "dualvla_cluster": "all",
}  # fmt: skip


def commands() -> dict[str, EntryPoint]:
    return {e.name: e for e in sorted(entry_points(group=GROUP), key=lambda e: e.name)}


def call(name: str, argv: Sequence[str]) -> dict[str, Any]:
    """Runs a subcommand in this process and returns its result. Raises what it raises."""
    command, arguments = parse(name, argv)
    return command.run(arguments)


def parse(name: str, argv: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """The subcommand and its arguments. Raises: UsageError on an unknown command or a wrong option."""
    known = commands()
    if name not in known:
        raise UsageError(f"Unknown command '{name}'.", did_you_mean(name, known))
    command: Command = known[name].load()
    parser = _Parser(
        prog=f"dualvla {name}", description=command.summary, formatter_class=_Formatter, allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    parser.add_argument("--verbose", action="store_true", help="log more (to stderr), with tracebacks")
    command.configure(parser)
    return command, parser.parse_args(argv)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    pass


def _help() -> str:
    known = commands()
    width = max((len(n) for n in known), default=0)
    lines = [f"  {name:<{width}}  {entry.load().summary}" for name, entry in known.items()]
    return "\n".join(
        [
            "usage: dualvla COMMAND [options]    (dualvla COMMAND --help explains every option)",
            "",
            "DualVLA: turn a reasoning vision-language-action model into one that also acts well.",
            "",
            "commands:",
            *lines,
            "",
            "exit codes: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    verbose = "--verbose" in argv
    console.setup_logging(verbose)
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_help())
            return 0
        if argv[0] == "--version":
            print(dualvla.__version__)
            return 0
        command, arguments = parse(argv[0], argv[1:])
        result = command.run(arguments)
        print(json.dumps(result) if arguments.json else command.render(result))
        return result.get("exit_code", 0 if result.get("ok", True) else 1)
    except DualVLAError as error:
        return _fail(error, verbose)
    except ModuleNotFoundError as error:
        extra = _EXTRA_OF.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        return _fail(PlatformError(f"This needs '{error.name}'.", f'pip install "dualvla[{extra}]"'), verbose)
    except KeyboardInterrupt:
        print("interrupted: the same command resumes", file=sys.stderr)
        return INTERRUPTED


def _fail(error: DualVLAError, verbose: bool) -> int:
    if verbose:
        console.log.exception("traceback of the error below")
    print(f"error: {error.message}", file=sys.stderr)
    if error.fix:
        print(f"fix: {error.fix}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
