"""Which Ray a job runs on, and whether that Ray can ever hold what the job asks for."""

import logging
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from erniem_batch.errors import ConfigError
from erniem_batch.job.config import JobConfig

THREADS_OF_A_LARGE_ACTOR = 4
# Logical CPUs beside the actors', for Ray's own small tasks; without them a pool that takes every
# CPU stands still for ever.
SPARE_CPUS = 2
RESTARTS = 100
LOCAL_OBJECT_STORE_BYTES = 256 << 20  # only receipts pass through it


@dataclass(frozen=True, slots=True)
class Pool:
    """The actors of a job.

    Attributes:
        cpus, gpus: of each.
        restarts: how often an actor that died is started anew. A row that ends its process does so
            three times (see `attempts`); Ray Data's own default is for ever.
    """

    min_actors: int
    max_actors: int
    cpus: int
    gpus: float
    restarts: int


def connect(config: JobConfig) -> bool:
    """Connects to the cluster of the job; True if it was started just for this run."""
    cores = os.cpu_count() or 1
    pool = local_pool(config, cores)
    return connect_to(config.address, max(cores, pool.max_actors * pool.cpus) + SPARE_CPUS)


def connect_to(address: str | None, local_cpus: int, metrics_port: int | None = None) -> bool:
    """Connects to a cluster; True if it was started just for this run.

    Args:
        address: None: that of RAY_ADDRESS, else a local one.
        local_cpus: logical CPUs of a local one.
        metrics_port: of a local one, for Prometheus; None: any.
    """
    # Set before Ray is imported: it reads them once.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    local = address is None
    if local and "RAY_AUTH_MODE" not in os.environ:
        # A cluster of our own: only this run knows its token, and no file is written.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray

    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": True}
    if local:
        options |= {
            "address": "local",
            "num_cpus": local_cpus,
            "include_dashboard": False,
            "object_store_memory": LOCAL_OBJECT_STORE_BYTES,
            "_node_ip_address": "127.0.0.1",
        }
        if metrics_port is not None:
            options["_metrics_export_port"] = metrics_port
    else:
        options["address"] = address
    try:
        with _quiet_core():
            ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"--address {address}: no Ray cluster answers there: {error}") from error
    return local


@contextmanager
def _quiet_core() -> Iterator[None]:
    """No error line on the terminal for every pool whose actors may be started anew.

    Ray's core warns that the arguments of their constructor could be lost; ours are a few hundred
    bytes on the driver's own node. Its threshold is read when the driver connects, which tells the
    terminal that too, and must not reach the processes started before, which would each say so.
    """
    from ray._private import worker

    connect, name = worker.connect, "RAY_BACKEND_LOG_LEVEL"

    def connect_quietly(*args: Any, **options: Any) -> Any:
        if name in os.environ:
            return connect(*args, **options)
        os.environ[name] = "fatal"
        terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        try:
            return connect(*args, **options)
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            os.close(nowhere)
            del os.environ[name]

    worker.connect = connect_quietly
    try:
        yield
    finally:
        worker.connect = connect


def local_pool(config: JobConfig, cores: int) -> Pool:
    """Actors for one machine: one with all threads on 4 cores or fewer."""
    gpus = config.num_gpus_per_actor
    cpus = config.num_cpus_per_actor
    if cpus is None:
        wanted = (
            config.actor_range[1]
            if config.actor_range
            else max(1, cores // THREADS_OF_A_LARGE_ACTOR)
        )
        cpus = 1 if gpus else max(1, cores // wanted)
    low, high = config.actor_range or (1, max(1, cores // cpus) if not gpus else 1)
    return Pool(low, high, cpus, gpus, restarts=RESTARTS)


def cluster_pool(config: JobConfig, nodes: Sequence[Mapping[str, float]]) -> Pool:
    """Actors for a cluster: as many as it holds now unless told otherwise.

    Args:
        nodes: resources of each node.
    """
    gpus = config.num_gpus_per_actor
    cpus = config.num_cpus_per_actor
    if cpus is None:
        largest = int(max((node.get("CPU", 0) for node in nodes), default=0))
        most = max(1, largest - 1) if largest else THREADS_OF_A_LARGE_ACTOR
        cpus = 1 if gpus else min(THREADS_OF_A_LARGE_ACTOR, most)
    pool = Pool(1, 1, cpus, gpus, restarts=RESTARTS)
    low, high = config.actor_range or (1, max(1, sum(_actors_on(node, pool) for node in nodes)))
    return replace(pool, min_actors=low, max_actors=high)


def alive_nodes() -> list[Mapping[str, float]]:
    """Resources of each node of the cluster we are connected to."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def check_room(pool: Pool) -> None:
    """Refuses a pool that can never start, instead of waiting for it for ever.

    Raises:
        ConfigError: neither the nodes there are nor those that an autoscaler may add hold the
            smallest number of actors.
    """
    nodes = alive_nodes()
    holds = sum(_actors_on(node, pool) for node in nodes)
    may_hold = max(holds, _actors_when_grown(pool))
    if may_hold >= pool.min_actors:
        return
    cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
    raise ConfigError(
        f"{pool.min_actors} actors of {pool.cpus} CPUs and {pool.gpus:g} GPUs do not fit: the "
        f"cluster has {len(nodes)} nodes with {cpus:g} CPUs and {gpus:g} GPUs, room for {holds}, "
        f"and may grow to hold {may_hold}. Lower --actors, --num-cpus-per-actor or "
        f"--num-gpus-per-actor"
    )


def _actors_on(node: Mapping[str, float], pool: Pool) -> int:
    wanted = {"CPU": pool.cpus, "GPU": pool.gpus}
    return min(int(node.get(name, 0) // amount) for name, amount in wanted.items() if amount)


def _actors_when_grown(pool: Pool) -> int:
    """Actors on all nodes that an autoscaler may start; 0 without one."""
    from ray._private.state import state  # Ray has no public way to ask what a cluster may become

    config = state.get_cluster_config()
    groups = [] if config is None else config.node_group_configs
    unlimited = 1_000_000
    return sum(
        (unlimited if group.max_count < 0 else group.max_count) * _actors_on(group.resources, pool)
        for group in groups
    )
