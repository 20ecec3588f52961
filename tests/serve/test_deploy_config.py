"""`dualvla deploy build`: what stands in the file, and that Serve's own schema and our own builder take it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from serve.checkpoints import write_checkpoint

from dualvla import cli
from dualvla.config import from_dict
from dualvla.errors import DataError, PlatformError
from dualvla_serve import deploy_config
from dualvla_serve.config import EndpointConfig, Scaling, Tls

PLAIN = EndpointConfig(port=8123)


def built(models: dict[str, str], config: EndpointConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The application and its one deployment."""
    (application,) = deploy_config.build(models, config)["applications"]
    (deployment,) = application["deployments"]
    return application, deployment


def test_the_file_holds_the_models_once_and_no_default_twice() -> None:
    application, deployment = built({"policy": "/data/a", "big": "s3://b/c"}, PLAIN)
    assert application["args"] == {"port": 8123}
    assert deployment["user_config"] == {"models": {"policy": "/data/a", "big": "s3://b/c"}}
    assert deployment["num_replicas"] == 1


@pytest.mark.parametrize(
    "config",
    [
        PLAIN,
        EndpointConfig(host="0.0.0.0", keys_file="/keys", tls=Tls("/c.pem", "/k.pem"), direct_ports=(9000, 9010)),
        EndpointConfig(scaling=Scaling(replicas=2, least=1, most=4, gpus=0.5), deadline_ms=80.0, status_page=True),
        EndpointConfig(direct_ports=None, embodiment="unlimited", record="s3://bucket/runs", allowed_hosts=("robot",)),
    ],
    ids=["plain", "public", "autoscaled", "others"],
)
def test_what_is_written_is_what_serve_and_our_builder_read(config: EndpointConfig, tmp_path: Path) -> None:
    file = str(tmp_path / "serve.yaml")
    deploy_config.write(file, deploy_config.build({"policy": "/data/a"}, config))
    document = deploy_config.read(file)
    schema = ServeDeploySchema.model_validate(document)
    assert schema.http_options.host == config.host
    (application,) = schema.applications
    again = from_dict(EndpointConfig, application.args, "args")
    if not config.scaling.automatic:
        assert application.deployments[0].num_replicas == config.scaling.replicas
    assert again == config


def test_another_checkpoint_changes_the_user_config_alone() -> None:
    one, two = (deploy_config.build({"policy": folder}, PLAIN) for folder in ("/a", "/b"))
    two["applications"][0]["deployments"][0]["user_config"] = {"models": {"policy": "/a"}}
    assert one == two


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("]", "no YAML"),
        ("3", "no Serve config"),
        ("applications: 3", "applications"),
        ("applications:\n- name: x\n  import_path: nowhere", "import_path"),
        ("applications:\n- {name: x, import_path: 'a:b', deployments: [{name: P, num_replicas: -3}]}", "num_replicas"),
    ],
)
def test_a_broken_file_is_told_where(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(DataError, match=told):
        deploy_config.read(str(file))


def test_no_head_is_told_with_the_remedy() -> None:
    with pytest.raises(PlatformError, match="ray start --head"):
        deploy_config.apply(deploy_config.build({"policy": "/a"}, PLAIN), "http://127.0.0.1:1", 1.0)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["build", "/nowhere", "--out", "x.yaml"], "/nowhere"),
        (["build", "a=/x", "a=/y", "--out", "x.yaml"], "each name once"),
        (["build", "/x", "--host", "0.0.0.0", "--out", "x.yaml"], ""),
        (["build", "/x"], "--out"),
        (["apply", "/nowhere/serve.yaml"], "/nowhere/serve.yaml"),
        (["aply"], "choose from"),
    ],
)
def test_mistakes_end_with_2(argv: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["deploy", *argv]) == 2
    assert told in capsys.readouterr().err


def test_the_command_writes_a_file_for_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_checkpoint = write_checkpoint(str(tmp_path / "dual"))
    out = tmp_path / "serve.yaml"
    argv = ["deploy", "build", tiny_checkpoint, f"again={tiny_checkpoint}", "--out", str(out), "--replicas", "2"]
    assert cli.main([*argv, "--status-page", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == str(out)
    (application,) = yaml.safe_load(out.read_text())["applications"]
    assert application["import_path"] == deploy_config.IMPORT_PATH
    assert application["args"]["status_page"] is True
    (deployment,) = application["deployments"]
    assert deployment["num_replicas"] == 2
    assert list(deployment["user_config"]["models"]) == ["policy", "again"]
