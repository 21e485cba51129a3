"""cluster.yaml passes Ray's own schema and launcher, an emulated AWS takes its nodes, and the cluster is closed.

Nothing here has started a machine: AWS is moto.
"""

import copy
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions
import jsonschema
import pytest
import ray.autoscaler
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws import config as aws_config
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")


def fenced(language: str) -> list[str]:
    """The blocks of that language in docs/cluster.md."""
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL)


@pytest.fixture
def raw() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    return content


def all_commands(raw: dict[str, Any]) -> list[str]:
    return [command for key, commands in raw.items() if key.endswith("_commands") for command in commands]


def start_commands(raw: dict[str, Any]) -> list[str]:
    return [raw["head_start_ray_commands"][-1], raw["worker_start_ray_commands"][-1]]


def test_ray_accepts_the_file(raw: dict[str, Any]) -> None:
    validate_config(prepare_config(raw))


@pytest.mark.parametrize(
    "place",
    [
        pytest.param((), id="top"),
        pytest.param(("auth",), id="auth"),
        pytest.param(("available_node_types", "gpu"), id="node type"),
        pytest.param(("docker",), id="docker"),
    ],
)
def test_ray_refuses_a_misspelt_key(place: tuple[str, ...], raw: dict[str, Any]) -> None:
    target = raw
    for step in place:
        target = target.setdefault(step, {})
    target["max_worker"] = 1
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config(raw))


def test_provider_keys_are_those_that_ray_knows(raw: dict[str, Any]) -> None:
    """Ray's schema lets a provider have any key, so it is looked at here."""
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))
    assert set(raw["provider"]) <= set(schema["properties"]["provider"]["properties"])


def test_every_start_option_is_one_of_ray(raw: dict[str, Any]) -> None:
    for command in start_commands(raw):
        words = shlex.split(command)
        start.make_context("start", words[words.index("start") + 1 :])  # raises where an option or its value is none


def test_every_command_is_a_shell_command(raw: dict[str, Any]) -> None:
    for command in all_commands(raw):
        subprocess.run(["bash", "-n", "-c", command], check=True, timeout=30)


def test_the_share_of_the_object_store_is_what_ray_takes(raw: dict[str, Any]) -> None:
    code = "from ray._private.ray_constants import DEFAULT_OBJECT_STORE_MEMORY_PROPORTION as share; print(share)"
    for command in start_commands(raw):
        settings = dict(re.findall(r"(RAY_DEFAULT\w+)=(\S+?)[;\s]", command))
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **settings}, capture_output=True, text=True, timeout=60
        )
        assert done.stdout.strip() == "0.2", done.stderr


def test_the_cluster_is_closed_and_the_head_runs_no_work(raw: dict[str, Any]) -> None:
    for command in start_commands(raw):
        assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token" in command
    assert "--dashboard-host=127.0.0.1" in raw["head_start_ray_commands"][-1]
    assert "--num-cpus=0 --num-gpus=0" in raw["head_start_ray_commands"][-1]
    assert raw["available_node_types"]["head"]["resources"] == {"CPU": 0, "GPU": 0}
    for node_type in raw["available_node_types"].values():
        assert node_type["node_config"]["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}


def test_no_node_has_a_group_that_ray_makes(raw: dict[str, Any]) -> None:
    """Ray's own lets the world try its keys at port 22. An id that is nobody's is refused: closed until it is yours."""
    groups = {tuple(item["node_config"]["SecurityGroupIds"]) for item in raw["available_node_types"].values()}
    assert groups == {("sg-00000000000000000",)}
    [block] = [block for block in fenced("sh") if "create-security-group" in block]
    assert "sg-00000000000000000" in block
    opened = [line for line in block.splitlines() if "--port" in line]
    assert opened
    assert all("--port 22 --cidr $(curl" in line and line.endswith("/32") for line in opened)


def test_no_key_is_written_in_the_file() -> None:
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    assert "AWS_SECRET" not in text
    assert "AKIA" not in text


def test_nodes_get_the_token_the_wheel_and_the_versions(raw: dict[str, Any]) -> None:
    mounts = raw["file_mounts"]
    assert mounts == {
        "~/.ray/auth_token": "~/.ray/auth_token",
        "~/dist": "dist",
        "~/constraints.txt": "constraints.txt",
    }
    [install] = [command for command in raw["setup_commands"] if "pip install" in command]
    assert "-c ~/constraints.txt ~/dist/kinoray-*.whl" in install
    assert "--wheel-dir dist" in GUIDE


def test_setup_may_run_again(raw: dict[str, Any], tmp_path: Path) -> None:
    """The launcher runs the setup of a node whenever a mounted file changed; pip and apt-get are left out here."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("token", encoding="utf-8")
    commands = [command for command in raw["setup_commands"] if "pip" not in command and "apt-get" not in command]
    assert len(commands) == 3
    for command in commands * 2:
        environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        subprocess.run(["bash", "-c", command], env=environment, check=True, timeout=30)
    assert (tmp_path / ".bashrc").read_text(encoding="utf-8") == "export PATH=$HOME/kinoray/bin:$PATH\n"
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "spill").stat().st_mode & 0o777 == 0o700


def test_the_image_variant_of_the_guide_is_accepted(raw: dict[str, Any]) -> None:
    [variant] = [yaml.safe_load(block) for block in fenced("yaml") if "docker:" in block]
    validate_config(prepare_config({**raw, **variant}))
    for command in start_commands(variant):
        words = shlex.split(command)
        start.make_context("start", words[words.index("start") + 1 :])
        assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token" in command


@pytest.fixture
def emulated_aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """AWS by moto, with the roles that docs/cluster.md has one make. A home of its own, for Ray's key pair."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)
    trust, *policies = [json.loads(block) for block in fenced("json")]
    with mock_aws():
        iam = boto3.client("iam")
        for name, documents in (("kinoray-head", policies), ("kinoray-worker", policies[:1])):
            iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps(trust))
            for index, document in enumerate(documents):
                iam.put_role_policy(RoleName=name, PolicyName=f"kinoray-{index}", PolicyDocument=json.dumps(document))
            iam.create_instance_profile(InstanceProfileName=name)
            iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
        yield


@pytest.mark.ray
@pytest.mark.usefixtures("emulated_aws")
def test_an_emulated_aws_starts_a_node_of_each_type(raw: dict[str, Any]) -> None:
    ec2 = boto3.client("ec2", raw["provider"]["region"])
    group = ec2.create_security_group(GroupName="kinoray", Description="closed")["GroupId"]
    for item in raw["available_node_types"].values():
        item["node_config"]["SecurityGroupIds"] = [group]
    config = prepare_config(raw)
    validate_config(config)
    config = aws_config.bootstrap_aws(AWSNodeProvider.fillout_available_node_types_resources(config))
    types = config["available_node_types"]
    assert {name: item["resources"].get("CPU") for name, item in types.items()} == {"head": 0, "decode": 16, "gpu": 48}
    assert types["gpu"]["resources"]["GPU"] == 4

    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    found = {}
    for name, item in types.items():
        [created] = provider.create_node(item["node_config"], {"ray-user-node-type": name}, 1).values()
        [reservation] = boto3.client("ec2").describe_instances(InstanceIds=[created.id])["Reservations"]
        [found[name]] = reservation["Instances"]
    profiles = {name: instance["IamInstanceProfile"]["Arn"].split("/")[-1] for name, instance in found.items()}
    assert profiles == {"head": "kinoray-head", "decode": "kinoray-worker", "gpu": "kinoray-worker"}
    assert {name for name, item in found.items() if item.get("InstanceLifecycle") == "spot"} == {"decode"}
    assert {each["GroupId"] for item in found.values() for each in item["SecurityGroups"]} == {group}
    rules = [rule for each in ec2.describe_security_groups()["SecurityGroups"] for rule in each["IpPermissions"]]
    assert not [rule for rule in rules if {"CidrIp": "0.0.0.0/0"} in rule["IpRanges"]]  # Ray's own would open port 22

    misspelt = copy.deepcopy(types["decode"]["node_config"])
    misspelt["InstanceMarketOption"] = {}
    with pytest.raises(botocore.exceptions.ParamValidationError, match="InstanceMarketOption"):
        provider.create_node(misspelt, {}, 1)
