"""The Vulkan driver that renders on a CPU: what installs it on this machine, and installing it.

Knows Debian's and Ubuntu's apt; names no mirror of its own: a suite that is missing is derived from the machine's own
sources. Knows nothing of what is rendered.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dualvla.errors import PlatformError

APT = Path("/etc/apt")
OS_RELEASE = Path("/etc/os-release")
_PACKAGES = ("libx11-6", "libvulkan1")  # SAPIEN's wheel links to the first and loads the second
_DRIVER = "mesa-vulkan-drivers"
# Mesa 22.3 of Debian 12 offers no device that SAPIEN 3 accepts; the one of its backports does.
_NEEDS_BACKPORTS = ("bookworm",)
_ONE_LINE = re.compile(r"deb\s+(?:\[(?P<options>[^]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s+(?P<components>[^#]+)")


@dataclass(frozen=True)
class Source:
    """One apt source. options: what stands in brackets before the URI, such as signed-by, for the one-line format."""

    uri: str
    suite: str
    components: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()

    def line(self) -> str:
        options = " ".join(f"{name}={value}" for name, value in self.options)
        return f"deb {f'[{options}] ' if options else ''}{self.uri} {self.suite} {' '.join(self.components)}"


@dataclass(frozen=True)
class Plan:
    """What installs the driver: a source to add (or None) in `source_file`, then apt commands."""

    added: Source | None
    commands: tuple[tuple[str, ...], ...]
    source_file: Path = APT / "sources.list.d" / "dualvla-backports.list"

    def shell(self) -> str:
        """The same as one line for a person who may become root."""
        steps = [shlex.join(command) for command in self.commands]
        if self.added:
            steps.insert(0, f"echo {shlex.quote(self.added.line())} > {self.source_file}")
        return f"{'sudo ' if os.geteuid() else ''}sh -c {shlex.quote(' && '.join(steps))}"


def plan(os_release: Path = OS_RELEASE, apt: Path = APT) -> Plan | None:
    """None where there is no apt, or Debian 12 names no source to derive its backports from."""
    if not apt.is_dir() or not os_release.is_file():
        return None
    codename = _os_release(os_release.read_text()).get("VERSION_CODENAME", "")
    install = ("apt-get", "install", "-y", "--no-install-recommends")
    update = ("apt-get", "update")
    if codename not in _NEEDS_BACKPORTS:
        return Plan(None, (update, (*install, *_PACKAGES, _DRIVER)))
    backports = f"{codename}-backports"
    sources = read_sources(apt)
    added = None
    if not any(source.suite == backports for source in sources):
        base = next((s for s in sources if s.suite == codename and "main" in s.components), None)
        if base is None:
            return None
        added = Source(base.uri, backports, ("main",), base.options)
    return Plan(added, (update, (*install, *_PACKAGES), (*install, "-t", backports, _DRIVER)))


def install(found: Plan) -> None:
    """Runs the plan. Raises: PlatformError if this user may not, or a step fails."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise PlatformError("Installing the Vulkan driver needs root and apt.", found.shell())
    if found.added:
        found.source_file.write_text(found.added.line() + "\n")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in found.commands:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise PlatformError(f"`{shlex.join(command)}` failed: {reason}.", found.shell())


def read_sources(apt: Path) -> list[Source]:
    """The binary sources of `sources.list` and `sources.list.d`, in both of apt's formats, disabled ones left out."""
    files = [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*"))]
    found: list[Source] = []
    for file in files:
        if file.suffix == ".list" and file.is_file():
            found += _one_line_format(file.read_text())
        elif file.suffix == ".sources" and file.is_file():
            found += _deb822_format(file.read_text())
    return found


def _one_line_format(text: str) -> list[Source]:
    found = []
    for line in text.splitlines():
        match = re.match(
            r"deb\s+(?:\[(?P<options>[^]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s+(?P<components>[^#]+)", line
        )
        if match:
            options = tuple(option.partition("=")[::2] for option in (match["options"] or "").split())
            found.append(Source(match["uri"], match["suite"], tuple(match["components"].split()), options))
    return found


def _deb822_format(text: str) -> list[Source]:
    found = []
    for stanza in re.split(r"\n\s*\n", text):
        lines = (line for line in stanza.splitlines() if ":" in line and not line.startswith(("#", " ", "\t")))
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() == "no":
            continue
        # A key written out in the stanza (an empty first line) has no place in a one-line source; apt then says so.
        options = (("signed-by", fields["signed-by"]),) if fields.get("signed-by") else ()
        found += [
            Source(uri, suite, tuple(fields.get("components", "").split()), options)
            for uri in fields.get("uris", "").split()
            for suite in fields.get("suites", "").split()
        ]
    return found


def _os_release(text: str) -> Mapping[str, str]:
    pairs = (line.partition("=")[::2] for line in text.splitlines() if "=" in line)
    return {name: value.strip().strip('"') for name, value in pairs}
