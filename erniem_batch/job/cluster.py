"""Which Ray a job runs on, and the actors that it has on one machine."""

import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from erniem_batch import stopping
from erniem_batch.config import PredictorConfig, shares_weights
from erniem_batch.errors import ConfigError, JobError
from erniem_batch.job.config import JobConfig

logger = logging.getLogger(__name__)

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

    @property
    def wanted(self) -> dict[str, float]:
        """Resources of one actor."""
        return {name: n for name, n in (("CPU", self.cpus), ("GPU", self.gpus)) if n}

    def predictor(self, config: JobConfig) -> PredictorConfig:
        """What each actor loads."""
        shared = shares_weights(self.max_actors, self.cpus)
        return replace(config.predictor, n_threads=self.cpus, share_weights=shared)


def connect(config: JobConfig) -> bool:
    """Connects to the cluster of the job; True if it was started just for this run."""
    cores = os.cpu_count() or 1
    pool = local_pool(config, cores)
    return connect_to(config.address, max(cores, pool.max_actors * pool.cpus) + SPARE_CPUS)


def is_connected() -> bool:
    """Whether this process uses a Ray already, which then is not ours to leave."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def connect_to(address: str | None, local_cpus: int, metrics_port: int | None = None) -> bool:
    """Connects to a cluster; True if it was started just for this run.

    Args:
        address: None: that of RAY_ADDRESS, else a local one.
        local_cpus: logical CPUs of a local one.
        metrics_port: of a local one, for Prometheus; None: any.

    Raises:
        ConfigError: no cluster answers at the address.
        JobError: the local one does not start.
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

    if not sys.stderr.isatty():
        _no_colours()
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
        with _quiet_core(), _on_loopback() if local else nullcontext():
            ray.init(**options)
        stopping.listen()  # Ray has put a handler of its own in place
    except Exception as error:  # Ray raises plain ones
        if not local:
            raise ConfigError(
                f"--address {address}: no Ray cluster answers there: {error}"
            ) from error
        raise JobError(
            f"Ray did not start on this machine: {error} Is it busy, or out of memory or disk? "
            "Try again when it has less to do"
        ) from error
    return local


def _no_colours() -> None:
    """None in a log that is a file, such as that of a Ray job: Ray colours what others print."""
    from ray._private import ray_logging

    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    ray_logging._color = str  # "[repeated 3x across cluster]", for which there is no setting


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


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that is started in the block on 127.0.0.1 listens there alone.

    Ray takes this address for one by which others reach the machine, and then listens on all.
    """
    from ray._private import services

    resolve = getattr(services, "resolve_ip_for_localhost", None)
    services.resolve_ip_for_localhost = str
    try:
        yield
    finally:
        services.resolve_ip_for_localhost = resolve


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
