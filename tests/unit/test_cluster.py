"""What a cluster may hold, and which pool that makes, from what Ray tells about it."""

import json
import math
from dataclasses import replace

import pytest
import ray
from clusters import autoscaler_settings
from ray.core.generated.autoscaler_pb2 import (
    ClusterConfig,
    GetClusterStatusReply,
    NodeGroupConfig,
    NodeState,
)

from erniem_batch.errors import ConfigError, JobError
from erniem_batch.job import JobConfig
from erniem_batch.job.cluster import Pool, connect_to, local_pool
from erniem_batch.job.room import (
    GROWN_ACTORS,
    HEAD,
    REFUSED_S,
    Answers,
    Cluster,
    Group,
    Refusal,
    check_fits,
    cluster_pool,
    read_cluster,
    what_comes,
)

EMPTY_HEAD = {HEAD: 1.0, "memory": 8e9}
EIGHT = {"CPU": 8.0, "memory": 3e10}
GPUS = {"CPU": 16.0, "GPU": 4.0}


def _pool(cpus=1, gpus=0.0, actors=(1, 1)):
    return Pool(*actors, cpus, gpus, restarts=1)


def _used(cluster, **options):
    pool = cluster_pool(JobConfig(**options), cluster)
    return pool.min_actors, pool.max_actors, pool.cpus


def _answers(nodes=(EMPTY_HEAD,), **given):
    values = {"config": None, "status": b"", "v2": False, "v1_status": None, "bootstrap": None}
    return Answers(**{"nodes": list(nodes), **values, **given})


def _v2(instance_id="i-1", version=3, **state):
    """What a cluster with autoscaler v2 answers."""
    reply = GetClusterStatusReply()
    head = NodeState(instance_id=instance_id, total_resources={HEAD: 1.0})
    reply.cluster_resource_state.node_states.append(head)
    reply.autoscaling_state.autoscaler_state_version = version
    for name, values in state.items():
        for value in values:
            getattr(reply.autoscaling_state, name).add(**value)
    return _answers(v2=True, status=reply.SerializeToString())


def _v1(mapping, **report):
    status = {"autoscaler_report": {"node_type_mapping": mapping, **report}}
    return json.dumps(status).encode()


# ---- how many actors --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cluster", "options", "expected"),
    [
        # A cluster that stays as it is: all of it, and a CPU of each node left to Ray.
        (Cluster([EMPTY_HEAD, EIGHT, EIGHT]), {}, (1, 4, 4)),
        (Cluster([{"CPU": 4.0}]), {}, (1, 1, 3)),
        (Cluster([EMPTY_HEAD, GPUS, GPUS]), {"num_gpus_per_actor": 1}, (1, 8, 1)),
        (Cluster([GPUS]), {"num_gpus_per_actor": 0.25}, (1, 16, 1)),
        (Cluster([EMPTY_HEAD]), {}, (1, 1, 4)),  # refused later
        # Nothing there yet: CPUs of the nodes that may come, and no more actors than is modest.
        (Cluster([EMPTY_HEAD], [Group(EIGHT, 10)]), {}, (1, GROWN_ACTORS, 4)),
        (Cluster([EMPTY_HEAD], [Group({"CPU": 2}, 1)]), {}, (1, 2, 1)),
        (Cluster([EMPTY_HEAD], [Group(EIGHT, 10)], max_nodes=1), {}, (1, 2, 4)),
        (Cluster([EMPTY_HEAD], groups=None), {}, (1, GROWN_ACTORS, 4)),
        # There are some: these are used, however many.
        (Cluster([EMPTY_HEAD, *[EIGHT] * 5], [Group(EIGHT, 10)]), {}, (1, 10, 4)),
        (Cluster([EMPTY_HEAD, EIGHT], [Group(EIGHT, 10)]), {}, (1, GROWN_ACTORS, 4)),
        # Told.
        (Cluster([EMPTY_HEAD], [Group(EIGHT, 10)]), {"actors": "3:20"}, (3, 20, 4)),
        (Cluster([EMPTY_HEAD], [Group(EIGHT, 10)]), {"num_cpus_per_actor": 8}, (1, 4, 8)),
    ],
)
def test_pool(cluster, options, expected):
    assert _used(cluster, **options) == expected


def test_what_a_cluster_may_hold():
    """Groups are filled with the best first, if there is a limit for all of them."""
    groups = [Group({"CPU": 4}, 10), Group({"CPU": 16}, 2), Group({"GPU": 1}, 10)]
    head = {"CPU": 2, HEAD: 1.0}
    assert Cluster([head], groups).may_hold(_pool(2)) == 1 + 2 * 10 + 8 * 2
    assert Cluster([head], groups, max_nodes=3).may_hold(_pool(2)) == 1 + 8 * 2 + 2
    assert Cluster([head], groups, limits={"CPU": 9}).may_hold(_pool(2)) == 4
    assert Cluster([head], groups, limits={"GPU": 3}).may_hold(_pool(1, 1.0)) == 0
    assert Cluster([], [Group({"CPU": 4}, math.inf)]).may_hold(_pool(2)) == math.inf
    assert Cluster([], [Group({"CPU": 4}, math.inf)]).may_hold(_pool(8)) == 0
    # What is there counts, whoever started it.
    assert Cluster([head, {"CPU": 64}], groups[:1]).may_hold(_pool(2)) == 33


@pytest.mark.parametrize(
    ("cluster", "pool", "room"),
    [
        (Cluster([EIGHT]), _pool(16), "1 nodes with 8 CPUs and 0 GPUs, room for 0, .* hold 0"),
        (
            Cluster([EMPTY_HEAD], [Group(EIGHT, 2)]),
            _pool(4, actors=(5, 5)),
            "room for 0, .* hold 4",
        ),
        (Cluster([EMPTY_HEAD], [Group(EIGHT, 99)]), _pool(1, 1.0), "room for 0, .* hold 0"),
    ],
)
def test_what_never_fits_is_refused(cluster, pool, room):
    with pytest.raises(ConfigError, match=f"do not fit: .*{room}. Lower --actors"):
        check_fits(pool, cluster)


@pytest.mark.parametrize(
    ("options", "cores", "expected"),
    [
        ({}, 2, (1, 1, 2)),
        ({}, 16, (1, 4, 4)),
        ({"actors": "2:2"}, 2, (2, 2, 1)),
        ({"num_gpus_per_actor": 1}, 8, (1, 1, 1)),
    ],
)
def test_pool_of_one_machine(options, cores, expected):
    pool = local_pool(JobConfig(**options), cores)
    assert (pool.min_actors, pool.max_actors, pool.cpus) == expected


# ---- what Ray tells ---------------------------------------------------------------------------


def test_groups_that_the_autoscaler_reports():
    """As Anyscale does, and autoscaler v2 of Ray after 2.60; -1 is as many as are wanted."""
    config = ClusterConfig(
        node_group_configs=[
            NodeGroupConfig(name="cpu", resources={"CPU": 8}, min_count=0, max_count=3),
            NodeGroupConfig(name="gpu", resources={"CPU": 16, "GPU": 4}, max_count=-1),
            NodeGroupConfig(name="off", resources={"CPU": 96}, max_count=0),
        ],
        max_resources={"CPU": 100},
    )
    cluster = read_cluster(_answers(config=config.SerializeToString()))
    assert cluster.reported
    assert cluster.may_hold(_pool(1, 1.0)) == 100
    assert cluster.may_hold(_pool(17)) == 0
    assert cluster.largest_cpus == 16


@pytest.mark.parametrize(
    ("answers", "groups", "reported"),
    [
        (_answers(), (), False),  # a cluster that has just begun, or without any autoscaler
        (_answers(v1_status=b'{"load_metrics_report": {}}'), (), False),
        (_answers(v1_status=_v1({"1": "node_" + "0a" * 28})), (), True),  # watches, starts nothing
        (_answers(v1_status=_v1({"1": "headgroup"})), None, True),
        (_answers(v2=True), (), False),
        (_v2(version=0), (), False),
        (_v2(instance_id=""), (), True),  # watches, starts nothing
        (_v2(), None, True),
        (_answers(config=ClusterConfig().SerializeToString()), (), False),
    ],
)
def test_whether_there_is_an_autoscaler(answers, groups, reported):
    cluster = read_cluster(answers)
    assert (cluster.groups, cluster.reported) == (groups, reported)


def test_the_file_of_ray_up():
    """The head node's own kind starts nothing; without numbers Ray starts two at most."""
    groups = {"cpu": {"resources": EIGHT, "max_workers": 5}, "gpu": {"resources": GPUS}}
    settings = autoscaler_settings(groups)
    at_work = {"v1_status": _v1({"1": "ray.head.default"})}
    cluster = read_cluster(_answers(**at_work, bootstrap=json.dumps(settings | {"max_workers": 6})))
    assert cluster.may_hold(_pool(8)) == 6 * 2
    assert cluster.may_hold(_pool(1, 1.0)) == 6 * 4
    del settings["max_workers"]
    cluster = read_cluster(_answers(**at_work, bootstrap=json.dumps(settings)))
    assert cluster.may_hold(_pool(8)) == 4
    # A file of a cluster that was: nothing is at work here.
    quiet = _answers(v1_status=_v1({"1": "node_" + "0a" * 28}), bootstrap=json.dumps(settings))
    assert read_cluster(quiet).groups == ()


# ---- waiting ----------------------------------------------------------------------------------


def test_what_comes():
    assert what_comes(_answers()) == "nodes=1 starting=none"
    v1 = _v1(
        {"1": "head"},
        pending_launches={"cpu": 2, "gpu": 1},
        pending_nodes=[["10.0.0.1", "cpu", "setting-up"]],
        failed_nodes=[["10.0.0.2", "gpu"]],
    )
    assert what_comes(_answers(v1_status=v1)) == "nodes=1 starting=3 cpu, 1 gpu failed=gpu"
    v2 = _v2(
        pending_instance_requests=[{"ray_node_type_name": "gpu", "count": 2}],
        pending_instances=[{"ray_node_type_name": "cpu"}, {"ray_node_type_name": "cpu"}],
        failed_instance_requests=[
            {"ray_node_type_name": "gpu", "reason": "no capacity", "failed_ts": 20},
            {"ray_node_type_name": "cpu", "reason": "quota", "failed_ts": 10},
        ],
    )
    assert what_comes(v2) == "nodes=1 starting=2 cpu, 2 gpu failed=gpu (no capacity)"


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_an_autoscaler_that_cannot_help_is_believed_after_a_while():
    clock = Clock()
    refusal = Refusal(_pool(64), ["a1", "b2"], clock)
    gangs = [{"details": f"{name}:PACK|PENDING"} for name in ("a1", "b2", "c3")]
    hopeless = _v2(infeasible_gang_resource_requests=gangs)
    for answers in (
        _v2(),
        _v2(infeasible_gang_resource_requests=gangs[1:]),  # one has a chance
        _v2(infeasible_gang_resource_requests=gangs, pending_instances=[{}]),  # one comes
        replace(hopeless, nodes=[{"CPU": 64}]),  # others use what there is
    ):
        refusal.look(hopeless)
        clock.now += REFUSED_S + 1
        refusal.look(answers)
    refusal.look(hopeless)
    clock.now += REFUSED_S - 1
    refusal.look(hopeless)
    clock.now += 1
    with pytest.raises(ConfigError, match="an actor of 64 CPUs and 0 GPUs does not fit"):
        refusal.look(hopeless)


def test_a_ray_that_does_not_start_is_told_in_a_sentence(monkeypatch):
    """As on a machine that is too busy: Ray raises a plain Exception after half a minute."""

    def init(**options):
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # whatever ran before in this process
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else a token of its own stays behind
    with pytest.raises(JobError, match=r"did not start on this machine: .* timed out .* Try again"):
        connect_to(None, 2)
    with pytest.raises(ConfigError, match=r"--address 127\.0\.0\.1:1: no Ray cluster"):
        connect_to("127.0.0.1:1", 2)
