"""Commands as jobs of a running Ray cluster, through its job API. Knows no command, and ships nothing but its name.

The job runs `python -m dualvla COMMAND...` on the head with the cluster's own environment; Ray sets RAY_ADDRESS there,
so `dualvla_cluster.connect` joins the cluster. Ray's token (RAY_AUTH_MODE, RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH) is
read from the environment by Ray itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from dualvla.errors import PlatformError, UsageError

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_CONNECT_TIMEOUT_S = 10.0
_POLL_S = 0.5
_INTERRUPTED = 130


@dataclass(frozen=True)
class Job:
    """status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED. exit_code: of its process, None before its end and where
    no process was started. started: seconds since the epoch, None while it waits."""

    id: str
    status: str
    command: str
    exit_code: int | None
    message: str
    started: float | None
    ended: float | None

    @property
    def finished(self) -> bool:
        return JobStatus(self.status).is_terminal()

    @property
    def process_exit_code(self) -> int:
        """What a shell would see, had the command run there."""
        if self.status == JobStatus.SUCCEEDED:
            return 0
        return self.exit_code or (_INTERRUPTED if self.status == JobStatus.STOPPED else 1)


class Jobs:
    """The job API of one cluster.

    Raises, from every call: PlatformError if the head does not answer or refuses the token, UsageError for a job that
    does not exist.
    """

    def __init__(self, address: str | None = None):
        """address: the head's dashboard, http(s)://HOST:PORT; default: RAY_API_SERVER_ADDRESS, else port 8265 here."""
        self._address = address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS
        _require_listening(self._address)
        with self._translated(), _only_this_address():
            self._client = JobSubmissionClient(self._address)

    def submit(self, argv: Sequence[str], python: str = "python") -> str:
        """Starts `dualvla ARGV`; returns the job's id. python: name or path of the interpreter on the cluster."""
        with self._translated():
            return self._client.submit_job(entrypoint=shlex.join([python, "-m", "dualvla", *argv]))

    def follow(self, job_id: str, write: Callable[[str], object]) -> Job:
        """Passes on what the job prints, as it comes, until the job has finished."""
        with self._translated(job_id):
            asyncio.run(self._tail(job_id, write))
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

    async def _tail(self, job_id: str, write: Callable[[str], object]) -> None:
        async for text in self._client.tail_job_logs(job_id):
            write(text)

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
            raise PlatformError(f"The Ray head at {self._address} failed: {error}") from error


def _job(details: JobDetails) -> Job:
    return Job(
        id=details.submission_id or "",
        status=details.status.value,
        command=details.entrypoint,
        exit_code=details.driver_exit_code,
        message=details.message or "",
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
    )


def _require_listening(address: str) -> None:
    """Ray's client waits for minutes on a host that swallows packets; this tells within seconds."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"'{address}' is no address of a Ray head.", "write it as http://HOST:8265")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), timeout=_CONNECT_TIMEOUT_S).close()
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
