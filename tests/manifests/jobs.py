"""RayJobs, and the command lines in them."""

import contextlib
import io
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from kuberay_schema import ROOT

from erniem_batch.errors import ErnieMBatchError
from manifests.clusters_of_ray import GPU, cluster_problems, pod_problems, quantity
from manifests.common import Problem, Problems, listed
from manifests.image import image_files


def job_problems(file: str, where: str, spec: Mapping[str, Any], dockerfile: str) -> Problems:
    """The operator's rules for a RayJob, and that its command line is right."""

    def problem(place: str, expected: str, got: Any) -> Problem:
        return Problem(file, f"{where}.{place}", expected, repr(got))

    if not spec.get("shutdownAfterJobFinishes"):
        for name in ("ttlSecondsAfterFinished", "suspend"):
            if spec.get(name):
                yield problem(name, "nothing, unless shutdownAfterJobFinishes is true", spec[name])
    elif spec.get("deletionStrategy", {}).get("deletionRules"):
        expected = "nothing, if shutdownAfterJobFinishes is true"
        yield problem("deletionStrategy.deletionRules", expected, spec["deletionStrategy"])
    modes = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode not in modes:
        yield problem("submissionMode", listed(modes), mode)
    if mode == "SidecarMode":
        for name in ("submitterPodTemplate", "submitterConfig", "clusterSelector"):
            if name in spec:
                yield problem(name, "nothing, with SidecarMode", spec[name])
    if mode == "InteractiveMode" and spec.get("backoffLimit"):
        yield problem("backoffLimit", "0, with InteractiveMode", spec["backoffLimit"])
    for name in ("activeDeadlineSeconds", "preRunningDeadlineSeconds", "ttlSecondsAfterFinished"):
        if spec.get(name, 0) <= 0:
            yield problem(name, "a number of seconds", spec.get(name))
    if spec.get("backoffLimit", -1) < 0:
        yield problem("backoffLimit", "a number of retries", spec.get("backoffLimit"))
    if spec.get("clusterSelector") or "rayClusterSpec" not in spec:
        expected = "a cluster of its own, in rayClusterSpec"
        yield problem("clusterSelector", expected, spec.get("clusterSelector"))
        return
    cluster = spec["rayClusterSpec"]
    yield from cluster_problems(file, f"{where}.rayClusterSpec", cluster)
    if "submitterPodTemplate" in spec:
        place = f"{where}.submitterPodTemplate"
        yield from pod_problems(file, place, spec["submitterPodTemplate"])
    yield from entrypoint_problems(file, f"{where}.entrypoint", spec.get("entrypoint", ""), cluster)
    script = script_of(spec.get("entrypoint", ""))
    if script and script not in image_files(dockerfile):
        yield problem("entrypoint", "a script that the Dockerfile copies to /app", script)


def script_of(entrypoint: str) -> str | None:
    words = entrypoint.split()
    return words[1] if len(words) > 1 and words[0] == "python" else None


def entrypoint_problems(
    file: str, where: str, entrypoint: str, cluster: Mapping[str, Any]
) -> Problems:
    """Whether the script is there, its flags are right, and its actors fit in the groups."""
    script = script_of(entrypoint)
    path = ROOT / (script or "")
    if script is None or path.parent.name != "pipelines" or not path.is_file():
        yield Problem(file, where, "python pipelines/SCRIPT.py …", entrypoint)
        return
    config, mistake = parsed_job(path.stem, shlex.split(entrypoint)[2:])
    if mistake is not None:
        yield Problem(file, where, f"flags of {script}", mistake)
        return
    # In a Ray job it would be found by itself; but then a try outside of one runs on one machine.
    if config.address != "auto":
        yield Problem(file, where, "--address auto", f"--address {config.address}")
    if config.actors is None:
        expected = "--actors MIN:MAX: how far the cluster may grow for it"
        yield Problem(file, where, expected, "none")
        return
    from erniem_batch.job.cluster import THREADS_OF_A_LARGE_ACTOR

    gpus = config.num_gpus_per_actor
    cpus = config.num_cpus_per_actor or (1 if gpus else THREADS_OF_A_LARGE_ACTOR)
    actors, spare_cpus = config.actor_range[1], -config.actor_range[1] * cpus
    room = 0
    for group in cluster["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        group_cpus, group_gpus = quantity(limits["cpu"]), quantity(limits.get(GPU, 0))
        # Machines with GPUs are not to be started for actors without.
        if (group_gpus > 0) == (gpus > 0):
            each = min(group_cpus // cpus, group_gpus // gpus if gpus else group_cpus)
            room += group["maxReplicas"] * int(each)
            spare_cpus += group["maxReplicas"] * int(group_cpus)
    if room < actors or spare_cpus < 1:
        expected = f"groups for {actors} actors of {cpus} CPUs and {gpus:g} GPUs, and 1 CPU more"
        yield Problem(file, where, expected, f"room for {room}, {spare_cpus} CPUs more")


def parsed_job(command: str, arguments: Sequence[str]) -> tuple[Any, str | None]:
    """JobConfig of a command line, or what is wrong with it."""
    from cyclopts import CycloptsError

    from erniem_batch.cli import app

    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            _, bound, _ = app.parse_args(
                [command, *arguments], exit_on_error=False, print_error=False
            )
    except (CycloptsError, ErnieMBatchError) as error:
        return None, " ".join(str(error).split())
    if "config" not in bound.arguments:
        return None, f"{command} takes no flags of a job"
    return bound.arguments["config"], None
