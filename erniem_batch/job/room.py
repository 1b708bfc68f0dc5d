"""What a cluster holds and may grow to, whether a job ever fits there, and waiting for that."""

import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from erniem_batch.errors import ConfigError
from erniem_batch.job.cluster import RESTARTS, THREADS_OF_A_LARGE_ACTOR, Pool, local_pool
from erniem_batch.job.config import JobConfig

logger = logging.getLogger(__name__)

# The most actors that nodes are started for if nobody said how many. They cost money; --actors
# MIN:MAX spends more.
GROWN_ACTORS = 4
RESERVED_AT_ONCE = 100  # actors that an autoscaler is told of before the first has a place
REPORT_S = 30.0  # an autoscaler that starts together with its cluster has said something by then
LOG_EVERY_S = 10.0
REFUSED_S = 10.0  # that long an autoscaler must say "impossible" before we believe it
HEAD = "node:__internal_head__"
# `ray up` leaves it on the head node, for the autoscaler there.
BOOTSTRAP_FILE = "~/ray_bootstrap_config.yaml"


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes of one kind that an autoscaler may start: what each has, and how many at most."""

    resources: Mapping[str, float]
    max_nodes: float


@dataclass(frozen=True, slots=True)
class Cluster:
    """What a cluster has now and may grow to.

    Attributes:
        nodes: resources of each node that is alive.
        groups: what an autoscaler may start, beside the head node; empty: there is none, or it may
            start nothing; None: there is one, and nobody tells what it may start.
        max_nodes: nodes of all groups together.
        limits: resources of the whole cluster, of those that are limited.
        reported: False: an autoscaler may only be starting, and add groups.
    """

    nodes: Sequence[Mapping[str, float]]
    groups: Sequence[Group] | None = ()
    max_nodes: float = math.inf
    limits: Mapping[str, float] | None = None
    reported: bool = True

    def holds(self, pool: Pool) -> int:
        """Actors that all nodes hold, if nobody else uses them."""
        return sum(_actors_on(node, pool) for node in self.nodes)

    def may_hold(self, pool: Pool) -> float:
        """Actors that it holds once it is as large as it may be; infinite if nobody tells."""
        if self.groups is None:
            return math.inf
        grown: float = sum(_actors_on(node, pool) for node in self.nodes if HEAD in node)
        left = self.max_nodes
        for group in sorted(self.groups, key=lambda group: -_actors_on(group.resources, pool)):
            if on_each := _actors_on(group.resources, pool):
                n_nodes = min(group.max_nodes, left)
                grown += n_nodes * on_each
                if math.isfinite(left):
                    left -= n_nodes
        for name, amount in pool.wanted.items():
            grown = min(grown, (self.limits or {}).get(name, math.inf) // amount)
        return max(grown, self.holds(pool))

    def total(self, name: str) -> float:
        """Of one resource, on all nodes."""
        return sum(node.get(name, 0) for node in self.nodes)

    @property
    def largest_cpus(self) -> int:
        """CPUs of the largest node, of those to come if none has any; 0 if that is not known."""
        groups = [group.resources for group in self.groups or () if group.max_nodes]
        for nodes in (self.nodes, groups):
            if cpus := int(max((node.get("CPU", 0) for node in nodes), default=0)):
                return cpus
        return 0


def find_pool(config: JobConfig, own_cluster: bool) -> Pool:
    """The actors of a job, as soon as the first has a place.

    That may take a node which must be started for it. The log says what was found, and every few
    seconds what is waited for.

    Args:
        own_cluster: whether it was started just for this run; then nobody adds nodes.

    Raises:
        ConfigError: neither the nodes there are nor those that an autoscaler may add hold the
            smallest number of actors.
    """
    if own_cluster:
        pool = local_pool(config, os.cpu_count() or 1)
        check_fits(pool, Cluster(_ask().nodes))
        return pool
    cluster = look_at_cluster()
    pool = cluster_pool(config, cluster)
    if not cluster.reported and cluster.holds(pool) < pool.min_actors:
        cluster = look_at_cluster(REPORT_S)
        pool = cluster_pool(config, cluster)
    _make_room(pool, cluster)
    return pool


def cluster_pool(config: JobConfig, cluster: Cluster) -> Pool:
    """Actors for a cluster.

    Unless told by --actors: from one to as many as its nodes hold now. A cluster that may grow
    grows for up to GROWN_ACTORS of them, and no further than there is work for.
    """
    gpus = config.num_gpus_per_actor
    cpus = config.num_cpus_per_actor
    if cpus is None:
        largest = cluster.largest_cpus
        most = max(1, largest - 1) if largest else THREADS_OF_A_LARGE_ACTOR
        cpus = 1 if gpus else min(THREADS_OF_A_LARGE_ACTOR, most)
    pool = Pool(1, 1, cpus, gpus, restarts=RESTARTS)
    modest = int(min(cluster.may_hold(pool), GROWN_ACTORS))
    low, high = config.actor_range or (1, max(1, cluster.holds(pool), modest))
    return replace(pool, min_actors=low, max_actors=high)


def check_fits(pool: Pool, cluster: Cluster) -> None:
    """Refuses a pool that can never start, instead of waiting for it for ever."""
    may_hold = cluster.may_hold(pool)
    if may_hold < pool.min_actors:
        raise ConfigError(
            f"{pool.min_actors} actors of {_size(pool)} do not fit: the cluster has "
            f"{len(cluster.nodes)} nodes with {cluster.total('CPU'):g} CPUs and "
            f"{cluster.total('GPU'):g} GPUs, room for {cluster.holds(pool)}, and may grow to hold "
            f"{may_hold:.0f}. Lower --actors, --num-cpus-per-actor or --num-gpus-per-actor"
        )


def _make_room(pool: Pool, cluster: Cluster) -> None:
    may_hold = cluster.may_hold(pool)
    logger.info(
        "cluster nodes=%d cpus=%g gpus=%g; of actors with cpus=%d gpus=%g room_for=%d "
        "may_grow_to=%s used=%d:%d",
        len(cluster.nodes),
        cluster.total("CPU"),
        cluster.total("GPU"),
        pool.cpus,
        pool.gpus,
        cluster.holds(pool),
        "unknown" if math.isinf(may_hold) else int(may_hold),
        pool.min_actors,
        pool.max_actors,
    )
    check_fits(pool, cluster)
    _wait_for_a_place(pool)


def _actors_on(node: Mapping[str, float], pool: Pool) -> int:
    return min(int(node.get(name, 0) // amount) for name, amount in pool.wanted.items())


def _size(pool: Pool) -> str:
    return f"{pool.cpus} CPUs and {pool.gpus:g} GPUs"


# ---- what the cluster says --------------------------------------------------------------------


def look_at_cluster(wait_s: float | None = None) -> Cluster:
    """The cluster we are connected to.

    Args:
        wait_s: for an autoscaler's first report; None: only while no node has any CPU.
    """
    started = time.monotonic()
    while True:
        cluster = read_cluster(_ask())
        if wait_s is None:
            wait_s = 0 if cluster.largest_cpus else REPORT_S
        if cluster.reported or time.monotonic() - started >= wait_s:
            return cluster
        time.sleep(0.5)


@dataclass(frozen=True, slots=True)
class Answers:
    """What Ray tells about a cluster, as it tells it.

    Attributes:
        nodes: resources of each node that is alive.
        config: a serialized ClusterConfig; None where the autoscaler reports none, as all of Ray
            2.60 itself. Anyscale does, and autoscaler v2 of later versions.
        status: a serialized GetClusterStatusReply; what is wanted, and what autoscaler v2 says.
        v2: whether the autoscaler is v2.
        v1_status: JSON of autoscaler v1.
        bootstrap: text of BOOTSTRAP_FILE, on the head node.
    """

    nodes: list[dict[str, float]]
    config: bytes | None
    status: bytes
    v2: bool
    v1_status: bytes | None
    bootstrap: str | None


def _ask() -> Answers:
    import ray
    from ray.util.client import ray as client

    if client.is_connected():  # ray://: what we ask for is known there only
        answers: Answers = ray.get(ray.remote(num_cpus=0)(_ask_here).remote())
        return answers
    return _ask_here()


def _ask_here() -> Answers:
    import ray
    from ray._private.worker import global_worker  # Ray has no public way to ask for any of this

    def read(key: bytes, namespace: bytes | None = None) -> bytes | None:
        value: bytes | None = gcs.internal_kv_get(key, namespace, timeout=10)
        return value

    gcs = global_worker.gcs_client
    alive = [node for node in ray.nodes() if node["Alive"]]
    here = ray.get_runtime_context().get_node_id()
    on_head = any(node["NodeID"] == here and HEAD in node["Resources"] for node in alive)
    file = Path(BOOTSTRAP_FILE).expanduser()
    return Answers(
        nodes=[node["Resources"] for node in alive],
        config=read(b"__autoscaler_cluster_config", b"__autoscaler"),
        status=gcs.get_cluster_status(timeout_s=10),
        v2=read(b"__autoscaler_v2_enabled", b"__autoscaler") == b"1",
        v1_status=read(b"__autoscaling_status"),
        bootstrap=file.read_text() if on_head and file.is_file() else None,
    )


def read_cluster(answers: Answers) -> Cluster:
    """What Ray's answers mean."""
    from ray.core.generated.autoscaler_pb2 import ClusterConfig

    if answers.config:
        config = ClusterConfig.FromString(answers.config)
        if config.node_group_configs:
            groups = [
                Group(dict(group.resources), group.max_count if group.max_count >= 0 else math.inf)
                for group in config.node_group_configs
            ]
            return Cluster(answers.nodes, groups, limits=dict(config.max_resources))
    at_work = _autoscaler_at_work(answers)
    if not at_work:
        return Cluster(answers.nodes, reported=at_work is not None)
    if answers.bootstrap is None:
        return Cluster(answers.nodes, groups=None)
    settings = yaml.safe_load(answers.bootstrap)
    # As Ray has it: two in all unless told, and a group may take all of them.
    most = settings.get("max_workers", 2)
    kinds = settings.get("available_node_types", {}).items()
    groups = [
        Group(kind.get("resources", {}), kind.get("max_workers", most))
        for name, kind in kinds
        if name != settings.get("head_node_type")
    ]
    return Cluster(answers.nodes, groups, max_nodes=most)


def _autoscaler_at_work(answers: Answers) -> bool | None:
    """Whether one may start nodes; None if it has not said anything yet.

    Every cluster has a process of that name. Where it may start nothing, v1 names kinds of nodes
    after the nodes; v2 does not know them by the number that a cloud gave them.
    """
    if answers.v2:
        status = _status(answers)
        if not status.autoscaling_state.autoscaler_state_version:
            return None
        return any(
            node.instance_id and HEAD in node.total_resources
            for node in status.cluster_resource_state.node_states
        )
    report = _v1_report(answers)
    if not report:
        return None
    kinds = report.get("node_type_mapping") or {}
    return any(not re.fullmatch(r"node_[0-9a-f]{56}", kind) for kind in kinds.values())


def _status(answers: Answers) -> Any:
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    return GetClusterStatusReply.FromString(answers.status)


def _v1_report(answers: Answers) -> dict[str, Any]:
    status: dict[str, Any] = json.loads(answers.v1_status or b"{}")
    return status.get("autoscaler_report") or {}


# ---- waiting for nodes ------------------------------------------------------------------------


def _wait_for_a_place(pool: Pool) -> None:
    """Returns as soon as one actor has a place.

    The autoscaler learns of the smallest pool at once. What it starts comes even though nothing
    is reserved any more: the actors that follow use it.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    n_reserved = min(pool.min_actors, RESERVED_AT_ONCE)
    reserved = [placement_group([pool.wanted]) for _ in range(n_reserved)]
    places = [group.ready() for group in reserved]
    started = time.monotonic()
    logged = -math.inf
    refused = Refusal(pool, [group.id.hex() for group in reserved])
    try:
        while not ray.wait(places, num_returns=1, timeout=1.0)[0]:
            try:
                answers = _ask()
            except ray.exceptions.RayError:
                continue  # only the log waits
            refused.look(answers)
            now = time.monotonic()
            if now - logged >= LOG_EVERY_S:
                logged = now
                logger.info(
                    "waiting for %s seconds=%.0f %s",
                    "room" if Cluster(answers.nodes).holds(pool) else "nodes",
                    now - started,
                    what_comes(answers),
                )
        if logged >= started:
            logger.info("first actor has a place seconds=%.0f", time.monotonic() - started)
    finally:
        for group in reserved:
            remove_placement_group(group)


class Refusal:
    """Watches for an autoscaler that says no node for an actor can be started."""

    def __init__(
        self, pool: Pool, reserved: Sequence[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._pool = pool
        self._reserved = reserved
        self._clock = clock
        self._since: float | None = None

    def look(self, answers: Answers) -> None:
        """Raises a ConfigError once it has said so for a while.

        It says so too while others use all nodes that there may be; then there are some.
        """
        state = _status(answers).autoscaling_state
        # Each is told as "id:strategy|state".
        infeasible = {
            gang.details.partition(":")[0] for gang in state.infeasible_gang_resource_requests
        }
        hopeless = (
            infeasible.issuperset(self._reserved)
            and not state.pending_instance_requests
            and not state.pending_instances
            and not Cluster(answers.nodes).holds(self._pool)
        )
        if not hopeless:
            self._since = None
        elif self._since is None:
            self._since = self._clock()
        elif self._clock() - self._since >= REFUSED_S:
            raise ConfigError(
                f"an actor of {_size(self._pool)} does not fit on any node of the cluster, and its "
                f"autoscaler says that it can start none for it. Lower --num-cpus-per-actor or "
                f"--num-gpus-per-actor, or let the cluster grow further"
            )


def what_comes(answers: Answers) -> str:
    """Which nodes an autoscaler is starting, and what went wrong last."""
    nodes = f"nodes={len(answers.nodes)}"
    if not answers.v2:
        report = _v1_report(answers)
        coming = dict(report.get("pending_launches") or {})
        for _, kind, *_ in report.get("pending_nodes") or ():
            coming[kind] = coming.get(kind, 0) + 1
        failed = [f"failed={kind}" for _, kind in (report.get("failed_nodes") or ())[-1:]]
    else:
        state = _status(answers).autoscaling_state
        coming = {}
        for request in state.pending_instance_requests:
            kind = request.ray_node_type_name
            coming[kind] = coming.get(kind, 0) + request.count
        for instance in state.pending_instances:
            kind = instance.ray_node_type_name
            coming[kind] = coming.get(kind, 0) + 1
        failures = sorted(state.failed_instance_requests, key=lambda request: request.failed_ts)
        failed = [f"failed={f.ray_node_type_name} ({f.reason})" for f in failures[-1:]]
    starting = ", ".join(f"{count} {kind}" for kind, count in sorted(coming.items())) or "none"
    return " ".join([nodes, f"starting={starting}", *failed])
