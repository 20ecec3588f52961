"""Everything an endpoint can be told, in one frozen record. Knows no framework."""

from __future__ import annotations

from dataclasses import dataclass, field

from dualvla.errors import UsageError
from dualvla.wire.mapping import BUILT_IN, ObservationKeys
from dualvla.wire.openpi import WireLimits
from dualvla.wire.options import SessionOptions
from dualvla_serve.limits import Limits
from dualvla_serve.safety import embodiment
from dualvla_serve.sessions import Lifetimes

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Tls:
    """Paths of PEM files, on every node that serves."""

    certificate: str
    key: str


@dataclass(frozen=True)
class Scaling:
    """replicas: at the start. With most > least their number follows the queue: as many as keep `target_waiting`
    observations in front of each. cpus, gpus: what Ray reserves for a replica; fractions allowed."""

    replicas: int = 1
    least: int = 0
    most: int = 0
    target_waiting: float = 8.0
    cpus: float = 0.5
    gpus: float = 0.0

    @property
    def automatic(self) -> bool:
        return self.most > self.least


@dataclass(frozen=True)
class EndpointConfig:
    """One endpoint. Without keys, `host` must be this machine's own address.

    port: of Serve's proxy, 0 for any free one. direct_ports: first and last port for the replicas' own listeners,
    (0, 0) for any, None for no listeners. public_host: the name that they are reached by ("": `host`, or the node's own
    address). state_dir: folder or URL that the emergency stop is kept in; "": not beyond this process.
    max_batch_size: observations per call of a policy. deadline_ms: of requests that carry none. max_silence_s: so long
    after the emergency stop's state was last confirmed, it counts as a stop. send_timeout_s: a client that does not
    read for so long is cut off. record: folder or URL for recordings. allowed_hosts: names that the endpoint without
    keys, and the status page, may be reached by (this machine's, if empty).
    """

    name: str = "dualvla"
    host: str = "127.0.0.1"
    port: int = 8000
    direct_ports: tuple[int, int] | None = (0, 0)
    public_host: str = ""
    keys_file: str | None = None
    tls: Tls | None = None
    scaling: Scaling = field(default_factory=Scaling)
    max_batch_size: int = 16
    deadline_ms: float | None = None
    embodiment: str = "generic"
    session: SessionOptions = field(default_factory=SessionOptions)
    observation_keys: dict[str, ObservationKeys] = field(default_factory=lambda: dict(BUILT_IN))
    lifetimes: Lifetimes = field(default_factory=Lifetimes)
    limits: Limits = field(default_factory=Limits)
    wire: WireLimits = field(default_factory=WireLimits)
    state_dir: str = ""
    max_silence_s: float = 10.0
    send_timeout_s: float = 10.0
    record: str | None = None
    status_page: bool = False
    allowed_hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.keys_file is None and self.host not in LOCAL_HOSTS:
            raise UsageError(
                f"Without keys an endpoint listens on this machine only, not on '{self.host}'.",
                "pass --keys-file, or leave --host out",
            )
        if self.scaling.replicas < 1:
            raise UsageError(f"{self.scaling.replicas} replicas cannot answer.", "ask for 1 or more")
        embodiment(self.embodiment)

    @property
    def local(self) -> bool:
        """For this machine's own programs only."""
        return self.keys_file is None
