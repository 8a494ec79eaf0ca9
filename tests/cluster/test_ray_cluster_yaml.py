"""`ray_cluster.yaml` without AWS: the schema, the EC2 calls against moto, the start commands.

The start commands run in a real shell, wrapped as Ray wraps them, with a home directory and
programs of the test's own; so what counts is the environment that reaches `ray start`.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.providers import _NODE_PROVIDERS, _get_node_provider
from ray.autoscaler._private.util import prepare_config, validate_config

from ostro.cluster.ray_environment import prepare_environment

_FILE = Path(__file__).parents[2] / "ray_cluster.yaml"
_REGION = "us-west-2"
_PLACEHOLDER = re.compile(r"\b(?:ami|subnet|sg|cr)-[0-9a-f]{17}\b|s3://your-bucket")
_NODE_HOME = "/home/ubuntu"


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return yaml.safe_load(_FILE.read_text())


def test_schema_accepts_the_cluster(cluster):
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    labels = {name: kind["labels"] for name, kind in prepared["available_node_types"].items()}
    assert labels["attention"]["ostro.role"] == "attention"
    assert labels["experts"]["ostro.role"] == "expert"
    assert prepared["available_node_types"]["head"]["resources"] == {"CPU": 0}


def _misspell_head(config: dict[str, Any]) -> None:
    config["hed_node_type"] = config.pop("head_node_type")


def _halve_a_gpu(config: dict[str, Any]) -> None:
    config["available_node_types"]["experts"]["resources"] = {"GPU": 0.5}


def _add_unknown_key(config: dict[str, Any]) -> None:
    config["available_node_types"]["experts"]["lables"] = {}


def _name_a_missing_head(config: dict[str, Any]) -> None:
    config["head_node_type"] = "router"


def _allow_fewer_than_required(config: dict[str, Any]) -> None:
    config["max_workers"] = 1


@pytest.mark.parametrize(
    "spoil",
    [
        _misspell_head,
        _halve_a_gpu,
        _add_unknown_key,
        _name_a_missing_head,
        _allow_fewer_than_required,
    ],
)
def test_schema_refuses_a_spoilt_cluster(cluster, spoil):
    spoilt = copy.deepcopy(cluster)
    spoil(spoilt)
    # Ray raises whatever its validator of the moment raises.
    with pytest.raises(Exception):  # noqa: B017, PT011
        validate_config(prepare_config(spoilt))


def test_every_placeholder_is_marked():
    lines = [line for line in _FILE.read_text().splitlines() if _PLACEHOLDER.search(line)]
    assert len(lines) == 7
    assert all("# YOURS" in line for line in lines)


# ---- the AWS provider


@pytest.fixture(scope="module")
def bootstrapped(tmp_path_factory) -> Iterator[dict[str, Any]]:
    """The cluster as Ray's AWS provider completes it, in an account that has what it names."""
    home = tmp_path_factory.mktemp("home")
    (home / ".ssh").mkdir()  # Ray saves the key pair it makes there
    with pytest.MonkeyPatch.context() as environment, mock_aws():
        environment.setenv("HOME", str(home))
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        for name in ("AWS_CA_BUNDLE", "AWS_PROFILE"):
            environment.delenv(name, raising=False)
        prepared = prepare_config(yaml.safe_load(_with_real_ids(_FILE.read_text())))
        validate_config(prepared)
        provider = _NODE_PROVIDERS["aws"](prepared["provider"])
        detected = provider.fillout_available_node_types_resources(prepared)
        yield provider.bootstrap_config(detected)


def _with_real_ids(text: str) -> str:
    ec2 = boto3.resource("ec2", _REGION)
    vpc = next(iter(ec2.vpcs.all()))
    subnet = next(each for each in vpc.subnets.all() if each.availability_zone == _REGION + "a")
    group = ec2.create_security_group(GroupName="efa", Description="efa", VpcId=vpc.id)
    image = boto3.client("ec2", _REGION).describe_images()["Images"][0]["ImageId"]
    iam = boto3.client("iam", _REGION)
    iam.create_role(RoleName="ostro", AssumeRolePolicyDocument="{}")
    iam.create_instance_profile(InstanceProfileName="ostro")
    iam.add_role_to_instance_profile(InstanceProfileName="ostro", RoleName="ostro")
    ids = {"subnet": subnet.id, "sg": group.id, "ami": image}
    return _PLACEHOLDER.sub(lambda hit: ids.get(hit[0].split("-")[0], hit[0]), text)


def _created(config: dict[str, Any], node_type: str, monkeypatch) -> dict[str, Any]:
    """Arguments with which Ray would ask EC2 for one node of `node_type`."""
    provider = _get_node_provider(config["provider"], config["cluster_name"])
    calls: list[dict[str, Any]] = []

    def create_instances(**arguments: Any) -> list[Any]:
        calls.append(arguments)
        return []

    monkeypatch.setattr(provider.ec2_fail_fast, "create_instances", create_instances)
    node_config = config["available_node_types"][node_type]["node_config"]
    provider.create_node(node_config, {"ray-node-type": "worker"}, 1)
    return calls[0]


def test_aws_provider_finds_the_gpus_of_the_workers(bootstrapped):
    for node_type in ("attention", "experts"):
        resources = bootstrapped["available_node_types"][node_type]["resources"]
        assert resources["GPU"] == 8
        assert resources["accelerator_type:H200"] == 1
    assert bootstrapped["available_node_types"]["head"]["resources"]["CPU"] == 0


@pytest.mark.parametrize("node_type", ["attention", "experts"])
def test_aws_provider_asks_for_one_interface_per_network_card(bootstrapped, node_type, monkeypatch):
    call = _created(bootstrapped, node_type, monkeypatch)
    cards = call["NetworkInterfaces"]
    assert [card["NetworkCardIndex"] for card in cards] == list(range(16))
    assert [card["DeviceIndex"] for card in cards] == [0] + [1] * 15
    assert [card["InterfaceType"] for card in cards] == ["efa"] + ["efa-only"] * 15
    assert all(card["SubnetId"] and card["Groups"] for card in cards)
    assert "SubnetId" not in call
    assert "SecurityGroupIds" not in call


def test_aws_provider_asks_for_the_reserved_capacity(bootstrapped, monkeypatch):
    call = _created(bootstrapped, "experts", monkeypatch)
    assert call["InstanceType"] == "p5en.48xlarge"
    assert call["InstanceMarketOptions"] == {"MarketType": "capacity-block"}
    assert call["Placement"] == {"GroupName": "ostro"}
    assert call["IamInstanceProfile"] == {"Name": "ostro"}
    assert (call["MinCount"], call["MaxCount"]) == (1, 1)


def test_aws_provider_puts_the_head_into_the_same_group(bootstrapped, monkeypatch):
    head = _created(bootstrapped, "head", monkeypatch)
    card = _created(bootstrapped, "experts", monkeypatch)["NetworkInterfaces"][0]
    assert head["SubnetId"] == card["SubnetId"]
    assert head["SecurityGroupIds"] == card["Groups"]


# ---- the commands on the nodes


@pytest.fixture
def run_on_node(tmp_path) -> Callable[[list[str]], None]:
    """A function that runs a node's commands as Ray would, with programs that only take notes."""
    home = tmp_path / "home"
    programs = tmp_path / "programs"
    virtual = home / "ostro" / "venv" / "bin"
    wheels = home / "ostro" / "dist"
    for folder in (programs, virtual, wheels):
        folder.mkdir(parents=True)
    (home / "ostro" / "auth_token").write_text("secret")
    (home / ".bashrc").touch()
    (wheels / "ostro-1.whl").touch()
    for program in ("sudo", "dpkg", "aws", "python3"):
        _write_program(programs / program, "exit 0")
    _write_program(virtual / "pip", f'echo "$@" >> {home}/pip')
    _write_program(virtual / "ray", f'echo "$@" >> {home}/ray; env > {home}/environment')

    def run(commands: list[str]) -> None:
        for command in commands:
            wrapped = f"true && export OMP_NUM_THREADS=1 && ({command})"
            subprocess.run(
                ["bash", "--norc", "-c", wrapped.replace(_NODE_HOME, str(home))],
                env={"HOME": str(home), "PATH": f"{programs}:/usr/bin:/bin", "RAY_HEAD_IP": "h"},
                check=True,
                timeout=30,
            )

    return run


def _write_program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def _product_environment(monkeypatch) -> dict[str, str]:
    """What `ostro serve` wants to find; ports are chosen and paths found by each process."""
    elsewhere = {"RAY_AUTH_TOKEN": "elsewhere", "RAY_ADDRESS": "10.0.0.1:6379"}
    wanted = dict(elsewhere)
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", wanted)
        prepare_environment()
    own = ("_PORT", "_PATH")
    return {
        name: value
        for name, value in wanted.items()
        if name not in elsewhere and not name.endswith(own)
    }


@pytest.mark.parametrize("role", ["head", "worker"])
def test_node_starts_ray_in_the_environment_it_needs(
    cluster, run_on_node, tmp_path, monkeypatch, role
):
    run_on_node(cluster["setup_commands"] + cluster[f"{role}_setup_commands"])
    run_on_node(cluster[f"{role}_start_ray_commands"])
    lines = (tmp_path / "home" / "environment").read_text().splitlines()
    environment = dict(line.split("=", 1) for line in lines if "=" in line)
    wanted = _product_environment(monkeypatch)
    wanted |= {"RAY_enable_autoscaler_v2": "1", "FI_PROVIDER": "efa"}
    assert {name: environment.get(name) for name in wanted} == wanted
    programs = tmp_path / "home" / "ostro" / "venv" / "bin"
    assert environment["RAY_SERVE_HAPROXY_BINARY_PATH"] == str(programs / "ostro-haproxy")
    token = Path(environment["RAY_AUTH_TOKEN_PATH"])
    assert token.read_text() == "secret"
    assert token.stat().st_mode & 0o077 == 0


def test_node_installs_the_wheel_under_the_tested_versions(cluster, run_on_node, tmp_path):
    run_on_node(cluster["setup_commands"])
    installed = (tmp_path / "home" / "pip").read_text()
    assert installed == "install -c constraints.txt ostro-1.whl\n"


def test_head_starts_the_autoscaler_and_no_dashboard(cluster, run_on_node, tmp_path):
    run_on_node(cluster["setup_commands"] + cluster["head_start_ray_commands"])
    stop, start = (tmp_path / "home" / "ray").read_text().splitlines()
    assert stop == "stop"
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start
    assert "--include-dashboard=false" in start


def test_worker_joins_the_head(cluster, run_on_node, tmp_path):
    run_on_node(cluster["setup_commands"] + cluster["worker_start_ray_commands"])
    stop, start = (tmp_path / "home" / "ray").read_text().splitlines()
    assert stop == "stop"
    assert "--address=h:6379" in start
