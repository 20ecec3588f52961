"""Commands as jobs of a running Ray cluster, through its job API. Knows no command.

A job brings the DualVLA that is installed here (`shipping`), and runs on the head with the cluster's own Python. Ray
sets RAY_ADDRESS there, so `dualvla_cluster.connect` joins the cluster. Ray's token (RAY_AUTH_MODE, RAY_AUTH_TOKEN or
RAY_AUTH_TOKEN_PATH) is read from the environment by Ray itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shlex
import socket
import ssl
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from dualvla.console import RUN_VARIABLE
from dualvla.errors import PlatformError, UsageError
from dualvla_cluster import secrets, shipping, start
from dualvla_cluster.resources import GB, Profile, check, show

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
CA_VARIABLE = "DUALVLA_CA_FILE"
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_CONNECT_TIMEOUT_S = 10.0
_POLL_S = 0.5
_LOOK_EVERY_S = 10.0
_INTERRUPTED = 130
_OVER_QUOTA = "status code 429"
_CUT_OFF = "WebSocket connection closed"
_TALKATIVE = ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging")


@dataclass(frozen=True)
class Job:
    """status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED. exit_code: of its process, None before its end and where
    no process was started. started: seconds since the epoch, None while it waits. code: digest of what was shipped."""

    id: str
    status: str
    command: str
    exit_code: int | None
    message: str
    started: float | None
    ended: float | None
    code: str = ""

    @property
    def finished(self) -> bool:
        return JobStatus(self.status).is_terminal()

    @property
    def process_exit_code(self) -> int:
        """What a shell would see, had the command run there."""
        if self.status == JobStatus.SUCCEEDED:
            return 0
        return self.exit_code or (_INTERRUPTED if self.status == JobStatus.STOPPED else 1)


@dataclass(frozen=True)
class Shipment:
    """What goes with a command. code: "installed" brings the DualVLA that is installed here, "image" nothing: the
    cluster's own is used. environment: "cluster" uses the cluster's packages, which must have the versions pinned here;
    "pinned" has Ray install those versions on every node. variables: for every process of the job; secrets: see
    `secrets`. python: name or path of the interpreter on the cluster."""

    code: Literal["installed", "image"] = "installed"
    environment: Literal["cluster", "pinned"] = "cluster"
    variables: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict)
    python: str = "python"


class Jobs:
    """The job API of one cluster.

    Raises, from every call: PlatformError if the head does not answer, refuses the token or a quota; UsageError for a
    job that does not exist.
    """

    def __init__(self, address: str | None = None, ca_file: str | None = None):
        """address: the head's dashboard, http(s)://HOST:PORT; default: RAY_API_SERVER_ADDRESS, else port 8265 here.
        ca_file: certificates that an https address is checked against (default: DUALVLA_CA_FILE, else the system's)."""
        for name in _TALKATIVE:
            logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
        self._address = address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS
        ca_file = ca_file or os.environ.get(CA_VARIABLE)
        if ca_file is not None and not Path(ca_file).is_file():
            raise UsageError(f"There is no certificate file '{ca_file}'.", "pass --ca FILE.pem")
        _require_listening(self._address, ca_file)
        with self._translated(), _only_this_address():
            self._client = JobSubmissionClient(self._address, verify=ca_file or True)

    def check_version(self) -> None:
        """Raises: PlatformError if the cluster runs another Ray than this one."""
        theirs = self._get("/api/version")["ray_version"]
        if theirs != ray.__version__:
            raise PlatformError(
                f"The cluster at {self._address} runs Ray {theirs}, here is {ray.__version__}.",
                f"install ray=={theirs} here, or bring the cluster to {ray.__version__}: they do not mix",
            )

    def submit(self, argv: Sequence[str], shipment: Shipment) -> str:
        """Starts `dualvla ARGV`; returns the job's id, or that of the very same command where it runs already."""
        self.check_version()
        entrypoint = shlex.join([shipment.python, "-m", "dualvla_cluster.start", *argv])
        for job in self.list():
            if job.command == entrypoint and not job.finished:
                return job.id
        with tempfile.TemporaryDirectory(prefix="dualvla-") as folder, self._translated():
            parts = shipping.unpack(Path(folder)) if shipment.code == "installed" else []
            code = shipping.digest(parts) if parts else "image"
            job_id = f"dualvla-{uuid.uuid4().hex[:12]}"
            return self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=job_id,
                runtime_env=_runtime_env(shipment, parts, job_id),
                metadata={"dualvla_code": code, "dualvla_version": shipping.installed(shipping.DISTRIBUTION) or ""},
            )

    def follow(self, job_id: str, write: Callable[[str], object], say: Callable[[str], object] = print) -> Job:
        """Passes on what the job prints, as it comes, until the job has finished. say: told what the job waits for,
        when that changes."""
        with self._translated(job_id):
            asyncio.run(self._tail(job_id, write, say))
        while not (job := self.status(job_id)).finished:
            time.sleep(_POLL_S)
        return job

    def status(self, job_id: str) -> Job:
        with self._translated(job_id):
            return _job(self._client.get_job_info(job_id))

    def list(self) -> list[Job]:
        """Newest first. Only what was submitted as a job, not every driver that has joined the cluster."""
        with self._translated():
            jobs = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(jobs, key=lambda job: job.started or 0.0, reverse=True)

    def logs(self, job_id: str) -> str:
        with self._translated(job_id):
            return self._client.get_job_logs(job_id)

    def stop(self, job_id: str) -> Job:
        """Asks the job to stop (SIGTERM) and waits until it has."""
        with self._translated(job_id):
            self._client.stop_job(job_id)
        while not (job := self.status(job_id)).finished:
            time.sleep(_POLL_S)
        return job

    def require(self, profile: Profile, stages: Sequence[str]) -> None:
        """Raises: PlatformError, naming what lacks, for a stage whose workers the cluster's machines cannot hold now.
        A pool that may grow is taken to be as large as it may become."""
        nodes = [
            {"CPU": r.get("CPU", 0.0), "GPU": r.get("GPU", 0.0), "memory_gb": r.get("memory", 0.0) / GB}
            for r in (n["resources_total"] for n in self._state("nodes") if n["state"] == "ALIVE")
        ]
        for stage in stages:
            work = profile.work(stage)
            if profile.pools[work.pool].least < profile.pools[work.pool].most:
                continue
            try:
                check(f"Profile '{profile.name}', stage '{stage}', on {self._address}", work, nodes)
            except UsageError as error:
                raise PlatformError(error.message, f"{error.fix}; or submit with --queue and add machines") from error

    def waiting(self) -> str | None:
        """What waits for room on the whole cluster and why, in one line; None if nothing does."""
        status = self._get("/api/cluster_status")["data"].get("clusterStatus") or {}
        load, scaler = status.get("loadMetricsReport") or {}, status.get("autoscalerReport") or {}
        groups = [b for group, n in load.get("pgDemand") or [] for b in group["bundles"] for _ in range(n)]
        wanted = [(bundle, n) for bundle, n in [*(load.get("resourceDemand") or []), *groups] if bundle]
        if not wanted:
            return None
        usage = load.get("usage") or {}
        has = {name: usage.get(name, [0.0, 0.0]) for name in ("CPU", "GPU")}
        lacking = {
            name: most
            for name in sorted({name for bundle, _ in wanted for name in bundle})
            if (most := max(bundle.get(name, 0.0) for bundle, _ in wanted)) > _largest(load, name)
        }
        text = (
            f"waits for room: {'; '.join(f'{n} x ({show(_gigabytes(b))})' for b, n in wanted)}. In use: "
            + ", ".join(f"{used:g} of {total:g} {name}" for name, (used, total) in has.items())
        )
        if lacking:
            text += f". No machine here has {show(_gigabytes(lacking))}: it waits until one is added"
        failed = [f"{kind}: {why}" for kind, why in _launch_failures(scaler).items()]
        return text + (f". New machines failed to start ({'; '.join(failed)})" if failed else "")

    def free_disk_bytes(self) -> dict[str, float]:
        """Worker node -> what is left of the disk of Ray's folder there, as it last reported. In pods Ray does not
        look (a total of 1 byte says so): Kubernetes evicts one that fills its disk."""
        found = {}
        for node in self._get("/nodes?view=summary")["data"]["summary"]:
            disks = [disk for path, disk in (node.get("disk") or {}).items() if path != "/" and disk["total"] > 1]
            if disks and node["raylet"]["state"] == "ALIVE" and not node["raylet"]["isHeadNode"]:
                found[node["raylet"]["nodeId"]] = float(disks[0]["free"])
        return found

    async def _tail(self, job_id: str, write: Callable[[str], object], say: Callable[[str], object]) -> None:
        watch = asyncio.create_task(self._watch(say))
        try:
            async for text in self._client.tail_job_logs(job_id):
                write(text)
        finally:
            watch.cancel()

    async def _watch(self, say: Callable[[str], object]) -> None:
        """Says what waits once it has waited twice in a row: what is placed within seconds is not worth a line."""
        before, now, said = None, None, None
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            with contextlib.suppress(PlatformError):  # a head that does not answer is told by who follows the log
                now = await asyncio.to_thread(self.waiting)
            if now is not None and now.partition(". In use")[0] == before and before != said:
                say(now)
                said = before
            before = now and now.partition(". In use")[0]

    def _get(self, path: str) -> dict[str, Any]:
        with self._translated():
            answer = self._client._do_request("GET", path)  # the only way that carries its token and certificates
            if answer.status_code != 200:
                raise RuntimeError(f"status code {answer.status_code}: {answer.text[:200]}")
            return answer.json()

    def _state(self, kind: str) -> Sequence[dict[str, Any]]:
        return self._get(f"/api/v0/{kind}?detail=1&limit=10000")["data"]["result"]["result"]

    @contextlib.contextmanager
    def _translated(self, job_id: str | None = None) -> Iterator[None]:
        """Ray's errors as ours."""
        try:
            yield
        except AuthenticationError as error:
            raise PlatformError(
                f"The Ray head at {self._address} refused this token.",
                "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the head's token file",
            ) from error
        except (ConnectionError, requests.exceptions.RequestException) as error:
            raise _unreachable(self._address, str(error)) from error
        except RuntimeError as error:  # all that Ray's client says of any other HTTP status
            if job_id is not None and "status code 404" in str(error):
                raise UsageError(f"No job '{job_id}' at {self._address}.", "`dualvla jobs list` names them") from error
            if _CUT_OFF in str(error):
                raise PlatformError(
                    f"The Ray head at {self._address} went away while job {job_id} ran.",
                    "once it is back, the same command again follows the job, or resumes it",
                ) from error
            if _OVER_QUOTA in str(error):
                raise PlatformError(
                    f"{self._address} refused this by a quota: {error}",
                    "wait for jobs to end (`dualvla jobs list`), or ask whoever keeps the cluster",
                ) from error
            raise PlatformError(f"The Ray head at {self._address} failed: {error}") from error


def _runtime_env(shipment: Shipment, parts: Sequence[Path], job_id: str) -> dict[str, Any]:
    variables = {**shipment.variables, start.EXPECTED: json.dumps(shipping.pinned()), RUN_VARIABLE: job_id}
    if shipment.secrets:
        variables[secrets.VARIABLE] = json.dumps(dict(shipment.secrets))
    found: dict[str, Any] = {"env_vars": variables}
    if parts:
        found["py_modules"] = [str(part) for part in parts]
    if shipment.environment == "pinned":
        found["pip"] = {"packages": shipping.requirements(), "pip_check": False}
    return found


def _largest(load: Mapping[str, Any], name: str) -> float:
    """Of all machines, the most that one has of a resource."""
    return max((kind.get(name, 0.0) for kind, _ in load.get("nodeTypes") or []), default=0.0)


def _gigabytes(bundle: Mapping[str, float]) -> dict[str, float]:
    return {"memory_gb" if n == "memory" else n: round(v / GB, 1) if n == "memory" else v for n, v in bundle.items()}


def _launch_failures(scaler: Mapping[str, Any]) -> dict[str, str]:
    """Kind of machine -> why the last one did not start, such as a quota of the cloud or the namespace."""
    kinds = (scaler.get("nodeAvailabilitySummary") or {}).get("nodeAvailabilities") or {}
    return {
        kind: (record.get("unavailableNodeInformation") or {}).get("description", "unknown reason")
        for kind, record in kinds.items()
        if not record.get("isAvailable", True)
    }


def _job(details: JobDetails) -> Job:
    return Job(
        id=details.submission_id or "",
        status=details.status.value,
        command=details.entrypoint,
        exit_code=details.driver_exit_code,
        message=details.message or "",
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        code=(details.metadata or {}).get("dualvla_code", ""),
    )


def _require_listening(address: str, ca_file: str | None) -> None:
    """Ray's client waits for minutes on a host that swallows packets, and does not tell a certificate that it does not
    trust from a closed port; this does, within seconds."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"'{address}' is no address of a Ray head.", "write it as http://HOST:8265")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname, port), timeout=_CONNECT_TIMEOUT_S) as connection:
            if parts.scheme == "https":
                trusted = ssl.create_default_context(cafile=ca_file)
                trusted.wrap_socket(connection, server_hostname=parts.hostname).close()
    except ssl.SSLCertVerificationError as error:
        raise PlatformError(
            f"The certificate of {address} is not trusted: {error.verify_message}.",
            f"pass the authority that signed it with --ca FILE or {CA_VARIABLE}",
        ) from error
    except OSError as error:
        raise _unreachable(address, str(error)) from error


def _unreachable(address: str, reason: str) -> PlatformError:
    return PlatformError(
        f"No Ray head answers at {address}: {reason}.",
        f"start one with `ray start --head`, or name its dashboard with --address or {ADDRESS_VARIABLE}",
    )


@contextlib.contextmanager
def _only_this_address() -> Iterator[None]:
    """Ray's client lets these variables override the address it is given; here the address is already decided."""
    names = (ADDRESS_VARIABLE, "RAY_ADDRESS")
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)
