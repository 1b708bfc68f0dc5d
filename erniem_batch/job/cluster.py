"""Which Ray a job runs on, and whether that Ray can ever hold what the job asks for."""

import logging
import os
import secrets
from dataclasses import dataclass
from typing import Any

from erniem_batch.errors import ConfigError
from erniem_batch.job.config import JobConfig

THREADS_OF_A_LARGE_ACTOR = 4
# Logical CPUs beside the actors', for Ray's own small tasks; without them a pool that takes every
# CPU stands still for ever.
SPARE_CPUS = 2
LOCAL_OBJECT_STORE_BYTES = 256 << 20  # only receipts pass through it


@dataclass(frozen=True, slots=True)
class Pool:
    """The actors of a job.

    Attributes:
        cpus, gpus: of each.
        restarts: how often an actor that died is started anew. A row that kills its process would
            be tried for ever with Ray Data's own default. None on one machine, where it is the
            memory that ends processes, and would end them again.
    """

    min_actors: int
    max_actors: int
    cpus: int
    gpus: float
    restarts: int


def connect(config: JobConfig) -> bool:
    """Connects to the cluster of the job; True if it was started just for this run."""
    # Set before Ray is imported: it reads them once.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = config.address or os.environ.get("RAY_ADDRESS")
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
        pool = local_pool(config, os.cpu_count() or 1)
        options |= {
            "address": "local",
            "num_cpus": max(os.cpu_count() or 1, pool.max_actors * pool.cpus) + SPARE_CPUS,
            "include_dashboard": False,
            "object_store_memory": LOCAL_OBJECT_STORE_BYTES,
            "_node_ip_address": "127.0.0.1",
        }
    else:
        options["address"] = address
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"--address {address}: no Ray cluster answers there: {error}") from error
    return local


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
    return Pool(low, high, cpus, gpus, restarts=0)


def cluster_pool(config: JobConfig, total: dict[str, float]) -> Pool:
    """Actors for a cluster: as many as it holds now unless told otherwise."""
    gpus = config.num_gpus_per_actor
    cpus = config.num_cpus_per_actor or (1 if gpus else THREADS_OF_A_LARGE_ACTOR)
    room = int(total.get("GPU", 0) / gpus) if gpus else int((total.get("CPU", 0) - 1) / cpus)
    low, high = config.actor_range or (1, max(1, room))
    return Pool(low, high, cpus, gpus, restarts=3)


def check_room(pool: Pool) -> None:
    """Refuses a pool that can never start, instead of waiting for it for ever.

    Raises:
        ConfigError: no node is large enough, or all together are too small, and the cluster
            cannot grow.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {"CPU": pool.cpus, "GPU": pool.gpus}
    holds = sum(
        min(int(node.get(name, 0) // amount) for name, amount in wanted.items() if amount)
        for node in nodes
    )
    if holds >= pool.min_actors or _can_grow():
        return
    raise ConfigError(
        f"{pool.min_actors} actors of {pool.cpus} CPUs and {pool.gpus:g} GPUs do not fit: the "
        f"cluster has {len(nodes)} nodes with {sum(n.get('CPU', 0) for n in nodes):g} CPUs and "
        f"{sum(n.get('GPU', 0) for n in nodes):g} GPUs, room for {holds} of them. Lower --actors, "
        f"--num-cpus-per-actor or --num-gpus-per-actor"
    )


def _can_grow() -> bool:
    """Whether an autoscaler is at work that may add nodes."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    try:
        status = get_cluster_status(_gcs_address())
    except Exception:  # a local cluster has no autoscaler to ask, and fails in several ways
        return False
    return bool(status.cluster_resource_usage and (status.pending_nodes or status.idle_nodes))


def _gcs_address() -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)
