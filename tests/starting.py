"""Applications on the Ray Serve of a test; one that does not start says where it stands still."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fault.runs import wait_until

# A replica imports torch and loads a tiny model: some seconds, on a busy machine half a minute.
STARTS_IN_S = 150
MAX_STACK_CHARS = 2500


def start(application: Any, name: str) -> None:
    """Runs it, in place of the one of that name; returns when it is ready."""
    from ray import serve

    target = serve.RunTarget(application, name=name, route_prefix="/")
    serve.run_many([target], wait_for_applications_running=False)
    ended = ("RUNNING", "DEPLOY_FAILED", "UNHEALTHY")

    def status() -> str:
        return str(serve.status().applications[name].status.value)

    wait_until(lambda: status() in ended, STARTS_IN_S, every=0.1)
    if status() != "RUNNING":
        pytest.fail(f"{name} is {status()}:\n{_where_it_stands(name)}", pytrace=False)


def _where_it_stands(name: str) -> str:
    import ray
    from ray.serve.context import _get_global_client

    details = _get_global_client().get_serve_details()["applications"][name]
    lines = [f"free: {ray.available_resources()}"]
    for deployment, what in details["deployments"].items():
        lines.append(f"{deployment}: {what['status']} {what['message']}")
        for replica in what["replicas"]:
            lines += [f"  {replica['state']} pid={replica['pid']}", _stack(replica["pid"])]
    return "\n".join(lines)


def _stack(pid: int | None) -> str:
    if pid is None:
        return "  no process yet"
    spy = Path(sys.executable).with_name("py-spy")
    command = [spy, "dump", "-p", str(pid)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr)[:MAX_STACK_CHARS]
