"""Profiles: which machines there are, and what a worker of each stage asks of them. One configuration for laptop,
cluster, Kubernetes and the estimate before a run.

    laptop | node8 | nodes:N | spot:N | FILE.json

Knows no stage but by name. The arithmetic of a plan needs no cluster; only `reservation` asks the connected one.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import Any, Literal

from dualvla.config import from_dict
from dualvla.errors import PlatformError, UsageError, did_you_mean
from dualvla.io import storage

VARIABLE = "DUALVLA_PROFILE"
STAGES = ("collect", "prune", "teach", "train", "eval", "serve")
GB = 10**9
_ROUNDING = 1e-6  # Ray counts in 1/10000


@dataclass(frozen=True)
class Pool:
    """least to most machines of one shape. memory_gb: 10^9 bytes. spot: may be taken away at any time. usd_per_hour: of
    one machine, an assumption of whoever writes the profile. selector: labels of the Kubernetes nodes it runs on.
    instance: what a cloud calls such a machine."""

    cpus: float
    memory_gb: float
    gpus: float = 0.0
    least: int = 1
    most: int = 1
    spot: bool = False
    usd_per_hour: float = 0.0
    selector: dict[str, str] = field(default_factory=dict)
    instance: str = ""

    @property
    def capacity(self) -> dict[str, float]:
        return {"CPU": self.cpus, "GPU": self.gpus, "memory_gb": self.memory_gb}


@dataclass(frozen=True)
class Work:
    """The workers of one stage.

    cpus, gpus, memory_gb: of each, reserved from Ray (logical: shares are allowed; memory 0 reserves none). free_cpus:
    what has to stay free beside all workers, for the driver and what reads their data. placement: PACK keeps workers
    that talk to each other together, SPREAD survives the loss of a machine better.
    """

    pool: str
    workers: int
    cpus: float
    gpus: float = 0.0
    memory_gb: float = 0.0
    free_cpus: float = 0.0
    placement: Literal["PACK", "SPREAD"] = "SPREAD"

    @property
    def bundle(self) -> dict[str, float]:
        return {"CPU": self.cpus, "GPU": self.gpus, "memory_gb": self.memory_gb}


@dataclass(frozen=True)
class Profile:
    """head: the pool that Ray's head runs in; a pool of its own (cluster) takes no workers, a shared one (laptop) does.

    Raises: UsageError for a stage of an unknown name or pool, and for a plan that can never be placed.
    """

    name: str
    head: str
    pools: dict[str, Pool]
    stages: dict[str, Work]

    def __post_init__(self) -> None:
        if self.head not in self.pools:
            raise UsageError(f"Profile '{self.name}' has no pool '{self.head}'.", did_you_mean(self.head, self.pools))
        for stage, work in self.stages.items():
            if stage not in STAGES:
                raise UsageError(f"Profile '{self.name}' names stage '{stage}'.", did_you_mean(stage, STAGES))
            if work.pool not in self.pools:
                fix = did_you_mean(work.pool, self.pools)
                raise UsageError(f"Profile '{self.name}', stage '{stage}': no pool '{work.pool}'.", fix)
            nodes = [self.pools[work.pool].capacity] * self.pools[work.pool].most
            check(f"Profile '{self.name}', stage '{stage}'", work, nodes)

    def work(self, stage: str) -> Work:
        """Raises: UsageError if the profile does not have the stage."""
        if stage not in self.stages:
            fix = did_you_mean(stage, self.stages)
            raise UsageError(f"Profile '{self.name}' says nothing of stage '{stage}'.", fix)
        return self.stages[stage]

    def nodes(self, stage: str) -> int:
        """Machines that the stage's workers fill at once."""
        work = self.work(stage)
        return len(
            place([work.bundle] * work.workers, [self.pools[work.pool].capacity] * self.pools[work.pool].most)[0]
        )

    def usd_per_hour(self, stage: str) -> float:
        """Of the stage's machines, and of the head where that is another."""
        pool = self.work(stage).pool
        beside = self.pools[self.head].usd_per_hour if pool != self.head else 0.0
        return self.nodes(stage) * self.pools[pool].usd_per_hour + beside


def place(
    bundles: Sequence[Mapping[str, float]], nodes: Sequence[Mapping[str, float]]
) -> tuple[dict[int, int], list[Mapping[str, float]]]:
    """({node: bundles on it}, what found no room), first fit, largest first. Keys absent on a node count as none."""
    free = [dict(node) for node in nodes]
    used: dict[int, int] = {}
    left: list[Mapping[str, float]] = []
    for bundle in sorted(bundles, key=lambda b: (b.get("GPU", 0.0), b.get("memory_gb", 0.0), b["CPU"]), reverse=True):
        for index, node in enumerate(free):
            if all(node.get(name, 0.0) + _ROUNDING >= amount for name, amount in bundle.items()):
                for name, amount in bundle.items():
                    node[name] = node.get(name, 0.0) - amount
                used[index] = used.get(index, 0) + 1
                break
        else:
            left.append(bundle)
    return used, left


def check(where: str, work: Work, nodes: Sequence[Mapping[str, float]]) -> None:
    """Raises: UsageError, before anything starts, for workers that can never all be placed on these nodes."""
    _, left = place([work.bundle] * work.workers, nodes)
    total = {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU", "memory_gb")}
    if left:
        raise UsageError(
            f"{where}: {len(left)} of {work.workers} workers of {show(work.bundle)} find no room on {len(nodes)} "
            f"machine(s) with {show(total)} in all, and would wait for ever.",
            "ask for fewer or smaller workers, or more machines",
        )
    taken = work.workers * work.cpus
    if taken + work.free_cpus > total["CPU"] + _ROUNDING:
        raise UsageError(
            f"{where}: {work.workers} workers of {work.cpus:g} CPU take {taken:g} of {total['CPU']:g} CPUs and leave "
            f"less than the {work.free_cpus:g} that driver and data readers need: it would hang without an error.",
            f"give each worker at most {max(0.0, total['CPU'] - work.free_cpus) / work.workers:.3g} CPU",
        )


def show(resources: Mapping[str, float]) -> str:
    """{"CPU": 4, "GPU": 1, "memory_gb": 2} as "4 CPU, 1 GPU, 2 GB"."""
    unit = {"memory_gb": "GB"}
    return ", ".join(f"{v:g} {unit.get(k, k)}" for k, v in resources.items() if v) or "nothing"


def laptop() -> Profile:
    """This machine. The shares are what stages take without a profile: they fit side by side on two CPUs."""
    cpus = max(2, os.cpu_count() or 2)
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    return Profile(
        "laptop",
        "laptop",
        {"laptop": Pool(cpus, memory_gb)},
        {
            "collect": Work("laptop", cpus, 0.1),
            "prune": Work("laptop", cpus, 0.4),
            "teach": Work("laptop", cpus, 0.4),
            "train": Work("laptop", 1, 0.5, free_cpus=0.5, placement="PACK"),
            "eval": Work("laptop", cpus, 0.9),
            "serve": Work("laptop", 1, 0.5),
        },
    )


_NODE8 = Pool(cpus=96.0, memory_gb=960.0, gpus=8.0, usd_per_hour=32.0, instance="p4de.24xlarge")
_SPOT_PRICE = 0.4
_CPU_NODE = Pool(cpus=64.0, memory_gb=240.0, usd_per_hour=3.2, instance="m7i.16xlarge")
_HEAD = Pool(cpus=8.0, memory_gb=28.0, usd_per_hour=0.4, instance="m7i.2xlarge")


def node8() -> Profile:
    """One machine with 8 GPUs."""
    return _on_gpus("node8", "gpu", {"gpu": _NODE8}, machines=1, cpu_pool="gpu", cpu_workers=80)


def nodes(count: int) -> Profile:
    """`count` machines with 8 GPUs, and a head that only heads."""
    pools = {"head": _HEAD, "gpu": replace(_NODE8, least=count, most=count, selector={"dualvla.io/pool": "gpu"})}
    return _on_gpus(f"nodes:{count}", "head", pools, machines=count, cpu_pool="gpu", cpu_workers=80 * count)


def spot(count: int) -> Profile:
    """Up to `count` machines with 8 GPUs and twice as many with CPUs, none of them sure to stay; a head that stays."""
    labels = {"gpu": {"dualvla.io/pool": "gpu-spot"}, "cpu": {"dualvla.io/pool": "cpu-spot"}}
    pools = {"head": _HEAD} | {
        name: replace(
            pool, least=0, most=most, spot=True, usd_per_hour=_SPOT_PRICE * pool.usd_per_hour, selector=labels[name]
        )
        for name, pool, most in (("gpu", _NODE8, count), ("cpu", _CPU_NODE, 2 * count))
    }
    return _on_gpus(f"spot:{count}", "head", pools, machines=count, cpu_pool="cpu", cpu_workers=120 * count)


def _on_gpus(
    name: str, head: str, pools: dict[str, Pool], *, machines: int, cpu_pool: str, cpu_workers: int
) -> Profile:
    gpus = int(pools["gpu"].gpus) * machines
    return Profile(
        name,
        head,
        pools,
        {
            "collect": Work(cpu_pool, cpu_workers, 1.0, memory_gb=1.5),
            "prune": Work(cpu_pool, cpu_workers, 1.0, memory_gb=1.5),
            "teach": Work("gpu", gpus, 8.0, gpus=1.0, memory_gb=64.0),
            "train": Work("gpu", gpus, 8.0, gpus=1.0, memory_gb=80.0, free_cpus=16.0, placement="PACK"),
            "eval": Work("gpu", 4 * gpus, 2.0, gpus=0.25, memory_gb=16.0),
            "serve": Work("gpu", gpus, 2.0, gpus=1.0, memory_gb=32.0),
        },
    )


_FIXED = {"laptop": laptop, "node8": node8}
_COUNTED = {"nodes": nodes, "spot": spot}


def get_profile(text: str) -> Profile:
    """Of a name, a name with a number of machines, or JSON with the fields of `Profile`, in a file or as it is.

    Raises: UsageError.
    """
    if text.endswith((".json", "}")):
        try:
            return from_dict(Profile, json.loads(portable(text)), "profile")
        except (json.JSONDecodeError, TypeError) as error:
            raise UsageError(f"'{text}' is no profile: {error}.", "start from `dualvla deploy profile NAME`") from error
    name, colon, number = text.partition(":")
    if name in _FIXED and not colon:
        return _FIXED[name]()
    if name in _COUNTED and number.isdecimal() and int(number) > 0:
        return _COUNTED[name](int(number))
    names = [*_FIXED, *(f"{n}:4" for n in _COUNTED)]
    raise UsageError(f"Unknown profile '{text}'.", did_you_mean(text, names) + ", or a .json file")


def portable(text: str) -> str:
    """A profile's name, or what its file says: the same on another machine."""
    return storage.read_bytes(text).decode() if text.endswith(".json") else text


class _Unsaid(int):
    """A default of an option, told from the same number given on the command line."""


def add_profile(parser: argparse.ArgumentParser, count: str = "workers") -> None:
    """`--profile`, after the options that it gives another default. count: the one with the number of workers."""
    parser.add_argument(
        "--profile",
        default=os.environ.get(VARIABLE),
        metavar="NAME",
        help=f"machines and workers: laptop, node8, nodes:N, spot:N or a JSON file (default: {VARIABLE}, or none)",
    )
    number = parser.get_default(count)
    if number is not None:
        parser.set_defaults(**{count: _Unsaid(number)})


_reserved: dict[str, tuple[Work, bool]] = {}  # of the command that this process runs; whether machines may yet come


def apply_profile(arguments: argparse.Namespace, stage: str, count: str = "workers") -> None:
    """What the profile says of the stage: the number of workers, CPUs and GPUs unless given, and what each reserves.

    Raises: UsageError for an unknown profile.
    """
    _reserved.pop(stage, None)
    given = getattr(arguments, count)
    if isinstance(given, _Unsaid):
        setattr(arguments, count, int(given))  # no YAML writer takes another kind of int
    if arguments.profile is None:
        return
    profile = get_profile(arguments.profile)
    work = profile.work(stage)
    if isinstance(given, (_Unsaid, NoneType)):
        setattr(arguments, count, work.workers)
    for name in ("cpus", "gpus"):
        if name in arguments and getattr(arguments, name) is None:
            setattr(arguments, name, getattr(work, name))
    pool = profile.pools[work.pool]
    _reserved[stage] = replace(work, workers=getattr(arguments, count)), pool.least < pool.most


def reservation(stage: str, cpus: float, gpus: float = 0.0) -> dict[str, Any]:
    """Ray's options of a worker of this stage: what the profile says, else the stage's own `cpus` and `gpus`.

    Raises: PlatformError if the connected cluster can never place all workers that the profile names.
    """
    if stage not in _reserved:
        return {"num_cpus": cpus, "num_gpus": gpus}
    work, grows = _reserved[stage]
    if not grows:
        require(stage, work)
        _reserved[stage] = work, True  # a machine that is lost later will be replaced: then workers wait for it
    options: dict[str, Any] = {"num_cpus": work.cpus, "num_gpus": work.gpus}
    if work.memory_gb:
        options["memory"] = work.memory_gb * GB
    if work.placement == "SPREAD":
        options["scheduling_strategy"] = "SPREAD"
    return options


def require(stage: str, work: Work) -> None:
    """Raises: PlatformError if the connected cluster, as it is, lacks room for the workers."""
    import ray

    nodes = [
        {
            "CPU": node["Resources"].get("CPU", 0.0),
            "GPU": node["Resources"].get("GPU", 0.0),
            "memory_gb": node["Resources"].get("memory", 0.0) / GB,
        }
        for node in ray.nodes()
        if node["Alive"]
    ]
    try:
        check(f"Stage '{stage}' on this cluster", work, nodes)
    except UsageError as error:
        raise PlatformError(error.message, error.fix) from error
