"""Manifests by Kubernetes' own types, our schema of KubeRay's fields, and Ray's own check of `ray up` YAML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from kubernetes import client
from kubernetes.client.configuration import Configuration

from dualvla import cli
from dualvla.errors import UsageError
from dualvla_cluster import manifests
from dualvla_cluster.manifests import Images, KubeOptions
from dualvla_cluster.resources import get_profile

KUBERAY = Path(__file__).parents[2] / "infra" / "kuberay"
FIELDS = yaml.safe_load((KUBERAY / "fields.schema.yaml").read_text())
SERVE = {"http_options": {"host": "0.0.0.0", "port": 8000}, "applications": []}
PLAIN = {
    "Namespace": "V1Namespace",
    "ServiceAccount": "V1ServiceAccount",
    "NetworkPolicy": "V1NetworkPolicy",
    "PodDisruptionBudget": "V1PodDisruptionBudget",
}
_SIMPLE = {"str": str, "int": int, "bool": bool, "float": (int, float), "object": object, "datetime": str}


def strict(value: Any, kind: str, where: str) -> None:
    """`value` is a `kind` of the Kubernetes client to its leaves: no field unknown, none missing, right types."""
    listed = re.fullmatch(r"list\[(.+)\]", kind)
    mapped = re.fullmatch(r"dict\(str, (.+)\)|dict\[str, (.+)\]", kind)
    if listed:
        assert isinstance(value, list), where
        for i, item in enumerate(value):
            strict(item, listed[1], f"{where}[{i}]")
    elif mapped:
        for name, item in value.items():
            strict(item, mapped[1] or mapped[2], f"{where}.{name}")
    elif kind in _SIMPLE:
        assert isinstance(value, _SIMPLE[kind]), f"{where}: {value!r} is no {kind}"
    elif kind != "IntOrString":
        model = getattr(client, kind)
        fields = {key: name for name, key in model.attribute_map.items()}
        assert set(value) <= set(fields), f"{where}: {set(value) - set(fields)}"
        configuration = Configuration()
        configuration.client_side_validation = True
        model(**{fields[key]: item for key, item in value.items()}, local_vars_configuration=configuration)
        for key, item in value.items():
            strict(item, model.openapi_types[fields[key]], f"{where}.{key}")


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    spec = document["spec"]
    cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    extra = [spec["submitterPodTemplate"]] if "submitterPodTemplate" in spec else []
    return [cluster["headGroupSpec"]["template"], *(g["template"] for g in cluster["workerGroupSpecs"]), *extra]


def made(profile: str, **options: Any) -> dict[str, Any]:
    images = Images("dualvla-train:0.1.0", "dualvla-serve:0.1.0")
    job = ["run", "--recipe", "tiny", "--out", "s3://b/it is"]
    return manifests.kubernetes(get_profile(profile), images, KubeOptions(**options), job, SERVE)


@pytest.mark.parametrize("profile", ["node8", "nodes:4", "spot:4"])
def test_every_document_is_what_kubernetes_and_kuberay_take(profile: str) -> None:
    for name, document in made(profile, redis="redis:6379").items():
        if document["apiVersion"] == "ray.io/v1":
            jsonschema.validate(document, FIELDS)
            for i, pod in enumerate(pods(document)):
                strict(pod, "V1PodTemplateSpec", f"{name}: pod {i}")
            limits = (document["spec"].get("rayClusterSpec") or document["spec"]).get("autoscalerOptions") or {}
            strict(limits.get("resources", {}), "V1ResourceRequirements", name)
        elif document["kind"] != "Kustomization":
            strict(document, PLAIN[document["kind"]], name)
        assert yaml.safe_load(manifests.text(document)) == document


def test_a_misspelt_field_is_refused_by_either_check() -> None:
    document = made("spot:4")["raycluster.yaml"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document | {"spec": document["spec"] | {"enableAutoscaling": True}}, FIELDS)
    (pod, *_) = pods(document)
    with pytest.raises(AssertionError, match="nodeSelecter"):
        strict(pod | {"spec": pod["spec"] | {"nodeSelecter": {}}}, "V1PodTemplateSpec", "pod")
    with pytest.raises(ValueError, match="containers"):
        strict({"spec": {"volumes": []}}, "V1PodTemplateSpec", "pod")


def test_pods_are_as_a_restricted_namespace_demands_and_hold_no_secret() -> None:
    for document in made("spot:4").values():
        if document["apiVersion"] != "ray.io/v1":
            continue
        for pod in pods(document):
            spec = pod["spec"]
            (container,) = spec["containers"]
            assert spec["securityContext"]["runAsNonRoot"]
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert "hostPath" not in str(spec)
            public = ("RAY_AUTH_MODE", "DUALVLA_LOG", "DUALVLA_CACHE_GB")
            assert all("value" not in e or "/" in e["value"] or e["name"] in public for e in container["env"])


def test_pools_become_groups_with_their_sizes_tolerations_and_shared_memory() -> None:
    spec = made("spot:4")["raycluster.yaml"]["spec"]
    assert spec["enableInTreeAutoscaling"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"  # the head works for nobody
    groups = {g["groupName"]: g for g in spec["workerGroupSpecs"]}
    assert (groups["gpu"]["minReplicas"], groups["gpu"]["maxReplicas"]) == (0, 4)
    pod = groups["gpu"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert pod["nodeSelector"] == {"dualvla.io/pool": "gpu-spot"}
    assert {"nvidia.com/gpu", "dualvla.io/spot"} <= {t["key"] for t in pod["tolerations"]}
    (memory,) = [v["emptyDir"] for v in pod["volumes"] if v["name"] == "shared-memory"]
    assert memory["medium"] == "Memory"
    assert not made("nodes:4")["raycluster.yaml"]["spec"]["enableInTreeAutoscaling"]
    only = made("node8")["raycluster.yaml"]["spec"]  # one machine: its head works
    assert only["workerGroupSpecs"] == []
    assert "num-cpus" not in only["headGroupSpec"]["rayStartParams"]


def test_the_job_s_words_stay_apart_and_it_is_told_its_profile() -> None:
    spec = made("nodes:4")["rayjob.yaml"]["spec"]
    assert spec["entrypoint"].endswith("run --recipe tiny --out 's3://b/it is'")
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["DUALVLA_PROFILE"] == "nodes:4"


def test_an_endpoint_that_nobody_could_reach_is_refused() -> None:
    with pytest.raises(UsageError, match=r"listens on '127\.0\.0\.1'"):
        manifests.ray_service(get_profile("node8"), "i", KubeOptions(), {"http_options": {"host": "127.0.0.1"}})


def test_the_base_in_the_repository_is_what_the_command_makes(tmp_path: Path) -> None:
    argv = ["kubernetes", "--profile", "spot:4", "--image", "dualvla-train", "--serve-image", "dualvla-serve"]
    cli.call("deploy", [*argv, "--job", "run --recipe tiny --out s3://bucket/tiny", "--out", str(tmp_path)])
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        p.name: p.read_text() for p in (KUBERAY / "base").iterdir()
    }
    overlay = yaml.safe_load((KUBERAY / "overlays" / "example" / "kustomization.yaml").read_text())
    for resource in overlay["resources"]:
        assert (KUBERAY / "overlays" / "example" / resource / "kustomization.yaml").is_file()


def test_a_wrong_job_is_told_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["kubernetes", "--profile", "node8", "--image", "i", "--job", "runn --recipe tiny", "--out", str(tmp_path)]
    assert cli.main(["deploy", *argv]) == 2
    assert "did you mean 'run'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("profile", ["node8", "nodes:4", "spot:4"])
def test_ray_up_takes_the_yaml(profile: str, tmp_path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    file = tmp_path / "cluster.yaml"
    cli.call("deploy", ["ray-up", "--profile", profile, "--image", "dualvla-train:0.1.0", "--out", str(file)])
    found = prepare_config(yaml.safe_load(file.read_text()))
    validate_config(found)
    assert "--dashboard-host=127.0.0.1" in str(found["head_start_ray_commands"])
    broken = yaml.safe_load(file.read_text()) | {"max_wrokers": 3}
    with pytest.raises(Exception, match="max_wrokers"):
        validate_config(prepare_config(broken))
