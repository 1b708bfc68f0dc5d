"""Ray clusters of this machine that tests start with `ray start`, and end again process by process.

`ray stop` would end every Ray here, those of others too.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fault.runs import Process, processes, wait_until

RAY = str(Path(sys.executable).with_name("ray"))
MARK = "ERNIEM_TEST_CLUSTER"  # in the environment of every process of a cluster
START_S = 120.0
GONE_S = 10.0


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on now."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


class Head:
    """A head node on 127.0.0.1, with ports and a token of its own.

    Attributes:
        address: for --address and RAY_ADDRESS.
        dashboard: URL of the dashboard, which takes jobs.
        environment: of processes that are to use it; no variable of another Ray among them.
    """

    def __init__(self, folder: Path, n_cpus: int, dashboard: bool) -> None:
        self.folder = folder
        self.token = uuid.uuid4().hex * 2
        port, web, agent, client = free_ports(4)
        self.address = f"127.0.0.1:{port}"
        self.dashboard = f"http://127.0.0.1:{web}"
        self._mark = uuid.uuid4().hex
        inherited = {name: v for name, v in os.environ.items() if not name.startswith("RAY_")}
        self.environment = inherited | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on 127.0.0.1 it stays
            "PATH": os.pathsep.join([str(Path(RAY).parent), os.environ["PATH"]]),
            "HOME": str(folder),  # no settings of this machine's user
            MARK: self._mark,
        }
        self._command = [RAY, "start", "--head", "--node-ip-address=127.0.0.1", f"--port={port}"]
        self._command += [f"--num-cpus={n_cpus}", f"--object-store-memory={150 << 20}"]
        self._command += [f"--dashboard-agent-listen-port={agent}", "--disable-usage-stats"]
        self._command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={web}"]
        self._command += [f"--include-dashboard={str(dashboard).lower()}"]
        self._command += [f"--ray-client-server-port={client}", f"--temp-dir={folder}"]
        # Any port that is free, rather than 10002 and those after it, which other clusters use too.
        self._command += ["--min-worker-port=0", "--max-worker-port=0"]

    def start(
        self, options: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        done = subprocess.run(
            [*self._command, *options],
            env={**self.environment, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=START_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout

    def processes(self, name: str = "") -> list[Process]:
        """What belongs to it and has the name in its command, this process excepted."""
        mark = f"{MARK}={self._mark}".encode()
        found = []
        for process in processes().values():
            with suppress(OSError):
                environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
                if mark in environment and name in process.command and process.pid != os.getpid():
                    found.append(process)
        return found

    def raylets(self) -> list[int]:
        """Process numbers of its nodes; a fork of one that has yet to become an agent is none."""
        there = {process.pid: process for process in self.processes("raylet/raylet")}
        return sorted(pid for pid, process in there.items() if process.parent not in there)

    def end(self) -> None:
        """Ends all its processes, first the monitor, which would start nodes anew."""
        for process in self.processes("monitor.py"):
            _kill(process)

        def none_left() -> bool:
            left = self.processes()
            for process in left:
                _kill(process)
            return not left

        assert wait_until(none_left, GONE_S, every=0.3), f"still there: {self.processes()}"


def _kill(process: Process) -> None:
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)


@contextmanager
def head_with_jobs(n_cpus: int) -> Iterator[Head]:
    """A cluster of one node that takes jobs."""
    with short_folder() as folder:
        head = Head(folder, n_cpus, dashboard=True)
        try:
            head.start()
            yield head
        finally:
            head.end()


@contextmanager
def growing_cluster(
    groups: Mapping[str, Mapping[str, Any]], v2: bool, as_ray_up: bool
) -> Iterator[Head]:
    """A head without CPUs, and an autoscaler that starts nodes on this machine and ends them again.

    Args:
        groups: by name what a group has: resources, max_workers.
        v2: whether the autoscaler is v2.
        as_ray_up: the settings are in the home directory of the head, where `ray up` leaves them.
    """
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    with short_folder() as folder:
        head = Head(folder, n_cpus=0, dashboard=False)
        settings = autoscaler_settings(groups) | {
            "provider": {
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider"
                ".FakeMultiNodeProvider",
                "gcs_address": head.address,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
                "foreground_node_launch": True,
                "worker_rpc_drain": True,
                "head_node_id": FAKE_HEAD_NODE_ID,
                "launch_multiple": True,
                "use_node_id_as_ip": True,  # all of them have the same
            }
        }
        file = folder / ("ray_bootstrap_config.yaml" if as_ray_up else "autoscaler.json")
        file.write_text(json.dumps(settings))
        environment = {
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        }
        if v2:
            environment["RAY_enable_autoscaler_v2"] = "1"
            environment["RAY_CLOUD_INSTANCE_ID"] = FAKE_HEAD_NODE_ID
        try:
            head.start([f"--autoscaling-config={file}"], environment)
            yield head
        finally:
            head.end()


def autoscaler_settings(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """As in the file that `ray up` reads, with nodes that go after six seconds without work."""
    kinds = {name: {"node_config": {}, "min_workers": 0, **group} for name, group in groups.items()}
    return {
        "cluster_name": "test",
        "max_workers": sum(group.get("max_workers", 0) for group in groups.values()),
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 10.0,
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            **kinds,
        },
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in LISTS},
        "file_mounts_sync_continuously": False,
    }


LISTS = (
    "cluster_synced_files",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "rsync_exclude",
    "rsync_filter",
)


@contextmanager
def short_folder() -> Iterator[Path]:
    """A temporary folder whose name leaves room for Ray's sockets: 107 bytes in all."""
    with tempfile.TemporaryDirectory(prefix="eb-", ignore_cleanup_errors=True) as name:
        yield Path(name)
