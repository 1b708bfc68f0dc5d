"""Cluster files for `ray up`."""

import json
from collections.abc import Mapping
from typing import Any

import jsonschema

from manifests.common import Problem, Problems, image_name, joined, leaves, listed


def vm_problems(file: str, config: dict[str, Any]) -> Problems:
    """Of a file for `ray up`: what Ray checks itself, and what it does not."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        prepared = prepare_config(json.loads(json.dumps(config)))
        validate_config(prepared)
    except jsonschema.ValidationError as error:
        yield Problem(file, joined(error.absolute_path) or "top", "Ray's schema", error.message)
        return
    except (ValueError, AssertionError, KeyError) as error:
        yield Problem(file, "top", "what Ray takes", f"{type(error).__name__}: {error}")
        return
    for name in ("max_workers", "idle_timeout_minutes", "docker", "file_mounts"):
        if name not in config:
            yield Problem(file, name, "a value", "none")
            return
    yield from _node_type_problems(file, config)
    yield from _start_problems(file, config)
    for name in ("head_setup_commands", "worker_setup_commands"):
        for command in prepared[name]:
            if "install" in command:
                expected = "nothing: all is in the image"
                yield Problem(file, name, expected, command)


def _node_type_problems(file: str, config: Mapping[str, Any]) -> Problems:
    docker, types = config["docker"], config["available_node_types"]
    head = config["head_node_type"]
    provider = config["provider"]["type"]
    if docker.get("head_image") != image_name(provider):
        expected = image_name(provider)
        yield Problem(file, "docker.head_image", expected, repr(docker.get("head_image")))
    for name, node in types.items():
        where, resources = f"available_node_types.{name}", node["resources"]
        if name == head:
            if resources != {"CPU": 0}:
                expected = "{'CPU': 0}: no work on the head"
                yield Problem(file, f"{where}.resources", expected, repr(resources))
            continue
        low, high = node.get("min_workers", 0), node.get("max_workers", config["max_workers"])
        if not 0 == low <= high <= config["max_workers"]:
            expected = f"min_workers 0, max_workers up to the cluster's {config['max_workers']}"
            yield Problem(file, where, expected, f"{low} and {high}")
        image = node.get("docker", {}).get("worker_image", docker.get("worker_image"))
        expected = image_name("cuda" if resources.get("GPU") else "cpu")
        if image != expected:
            yield Problem(file, f"{where}, its worker_image", expected, repr(image))


def _start_problems(file: str, config: Mapping[str, Any]) -> Problems:
    """Tokens, the dashboard, the autoscaler, who may log in."""
    if "--env RAY_AUTH_MODE=token" not in config["docker"].get("run_options", []):
        expected = "--env RAY_AUTH_MODE=token"
        yield Problem(file, "docker.run_options", expected, repr(config["docker"]))
    if "~/.ray/auth_token" not in config["file_mounts"]:
        got = listed(config["file_mounts"])
        yield Problem(file, "file_mounts", "~/.ray/auth_token", got or "none")
    demands = {
        "head_start_ray_commands": (
            "--dashboard-host=127.0.0.1",
            "RAY_enable_autoscaler_v2=1",
            "--autoscaling-config=~/ray_bootstrap_config.yaml",
            "--metrics-export-port=8080",
        ),
        "worker_start_ray_commands": ("--address=$RAY_HEAD_IP:6379", "--metrics-export-port=8080"),
    }
    for name, words in demands.items():
        command = " ".join(config.get(name, []))
        for word in words:
            if word not in command.split():
                yield Problem(file, name, word, command)
    open_to_all = [path for path, value in leaves(config["provider"]) if value == "0.0.0.0/0"]
    for path in open_to_all:
        yield Problem(file, f"provider.{path}", "a network of yours", "0.0.0.0/0")
