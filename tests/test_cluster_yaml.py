"""cluster.yaml: Ray's launcher takes it, Google's API knows its words, and it is shut."""

from __future__ import annotations

import copy
import ipaddress
import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "cluster.yaml").read_text()

# vCPUs and GPUs of the machine types that the file uses or suggests (Google's tables, 2026).
MACHINES = {"a3-highgpu-8g": (208, 8), "a3-highgpu-1g": (26, 1), "g2-standard-12": (12, 1)}


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(TEXT)


def prepared(cluster: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of a file before it reserves anything."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(cluster))
    validate_config(config)
    return config


def test_the_file_keeps_to_rays_schema(cluster: dict[str, Any]) -> None:
    import ray.autoscaler

    schema = Path(ray.autoscaler.__file__).parent / "ray-schema.json"
    jsonschema.validate(cluster, json.loads(schema.read_text()))


def test_rays_launcher_accepts_the_file(cluster: dict[str, Any]) -> None:
    config = prepared(cluster)
    assert config["available_node_types"]["rollout"]["max_workers"] <= config["max_workers"]
    assert config["available_node_types"][config["head_node_type"]]["max_workers"] == 0


def test_a_head_node_type_that_does_not_exist_is_refused(cluster: dict[str, Any]) -> None:
    cluster["head_node_type"] = "lerner"
    with pytest.raises(ValueError, match="head_node_type"):
        prepared(cluster)


def test_a_misspelt_key_is_refused(cluster: dict[str, Any]) -> None:
    cluster["setup_comands"] = cluster.pop("setup_commands")
    with pytest.raises(jsonschema.ValidationError, match="setup_comands"):
        prepared(cluster)


def test_each_node_type_claims_what_its_machine_has(cluster: dict[str, Any]) -> None:
    for node_type in cluster["available_node_types"].values():
        claimed = (node_type["resources"]["CPU"], node_type["resources"]["GPU"])
        assert claimed == MACHINES[node_type["node_config"]["machineType"]]


def test_names_that_stand_twice_agree(cluster: dict[str, Any]) -> None:
    zone = cluster["provider"]["availability_zone"]
    assert zone.startswith(cluster["provider"]["region"])
    for node_type in cluster["available_node_types"].values():
        node = node_type["node_config"]
        disk_type = node["disks"][0]["initializeParams"]["diskType"]
        assert disk_type.split("/")[:2] == ["zones", zone]
        email = node["serviceAccounts"][0]["email"]
        assert email.split("@")[1].split(".")[0] == cluster["provider"]["project_id"]


def test_googles_api_knows_every_word_of_the_nodes(cluster: dict[str, Any]) -> None:
    googleapiclient = pytest.importorskip("googleapiclient", reason="needs the gcp extra")
    documents = Path(googleapiclient.__file__).parent / "discovery_cache" / "documents"
    schemas = json.loads((documents / "compute.v1.json").read_text())["schemas"]

    def unknown(value: Any, schema: dict[str, Any], where: str) -> list[str]:
        schema = schemas[schema["$ref"]] if "$ref" in schema else schema
        if isinstance(value, list):
            return [w for v in value for w in unknown(v, schema["items"], where)]
        if not isinstance(value, dict):
            if "enum" in schema and value not in schema["enum"]:
                return [f"{where}={value}"]
            return []
        found = []
        for key, inner in value.items():
            if key not in schema["properties"]:
                found.append(f"{where}.{key}")
            else:
                found += unknown(inner, schema["properties"][key], f"{where}.{key}")
        return found

    instance = {"$ref": "Instance"}
    for name, node_type in cluster["available_node_types"].items():
        assert unknown(node_type["node_config"], instance, name) == []
    assert unknown({"scheduling": {"onHostMaintenance": "STAY"}}, instance, "x") != []


def test_the_dashboard_listens_on_loopback_alone(cluster: dict[str, Any]) -> None:
    heads = [c for c in cluster["head_start_ray_commands"] if "ray start" in c]
    assert len(heads) == 1
    words = shlex.split(heads[0])
    hosts = [w.partition("=")[2] for w in words if w.startswith("--dashboard-host")]
    assert len(hosts) == 1 and ipaddress.ip_address(hosts[0]).is_loopback
    assert "0.0.0.0" not in TEXT


def test_every_ray_process_starts_with_the_token(cluster: dict[str, Any], tmp_path: Path) -> None:
    """Run the shell lines as the launcher wraps them, with a `ray` that writes down its world."""
    from ray.autoscaler._private.command_runner import _with_interactive

    def launch(command: str) -> None:
        subprocess.run(
            " ".join(_with_interactive(command)),
            shell=True,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            timeout=30,
            env={"HOME": str(tmp_path), "PATH": os.environ["PATH"], "RAY_HEAD_IP": "10.0.0.1"},
        )

    recorder = tmp_path / "venv" / "bin" / "ray"
    recorder.parent.mkdir(parents=True)
    recorder.write_text('#!/bin/sh\n{ echo "$@"; env | grep ^RAY_; echo; } >> "$HOME/seen"\n')
    recorder.chmod(0o755)

    writes_env = [c for c in cluster["setup_commands"] if "aquarl.env" in c]
    for command in writes_env * 2:  # `ray up` on a running cluster sets up again
        launch(command)
    assert (tmp_path / ".bashrc").read_text().count("aquarl.env") == 1

    starts = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    for command in starts:
        launch(command)
    runs = (tmp_path / "seen").read_text().strip().split("\n\n")
    assert len(runs) == len(starts) == 4
    for run in runs:
        environment = dict(line.split("=", 1) for line in run.splitlines()[1:])
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN_PATH"] == f"{tmp_path}/.ray/auth_token"
        assert environment["RAY_health_check_failure_threshold"] == "4"
    assert runs[3].startswith("start --address=10.0.0.1:6379")


def test_hosts_of_ones_own_are_told_the_same_checks() -> None:
    def checks(text: str) -> dict[str, str]:
        return dict(re.findall(r"\b(RAY_(?:health|raylet)_\w+)=(\d+)", text))

    assert checks((ROOT / "docs" / "hosts.md").read_text()) == checks(TEXT)
    assert len(checks(TEXT)) == 5


def test_the_token_reaches_every_node_and_stands_in_no_file_here(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"]["~/.ray/auth_token"].startswith("~/")
    assert "RAY_AUTH_TOKEN=" not in TEXT
    assert any("chmod 600 ~/.ray/auth_token" in c for c in cluster["setup_commands"])


def test_nodes_install_the_lock_of_this_repository(cluster: dict[str, Any]) -> None:
    assert (ROOT / cluster["file_mounts"]["~/requirements.lock"]).is_file()
    assert any(c.endswith("--requirement ~/requirements.lock") for c in cluster["setup_commands"])
