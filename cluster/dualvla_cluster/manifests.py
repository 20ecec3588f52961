"""Kubernetes manifests (KubeRay 1.4) and `ray up` YAML, made from a profile: the same pools, workers and names.

What is made is a kustomize base: plain documents and a `kustomization.yaml`, to be changed by overlays and not by hand.
Secrets are named, never contained. Knows the fields of KubeRay and of the autoscaler, and no running cluster.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from dualvla.errors import UsageError
from dualvla_cluster import shipping, start
from dualvla_cluster.resources import VARIABLE, Pool, Profile

Document = dict[str, Any]

USER = 10001
_DASHBOARD, _GCS, _CLIENT, _SERVE, _METRICS, _AGENT = 8265, 6379, 10001, 8000, 8080, 52365
_SHARED_MEMORY_SHARE = 0.3  # of a pod's memory: what Ray takes for its object store
_SCRATCH = "/scratch"
_CACHE_SHARE = 0.5  # of the scratch disk: the rest is for Ray's logs and spilling, and for what is being written
_SERVE_KEYS = "/var/run/secrets/dualvla-keys"


@dataclass(frozen=True)
class Images:
    """Repositories with a tag or digest. train: for pipelines; serve: for policies."""

    train: str
    serve: str


@dataclass(frozen=True)
class KubeOptions:
    """name: of all objects. Of the secrets, token_secret holds `token`, Ray's; the entries of storage_secret
    (AWS_ACCESS_KEY_ID, ...) become variables, "" where pods have an identity of their own; keys_secret holds `keys`, of
    the endpoint. redis: HOST:PORT that keeps the state of a lost head, its password as `password` in redis_secret; ""
    for none. scratch_gb: local disk of a pod for caches."""

    name: str = "dualvla"
    namespace: str = "dualvla"
    token_secret: str = "dualvla-ray-token"
    storage_secret: str = "dualvla-storage"
    keys_secret: str = "dualvla-keys"
    redis: str = ""
    redis_secret: str = "dualvla-redis"
    scratch_gb: int = 200


def kubernetes(
    profile: Profile, images: Images, options: KubeOptions, job: Sequence[str], serve: Mapping[str, Any] | None
) -> dict[str, Document]:
    """File name -> document. job: a dualvla command; serve: what `dualvla deploy build` has made, None for no service.

    Raises: UsageError for a Serve config that listens inside its pod only.
    """
    found = {
        "namespace.yaml": _namespace(options),
        "serviceaccount.yaml": _account(options),
        "networkpolicy.yaml": _network_policy(options),
        "disruptionbudget.yaml": _disruption_budget(options),
        "raycluster.yaml": ray_cluster(profile, images.train, options),
        "rayjob.yaml": ray_job(profile, images.train, options, job),
    }
    if serve is not None:
        found["rayservice.yaml"] = ray_service(profile, images.serve, options, serve)
    resources = [name for name in found if name != "rayjob.yaml"]  # a job is created when it is meant to run
    return {"kustomization.yaml": _kustomization(options, resources), **found}


def ray_cluster(profile: Profile, image: str, options: KubeOptions) -> Document:
    spec = _cluster_spec(profile, image, options, tuple(profile.pools))
    return _document("ray.io/v1", "RayCluster", options, spec)


def ray_job(profile: Profile, image: str, options: KubeOptions, command: Sequence[str]) -> Document:
    """A cluster for one command; it is made again, and the command resumes, up to three times."""
    variables = {VARIABLE: profile.name, start.EXPECTED: json.dumps(shipping.pinned())}
    spec = {
        "entrypoint": shlex.join(["python", "-m", "dualvla_cluster.start", *command]),
        "submissionMode": "K8sJobMode",
        "runtimeEnvYAML": yaml.safe_dump({"env_vars": variables}),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "backoffLimit": 3,
        "submitterPodTemplate": _submitter(image, options),
        "rayClusterSpec": _cluster_spec(profile, image, options, tuple(profile.pools)),
    }
    return _document("ray.io/v1", "RayJob", options, spec)


def _submitter(image: str, options: KubeOptions) -> Document:
    """The pod that tells the cluster of the job: KubeRay's own would be refused by a `restricted` namespace."""
    pod = _pod("submitter", Pool(cpus=0.5, memory_gb=1.0), image, options, {}, keys=False)
    container = pod["spec"]["containers"][0] | {"name": "ray-job-submitter"}
    for name in ("readinessProbe", "livenessProbe", "lifecycle", "ports"):
        del container[name]
    return {**pod, "spec": pod["spec"] | {"containers": [container], "restartPolicy": "Never"}}


def ray_service(profile: Profile, image: str, options: KubeOptions, serve: Mapping[str, Any]) -> Document:
    """The endpoint, on the pool of the profile's stage `serve`; an upgrade starts a second cluster, then switches.

    Raises: UsageError as `kubernetes` does.
    """
    host = (serve.get("http_options") or {}).get("host", "")
    if host not in ("0.0.0.0", "::"):
        raise UsageError(
            f"The Serve config listens on '{host}', which nothing outside its pod reaches.",
            f"build it with --host 0.0.0.0 --keys-file {_SERVE_KEYS}/keys",
        )
    spec = {
        "serveConfigV2": yaml.safe_dump(dict(serve), sort_keys=False),
        "upgradeStrategy": {"type": "NewCluster"},
        "rayClusterConfig": _cluster_spec(profile, image, options, (profile.work("serve").pool,), keys=True),
    }
    return _document("ray.io/v1", "RayService", options, spec)


def _document(version: str, kind: str, options: KubeOptions, spec: Document, **more: Any) -> Document:
    labels = {"app.kubernetes.io/name": "dualvla", "app.kubernetes.io/managed-by": "dualvla-deploy"}
    return {
        "apiVersion": version,
        "kind": kind,
        "metadata": {"name": options.name, "namespace": options.namespace, "labels": labels},
        **({"spec": spec} if spec else {}),
        **more,
    }


def _cluster_spec(
    profile: Profile, image: str, options: KubeOptions, pools: Sequence[str], keys: bool = False
) -> Document:
    head = profile.pools[profile.head]
    shared = profile.head in {work.pool for work in profile.stages.values()}  # the head's machine also works
    head_params = {"dashboard-host": "0.0.0.0", **({} if shared else {"num-cpus": "0", "num-gpus": "0"})}
    ports = {"gcs": _GCS, "dashboard": _DASHBOARD, "client": _CLIENT, "serve": _SERVE, "metrics": _METRICS}
    spec: Document = {
        "rayVersion": shipping.pinned()["ray"],
        "enableInTreeAutoscaling": any(pool.least < pool.most for pool in profile.pools.values()),
        "autoscalerOptions": {
            "idleTimeoutSeconds": 120,
            "upscalingMode": "Default",
            "resources": {"limits": {"cpu": "500m", "memory": "1Gi"}, "requests": {"cpu": "500m", "memory": "1Gi"}},
            "securityContext": _container_security(),
        },
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "rayStartParams": head_params,
            "template": _pod("head", head, image, options, ports, keys, operator_account=True),
        },
        "workerGroupSpecs": [
            {
                "groupName": name,
                "replicas": pool.least,
                "minReplicas": pool.least,
                "maxReplicas": pool.most,
                "rayStartParams": {},
                "template": _pod(name, pool, image, options, {"metrics": _METRICS, "serve": _SERVE}, keys),
            }
            for name, pool in profile.pools.items()
            if name in pools and name != profile.head
        ],
    }
    if options.redis:
        password = {"valueFrom": {"secretKeyRef": {"name": options.redis_secret, "key": "password"}}}
        spec["gcsFaultToleranceOptions"] = {"redisAddress": options.redis, "redisPassword": password}
    return spec


def _pod(
    group: str,
    pool: Pool,
    image: str,
    options: KubeOptions,
    ports: Mapping[str, int],
    keys: bool,
    operator_account: bool = False,
) -> Document:
    amounts: dict[str, str] = {"cpu": f"{pool.cpus:g}", "memory": f"{pool.memory_gb * 1e9:.0f}"}
    if pool.gpus:
        amounts["nvidia.com/gpu"] = f"{pool.gpus:g}"
    shared_memory = {"medium": "Memory", "sizeLimit": f"{_SHARED_MEMORY_SHARE * pool.memory_gb * 1e9:.0f}"}
    volumes: list[Document] = [
        {"name": "shared-memory", "emptyDir": shared_memory},
        {"name": "scratch", "emptyDir": {"sizeLimit": f"{options.scratch_gb}Gi"}},
        {"name": "ray-token", "secret": {"secretName": options.token_secret, "defaultMode": 0o440}},
    ]
    mounts = [
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        {"name": "scratch", "mountPath": _SCRATCH},
        {"name": "ray-token", "mountPath": "/var/run/secrets/ray", "readOnly": True},
    ]
    if keys:
        volumes.append({"name": "keys", "secret": {"secretName": options.keys_secret, "defaultMode": 0o440}})
        mounts.append({"name": "keys", "mountPath": _SERVE_KEYS, "readOnly": True})
    container: Document = {
        "name": "ray-head" if group == "head" else "ray-worker",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "resources": {"limits": amounts, "requests": dict(amounts)},
        "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
        "env": [
            {"name": "RAY_AUTH_MODE", "value": "token"},
            {"name": "RAY_AUTH_TOKEN_PATH", "value": "/var/run/secrets/ray/token"},
            {"name": "DUALVLA_LOG", "value": "json"},
            {"name": "TMPDIR", "value": _SCRATCH},
            {"name": "HOME", "value": _SCRATCH},
            {"name": "DUALVLA_CACHE", "value": f"{_SCRATCH}/cache"},
            {"name": "DUALVLA_CACHE_GB", "value": f"{_CACHE_SHARE * options.scratch_gb:.0f}"},
        ],
        "volumeMounts": mounts,
        "securityContext": _container_security(),
        "readinessProbe": _probe(group == "head", period_s=10, failures=6),
        "livenessProbe": _probe(group == "head", period_s=20, failures=9),
        "lifecycle": {"preStop": {"exec": {"command": ["/bin/sh", "-c", "ray stop"]}}},
    }
    if options.storage_secret:
        container["envFrom"] = [{"secretRef": {"name": options.storage_secret}}]
    spec: Document = {
        "containers": [container],
        "volumes": volumes,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "terminationGracePeriodSeconds": 100 if pool.spot else 30,
    }
    if not operator_account:  # KubeRay gives the head an account of its own, which its autoscaler needs
        spec |= {"serviceAccountName": options.name, "automountServiceAccountToken": False}
    if pool.selector:
        spec["nodeSelector"] = dict(pool.selector)
    tolerations = _tolerations(pool)
    if tolerations:
        spec["tolerations"] = tolerations
    annotations = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "true" if pool.spot else "false"}
    labels = {"app.kubernetes.io/name": "dualvla", "dualvla.io/pool": group}
    return {"metadata": {"annotations": annotations, "labels": labels}, "spec": spec}


def _tolerations(pool: Pool) -> list[Document]:
    keys = ["nvidia.com/gpu"] if pool.gpus else []
    if pool.spot:  # ours, and what two clouds put on such nodes
        keys += ["dualvla.io/spot", "cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"]
    return [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in keys]


def _container_security() -> Document:
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True,
        "runAsUser": USER,
    }


def _probe(head: bool, period_s: int, failures: int) -> Document:
    """Ray's own answers, which need no token."""
    at = (
        {"path": "/api/gcs_healthz", "port": _DASHBOARD}
        if head
        else {"path": "/api/local_raylet_healthz", "port": _AGENT}
    )
    return {
        "httpGet": at,
        "initialDelaySeconds": 10,
        "periodSeconds": period_s,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _namespace(options: KubeOptions) -> Document:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": options.namespace, "labels": labels}}


def _account(options: KubeOptions) -> Document:
    return _document("v1", "ServiceAccount", options, {}, automountServiceAccountToken=False)


def _network_policy(options: KubeOptions) -> Document:
    """In: each other, the operator, Prometheus, and robots to the endpoint. Out: each other, DNS and HTTPS."""
    ours = {"matchLabels": {"app.kubernetes.io/name": "dualvla"}}
    dns = [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]
    inward = [
        {"from": [{"podSelector": ours}]},
        {"from": [_namespaces("kuberay-system")], "ports": [_tcp(_DASHBOARD), _tcp(_SERVE), _tcp(_AGENT)]},
        {"from": [_namespaces("monitoring")], "ports": [_tcp(_METRICS), _tcp(_SERVE)]},
        {"from": [{"namespaceSelector": {"matchLabels": {"dualvla.io/robots": "true"}}}], "ports": [_tcp(_SERVE)]},
    ]
    outward = [{"to": [{"podSelector": ours}]}, {"ports": dns}, {"ports": [_tcp(443)]}]
    spec = {"podSelector": ours, "policyTypes": ["Ingress", "Egress"], "ingress": inward, "egress": outward}
    return _document("networking.k8s.io/v1", "NetworkPolicy", options, spec)


def _namespaces(name: str) -> Document:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def _tcp(port: int) -> Document:
    return {"protocol": "TCP", "port": port}


def _disruption_budget(options: KubeOptions) -> Document:
    """Nodes may be drained of workers, never of the head while it works."""
    selector = {"matchLabels": {"app.kubernetes.io/name": "dualvla", "dualvla.io/pool": "head"}}
    return _document("policy/v1", "PodDisruptionBudget", options, {"maxUnavailable": 0, "selector": selector})


def _kustomization(options: KubeOptions, resources: Sequence[str]) -> Document:
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": options.namespace,
        "resources": list(resources),
    }


def ray_up(profile: Profile, image: str, region: str) -> Document:
    """What `ray up` takes, for machines of AWS. The token lies in ~/.ray/auth_token of who starts it, and is copied.

    Raises: UsageError for a pool whose `instance` is not named.
    """
    for name, pool in profile.pools.items():
        if not pool.instance:
            raise UsageError(f"Pool '{name}' of profile '{profile.name}' names no instance.", "give it `instance`")
    token = "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=~/.ray/auth_token"
    return {
        "cluster_name": "dualvla",
        "provider": {"type": "aws", "region": region, "cache_stopped_nodes": False},
        "auth": {"ssh_user": "ubuntu"},
        "docker": {
            "image": image,
            "container_name": "dualvla",
            "run_options": ["--shm-size=30%", "--ulimit nofile=65536"],
        },
        "max_workers": sum(pool.most for name, pool in profile.pools.items() if name != profile.head),
        "idle_timeout_minutes": 5,
        "head_node_type": profile.head,
        "available_node_types": {name: _node_type(name, pool, profile) for name, pool in profile.pools.items()},
        "file_mounts": {"~/.ray/auth_token": "~/.ray/auth_token"},
        "head_start_ray_commands": [
            "ray stop",
            f"{token} ray start --head --port={_GCS} --dashboard-host=127.0.0.1 "
            "--autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"{token} ray start --address=$RAY_HEAD_IP:{_GCS}"],
    }


def _node_type(name: str, pool: Pool, profile: Profile) -> Document:
    head = name == profile.head
    shared = name in {work.pool for work in profile.stages.values()}
    resources = {"CPU": int(pool.cpus) if shared else 0, **({"GPU": int(pool.gpus)} if pool.gpus else {})}
    node: Document = {"InstanceType": pool.instance}
    if pool.spot:
        node["InstanceMarketOptions"] = {"MarketType": "spot"}
    counts = {} if head else {"min_workers": pool.least, "max_workers": pool.most}
    return {"resources": resources, "node_config": node, **counts}


def text(document: Mapping[str, Any]) -> str:
    note = "# Made by `dualvla deploy`; change the profile or an overlay, not this file.\n"
    return note + yaml.safe_dump(dict(document), sort_keys=False, width=120)
