"""Ray clusters and their pods in Kubernetes: rules of KubeRay's operator on top of the schema."""

import re
from collections.abc import Mapping
from typing import Any

from manifests.common import Problem, Problems, image_name, listed, pinned

GPU = "nvidia.com/gpu"


def cluster_problems(file: str, where: str, spec: Mapping[str, Any]) -> Problems:
    """The rules of KubeRay's operator for a cluster that its definition does not say, and ours."""

    def problem(place: str, expected: str, got: Any) -> Problem:
        return Problem(file, f"{where}.{place}", expected, repr(got))

    if spec.get("rayVersion") != pinned("ray"):
        expected = f"{pinned('ray')}, as in .ci/constraints.txt"
        yield problem("rayVersion", expected, spec.get("rayVersion"))
    if spec.get("authOptions", {}).get("mode") != "token":
        yield problem("authOptions.mode", "token", spec.get("authOptions"))
    options = spec.get("autoscalerOptions", {})
    if not spec.get("enableInTreeAutoscaling") or options.get("version") != "v2":
        yield problem("autoscalerOptions", "autoscaling, version v2", options)
    yield from _security_problems(file, f"{where}.autoscalerOptions", options)

    head, groups = spec["headGroupSpec"], spec.get("workerGroupSpecs", [])
    parameters = head.get("rayStartParams", {})
    if parameters.get("num-cpus") != "0":
        got = parameters.get("num-cpus")
        yield problem("headGroupSpec.rayStartParams.num-cpus", '"0": no work on the head', got)
    container = head["template"]["spec"]["containers"][0]
    environment = {variable["name"] for variable in container.get("env", [])}
    if "gcsFaultToleranceOptions" in spec:
        forbidden = environment & {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS", "REDIS_USERNAME"}
        forbidden |= parameters.keys() & {"redis-password", "redis-username"}
    else:
        forbidden = environment & {"RAY_REDIS_ADDRESS"}
    forbidden |= environment & {"RAY_enable_autoscaler_v2"}
    for name in forbidden:
        expected = "gcsFaultToleranceOptions and autoscalerOptions to say it"
        yield problem("headGroupSpec", expected, name)

    names = [group["groupName"] for group in groups]
    if len(set(names)) < len(names):
        yield problem("workerGroupSpecs", "groups with names of their own", names)
    pods = [("headGroupSpec", head)]
    for index, group in enumerate(groups):
        place = f"workerGroupSpecs[{index}]"
        pods.append((place, group))
        low, now, high = (group.get(f"{key}eplicas") for key in ("minR", "r", "maxR"))
        if None in (low, now, high) or not low <= now <= high:
            got = f"{low}, {now}, {high}"
            yield problem(place, "minReplicas <= replicas <= maxReplicas, all given", got)
        if group.get("suspend"):
            yield problem(f"{place}.suspend", "false, with autoscaling", True)
    for place, group in pods:
        yield from _group_problems(file, f"{where}.{place}", group)
        credentials = group["template"]["spec"]["containers"][0].get("envFrom")
        if credentials != container.get("envFrom"):
            yield problem(f"{place}.template", "envFrom of the head", credentials)


def _group_problems(file: str, where: str, group: Mapping[str, Any]) -> Problems:
    """Of head or workers: how Ray is started, and the pod."""
    parameters = group.get("rayStartParams", {})
    resources = {"num-cpus", "num-gpus", "memory", "resources"} & parameters.keys()
    if resources and group.get("resources"):
        got = f"{listed(resources)} too"
        yield Problem(file, where, "resources in rayStartParams or in resources, not both", got)
    if "labels" in parameters:
        yield Problem(file, f"{where}.rayStartParams", "labels beside it", "labels in it")
    template = group["template"]
    pod, container = template["spec"], template["spec"]["containers"][0]
    if pod.get("restartPolicy", "Never") != "Never":
        expected = "Never, as autoscaler v2 demands"
        yield Problem(file, f"{where}.template.spec.restartPolicy", expected, pod["restartPolicy"])
    if "terminationGracePeriodSeconds" not in pod:
        place = f"{where}.template.spec.terminationGracePeriodSeconds"
        yield Problem(file, place, "a number of seconds", "none")
    limits = container.get("resources", {}).get("limits", {})
    yield from pod_problems(file, f"{where}.template", template)
    store = parameters.get("object-store-memory", "")
    if not store.isdigit() or int(store) > quantity(limits.get("memory", "0")) / 2:
        place = f"{where}.rayStartParams.object-store-memory"
        yield Problem(file, place, "bytes, at most half of the memory", repr(store))
    folders = {variable["name"]: variable.get("value") for variable in container.get("env", [])}
    mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    cache_volume = volumes.get(mounts.get(folders.get("ERNIEM_BATCH_CACHE"), ""), {})
    if "emptyDir" not in cache_volume:
        expected = "the folder of an emptyDir"
        place = f"{where}.template env ERNIEM_BATCH_CACHE"
        yield Problem(file, place, expected, repr(folders.get("ERNIEM_BATCH_CACHE")))


def pod_problems(file: str, where: str, template: Mapping[str, Any]) -> Problems:
    """Of any pod: it may not do more than it must, and gets what it asks for."""
    pod = template["spec"]
    security = pod.get("securityContext", {})
    if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
        expected = "runAsNonRoot and the number of a user that is not root"
        yield Problem(file, f"{where}.spec.securityContext", expected, repr(security))
    if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        got = repr(security.get("seccompProfile"))
        yield Problem(file, f"{where}.spec.securityContext.seccompProfile", "RuntimeDefault", got)
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    mounted: set[str] = set()
    for index, container in enumerate(pod["containers"]):
        place = f"{where}.spec.containers[{index}]"
        yield from _security_problems(file, place, container)
        yield from _resource_problems(file, place, container)
        mounted |= {mount["name"] for mount in container.get("volumeMounts", [])}
    if mounted != volumes:
        place = f"{where}.spec.volumes"
        yield Problem(file, place, f"those that are mounted: {listed(mounted)}", listed(volumes))


def _security_problems(file: str, where: str, container: Mapping[str, Any]) -> Problems:
    security = container.get("securityContext", {})
    dropped = security.get("capabilities") == {"drop": ["ALL"]}
    if security.get("allowPrivilegeEscalation") is not False or not dropped:
        expected = "allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}"
        yield Problem(file, f"{where}.securityContext", expected, repr(security))


def _resource_problems(file: str, where: str, container: Mapping[str, Any]) -> Problems:
    resources = container.get("resources", {})
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    if "cpu" not in requests or "cpu" not in limits:
        yield Problem(file, f"{where}.resources", "cpu in requests and limits", repr(resources))
    for name in ("memory", GPU):
        if requests.get(name) != limits.get(name):
            got = f"{requests.get(name)} and {limits.get(name)}"
            yield Problem(file, f"{where}.resources", f"requests = limits of {name}", got)
    if "memory" not in limits:
        yield Problem(file, f"{where}.resources.limits", "memory", "none")
    expected = image_name("cuda" if GPU in limits else "cpu")
    if container["image"] != expected:
        yield Problem(file, f"{where}.image", expected, container["image"])


UNITS = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def quantity(value: Any) -> float:
    """A number as Kubernetes writes it: 500m, 16Gi."""
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(value))
    assert match is not None, value
    return float(match[1]) * UNITS[match[2]]
