"""What must be right in deploy/, as functions that give back what is wrong.

The manifests cannot be run in a test; what can be said of them without a cluster is said here:
their schema, the rules that KubeRay's operator and Ray apply on top of it, what they say of each
other, and of this package (scripts, flags, versions, metrics).
"""

import ast
import contextlib
import fnmatch
import io
import json
import re
import shlex
import tomllib
import zoneinfo
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from kuberay_schema import METADATA, POD_TEMPLATE, REDUCED, ROOT

from erniem_batch import __version__
from erniem_batch.errors import ErnieMBatchError

DEPLOY = ROOT / "deploy"

# Metrics by their names in the code, with kind and labels. Prometheus shows a counter `x` as
# ray_x_total, a histogram as ray_x_bucket, _sum and _count, a gauge as ray_x.
IMAGE_USER = "app"

BATCH_METRICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "erniem_batch_rows": ("counter", ("task", "outcome")),
    "erniem_batch_tokens": ("counter", ("task",)),
    "erniem_batch_padding_tokens": ("counter", ("task",)),
    "erniem_batch_windows": ("counter", ("task",)),
    "erniem_batch_found": ("counter", ("task",)),
    "erniem_batch_read_bytes": ("counter", ("task",)),
    "erniem_batch_stage_seconds": ("counter", ("task", "stage")),
    "erniem_batch_dead_letters": ("counter", ("task", "stage", "error")),
    "erniem_batch_unit_seconds": ("histogram", ("task",)),
    "erniem_batch_units": ("gauge", ("task", "output", "state")),
    "erniem_batch_actors": ("gauge", ("task", "output")),
    "erniem_batch_done_share": ("gauge", ("task", "output")),
    "erniem_batch_eta_seconds": ("gauge", ("task", "output")),
}
SERVE_METRICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "erniem_serve_requests": ("counter", ("route", "status")),
    "erniem_serve_request_seconds": ("histogram", ("route",)),
    "erniem_serve_tokens": ("counter", ("model", "task")),
    "erniem_serve_padding_tokens": ("counter", ("model", "task")),
    "erniem_serve_windows": ("counter", ("model", "task")),
    "erniem_serve_queue_seconds": ("histogram", ("model", "task")),
    "erniem_serve_forward_seconds": ("histogram", ("model", "task")),
    "erniem_serve_batch_fill": ("histogram", ("model", "task")),
    "erniem_serve_waiting_tokens": ("gauge", ("model", "task")),
    "erniem_serve_model_info": ("gauge", ("model", "task", "digest", "dtype")),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong.

    Attributes:
        where: path in the document, such as spec.schedule.
    """

    file: str
    where: str
    expected: str
    got: str

    def __str__(self) -> str:
        return f"deploy/{self.file}: {self.where}: expected {self.expected}, got {self.got}"


Problems = Iterator[Problem]


# ---- all files ----------------------------------------------------------------------------------


def deploy_files() -> dict[str, str]:
    """Text of each file of deploy/, and of .dockerignore, by its path below deploy/."""
    paths = [path for path in sorted(DEPLOY.rglob("*")) if path.is_file() and path.suffix != ".pyc"]
    files = {path.relative_to(DEPLOY).as_posix(): path.read_text() for path in paths}
    return files | {".dockerignore": (ROOT / ".dockerignore").read_text()}


def all_problems(
    files: Mapping[str, str], schemas: Mapping[str, Any] | None = None
) -> list[Problem]:
    """What is wrong in any file, or between two of them.

    Args:
        files: as `deploy_files` gives them.
        schemas: of KubeRay's kinds; default: the reduced ones of tests/data.
    """
    found = [problem for name in files for problem in file_problems(name, files, schemas)]
    return found or list(tree_problems(files))


def file_problems(
    name: str, files: Mapping[str, str], schemas: Mapping[str, Any] | None = None
) -> list[Problem]:
    """What is wrong in one file."""
    text = files[name]
    found = list(image_name_problems(name, text))
    try:
        found += _problems_of(name, text, files, schemas or reduced_schemas())
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        found.append(Problem(name, "the file", "YAML or JSON", " ".join(str(error).split())))
    return found


def _problems_of(
    name: str, text: str, files: Mapping[str, str], schemas: Mapping[str, Any]
) -> Problems:
    if name.startswith("kuberay/") and name.endswith(".yaml"):
        yield from kubernetes_problems(name, load_all(text), files["docker/Dockerfile"], schemas)
    elif name.startswith("cluster/"):
        yield from vm_problems(name, load_all(text)[0])
    elif name.startswith("grafana-"):
        yield from dashboard_problems(name, json.loads(text))
    elif name == "prometheus.yml":
        yield from prometheus_problems(name, load_all(text)[0], files)
    elif name == "alerts.yml":
        yield from alert_problems(name, load_all(text)[0])
    elif name == "serve.yaml":
        yield from serve_problems(name, "", load_all(text)[0])
    elif name == "docker/Dockerfile":
        yield from dockerfile_problems(name, text, files[".dockerignore"])


def tree_problems(files: Mapping[str, str]) -> Problems:
    """What files say of each other. They are right each by itself."""
    readme = files["README.md"]
    for name in files:
        if name.startswith(("docker/model", ".dockerignore", "README")):
            continue
        if f"`{name}`" not in readme:
            yield Problem("README.md", "table", f"a line for `{name}`", "none")
    documents = {
        name: load_all(text)
        for name, text in files.items()
        if name.startswith("kuberay/") and name.endswith(".yaml")
    }
    cluster = documents["kuberay/raycluster.yaml"][0]["spec"]
    job = documents["kuberay/rayjob.yaml"][0]["spec"]
    nightly = documents["kuberay/raycronjob.yaml"][0]["spec"]["jobTemplate"]
    where = difference(job["rayClusterSpec"], cluster)
    if where is not None:
        same = "the cluster of raycluster.yaml"
        yield Problem("kuberay/rayjob.yaml", f"spec.rayClusterSpec{where}", same, "another")
    where = difference(nightly, job)
    if where is not None:
        same = "the spec of rayjob.yaml"
        yield Problem("kuberay/raycronjob.yaml", f"spec.jobTemplate{where}", same, "another")
    made = set(re.findall(r"kubectl create (?:secret generic|configmap) (\S+)", readme))
    used = {name: file for file, parts in documents.items() for name in needed_names(parts)}
    for name, file in used.items():
        if name not in made:
            yield Problem(file, name, "a command in README.md that makes it", "none")
    for name in made - set(used):
        yield Problem("README.md", name, "a secret or config map that a manifest uses", "none")


def difference(one: Any, other: Any) -> str | None:
    """Where two values differ first; None: nowhere."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in (*one, *other):
            if key not in one or key not in other:
                return f".{key}"
            if (where := difference(one[key], other[key])) is not None:
                return f".{key}{where}"
        return None
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            if (where := difference(*pair)) is not None:
                return f"[{index}]{where}"
        return None
    return None if one == other else ""


def needed_names(value: Any) -> set[str]:
    """Names of the secrets and config maps that a part of a manifest refers to."""
    if isinstance(value, list):
        return {name for member in value for name in needed_names(member)}
    if not isinstance(value, Mapping):
        return set()
    references = ("secretRef", "secretKeyRef", "configMapRef", "configMapKeyRef", "configMap")
    names = {value[key]["name"] for key in references if isinstance(value.get(key), Mapping)}
    return names | {name for member in value.values() for name in needed_names(member)}


class UniqueKeyLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """A key that stands twice is an error; PyYAML takes the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                problem = f"the key {key!r} stands here twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


@cache
def load_all(text: str) -> list[Any]:
    """The documents of a YAML file; not to be changed."""
    return [part for part in yaml.load_all(text, UniqueKeyLoader) if part is not None]


@cache
def reduced_schemas() -> dict[str, Any]:
    """Of KubeRay's kinds, what deploy/ uses."""
    schemas: dict[str, Any] = json.loads(REDUCED.read_text())["kinds"]
    return schemas


@cache
def pinned(name: str) -> str:
    """The version of a package that .ci/constraints.txt pins."""
    text = (ROOT / ".ci" / "constraints.txt").read_text()
    match = re.search(rf"^{re.escape(name)}==(\S+)$", text, flags=re.M | re.I)
    assert match is not None, name
    return match[1]


# ---- images -------------------------------------------------------------------------------------

# aws and gcp: the cpu variant with the client of that cloud, for the head of a VM cluster.
VARIANTS = ("cpu", "cuda", "aws", "gcp")


def image_name(variant: str) -> str:
    """The image of this version of the package, with the pinned Ray."""
    return f"ghcr.io/OWNER/erniem-batch:{__version__}-ray{pinned('ray')}-{variant}"


def image_name_problems(file: str, text: str) -> Problems:
    """Images anywhere in a file, comments included."""
    good = {image_name(variant) for variant in VARIANTS}
    for number, line in enumerate(text.splitlines(), start=1):
        for name in re.findall(r"[\w./-]*erniem-batch:[\w.-]+", line):
            if name not in good:
                yield Problem(file, f"line {number}", f"one of {_listed(good)}", name)


# ---- schemas ------------------------------------------------------------------------------------


def schema_problems(file: str, where: str, value: Any, schema: Mapping[str, Any]) -> Problems:
    """What a JSON schema does not allow."""
    for error in jsonschema.Draft202012Validator(schema).iter_errors(value):
        place = where + _path(error.absolute_path)
        if error.validator == "additionalProperties":
            known = error.schema.get("properties", {})
            for key in set(error.instance) - set(known):
                yield Problem(file, place or "top", f"only {_listed(known)}", f"{key!r}")
        elif error.validator == "required":
            missing = [key for key in error.validator_value if key not in error.instance]
            yield Problem(file, place or "top", f"the field {', '.join(missing)}", "none")
        else:
            expected = f"{error.validator} {error.validator_value}"
            yield Problem(file, place or "top", expected, repr(error.instance))


def _path(parts: Iterable[str | int]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.removeprefix(".")


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(sorted(map(str, values)))


def _fields(required: str, optional: str = "", **known: Any) -> dict[str, Any]:
    """A schema of an object: names of its fields, and schemas for those that have one."""
    names = [*required.split(), *optional.split()]
    return {
        "type": "object",
        "properties": {name: known.get(name, {}) for name in names},
        "required": required.split(),
        "additionalProperties": False,
    }


STRING = {"type": "string", "minLength": 1}
STRINGS = {"type": "array", "items": STRING, "minItems": 1}
COUNT = {"type": "integer", "minimum": 0}
NAMED = {**METADATA, "required": ["name"]}


def core_schema(key: str, pod_template: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of Kubernetes' own kinds, what deploy/ uses; None: not known here."""
    rule = _fields("apiGroups resources verbs", apiGroups=STRINGS, resources=STRINGS, verbs=STRINGS)
    reference = _fields("apiGroup kind name", apiGroup=STRING, kind=STRING, name=STRING)
    subject = _fields("kind name", "namespace", kind=STRING, name=STRING, namespace=STRING)
    job = _fields(
        *("template", "backoffLimit activeDeadlineSeconds ttlSecondsAfterFinished"),
        template=pod_template,
        backoffLimit=COUNT,
        activeDeadlineSeconds=COUNT,
        ttlSecondsAfterFinished=COUNT,
    )
    cron_job = _fields(
        "schedule jobTemplate",
        "timeZone concurrencyPolicy startingDeadlineSeconds successfulJobsHistoryLimit "
        "failedJobsHistoryLimit suspend",
        schedule=STRING,
        timeZone=STRING,
        concurrencyPolicy={"enum": ["Allow", "Forbid", "Replace"]},
        startingDeadlineSeconds=COUNT,
        successfulJobsHistoryLimit=COUNT,
        failedJobsHistoryLimit=COUNT,
        suspend={"type": "boolean"},
        jobTemplate=_fields("spec", "metadata", spec=job, metadata=METADATA),
    )
    labels = {"type": "object", "additionalProperties": STRING, "minProperties": 1}
    budget = _fields(
        "selector minAvailable",
        selector=_fields("matchLabels", matchLabels=labels),
        minAvailable={"type": "integer", "minimum": 1},
    )
    rbac = "rbac.authorization.k8s.io/v1"
    bodies: dict[str, dict[str, Any]] = {
        "v1/ServiceAccount": {},
        f"{rbac}/Role": {"rules": {"type": "array", "items": rule}},
        f"{rbac}/RoleBinding": {
            "roleRef": reference,
            "subjects": {"type": "array", "items": subject},
        },
        "batch/v1/CronJob": {"spec": cron_job},
        "policy/v1/PodDisruptionBudget": {"spec": budget},
    }
    if key not in bodies:
        return None
    return _fields(f"apiVersion kind metadata {' '.join(bodies[key])}", metadata=NAMED) | {
        "properties": {"apiVersion": STRING, "kind": STRING, "metadata": NAMED, **bodies[key]}
    }


# ---- Kubernetes ---------------------------------------------------------------------------------

# A RayJob and a RayService lend their name to a cluster, with six more letters.
NAME_LENGTHS = {"RayCluster": 53, "RayJob": 47, "RayService": 47, "RayCronJob": 47}
GPU = "nvidia.com/gpu"


def kubernetes_problems(
    file: str, documents: Sequence[Any], dockerfile: str, schemas: Mapping[str, Any]
) -> Problems:
    """Of one file: the schema first, and only what passes it is looked at more closely."""
    known = True
    for document in documents:
        key = f"{document.get('apiVersion')}/{document.get('kind')}"
        schema = schemas.get(key) or core_schema(key, schemas[POD_TEMPLATE])
        if schema is None:
            yield Problem(file, "kind", "a kind that the checks know", key)
            known = False
            continue
        for problem in schema_problems(file, "", document, schema):
            yield problem
            known = False
    if not known:
        return
    for document in documents:
        yield from _name_problems(file, document)
        spec = document.get("spec", {})
        match document["kind"]:
            case "RayCluster":
                yield from cluster_problems(file, "spec", spec)
            case "RayJob":
                yield from job_problems(file, "spec", spec, dockerfile)
            case "RayCronJob":
                yield from schedule_problems(file, spec)
                template = spec["jobTemplate"]
                yield from job_problems(file, "spec.jobTemplate", template, dockerfile)
            case "RayService":
                yield from service_problems(file, spec)
            case "CronJob":
                yield from schedule_problems(file, spec)
                yield from cron_job_problems(file, spec, documents, dockerfile)
            case "RoleBinding":
                yield from _reference_problems(file, document, documents)
            case "PodDisruptionBudget":
                yield from _budget_problems(file, document, documents)


def _name_problems(file: str, document: Mapping[str, Any]) -> Problems:
    name, longest = document["metadata"]["name"], NAME_LENGTHS.get(document["kind"], 253)
    if len(name) > longest or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        expected = f"at most {longest} of a-z, 0-9 and -, a letter first"
        yield Problem(file, "metadata.name", expected, name)


def _reference_problems(
    file: str, binding: Mapping[str, Any], documents: Sequence[Mapping[str, Any]]
) -> Problems:
    there = {(document["kind"], document["metadata"]["name"]) for document in documents}
    role = binding["roleRef"]
    for where, part in (("roleRef", role), *(("subjects", part) for part in binding["subjects"])):
        if (part["kind"], part["name"]) not in there:
            got = f"{part['kind']} {part['name']}"
            yield Problem(file, f"RoleBinding.{where}", "something in this file", got)


def _budget_problems(
    file: str, budget: Mapping[str, Any], documents: Sequence[Mapping[str, Any]]
) -> Problems:
    wanted = budget["spec"]["selector"]["matchLabels"].items()
    for document in documents:
        if document["kind"] == "RayService":
            for group in document["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
                labels = group["template"].get("metadata", {}).get("labels", {})
                if not wanted <= labels.items():
                    where = f"PodDisruptionBudget.spec.selector, group {group['groupName']}"
                    yield Problem(file, where, "labels of the group's pods", repr(labels))


# ---- Ray clusters in Kubernetes -----------------------------------------------------------------


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
        got = f"{_listed(resources)} too"
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
        yield Problem(file, place, f"those that are mounted: {_listed(mounted)}", _listed(volumes))


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


# ---- jobs ---------------------------------------------------------------------------------------


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
        yield problem("submissionMode", _listed(modes), mode)
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
    script = _script_of(spec.get("entrypoint", ""))
    if script and script not in image_files(dockerfile):
        yield problem("entrypoint", "a script that the Dockerfile copies to /app", script)


def _script_of(entrypoint: str) -> str | None:
    words = entrypoint.split()
    return words[1] if len(words) > 1 and words[0] == "python" else None


def entrypoint_problems(
    file: str, where: str, entrypoint: str, cluster: Mapping[str, Any]
) -> Problems:
    """Whether the script is there, its flags are right, and its actors fit in the groups."""
    script = _script_of(entrypoint)
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


# ---- times --------------------------------------------------------------------------------------

MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
DAYS = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"]
CRON_FIELDS: tuple[tuple[str, int, int, Sequence[str]], ...] = (
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of month", 1, 31, ()),
    ("month", 1, 12, MONTHS),
    ("day of week", 0, 6, DAYS),
)


def schedule_problems(file: str, spec: Mapping[str, Any]) -> Problems:
    """Five fields as Kubernetes and KubeRay read them, and a time zone beside them.

    Both use Go's robfig/cron, which is stricter than crontab: no 7 for Sunday, no L, no seconds.
    """
    schedule = spec["schedule"]
    parts = schedule.split()
    if len(parts) != len(CRON_FIELDS):
        expected = "minute, hour, day of month, month, day of week"
        yield Problem(file, "spec.schedule", expected, repr(schedule))
        return
    for part, (name, low, high, words) in zip(parts, CRON_FIELDS, strict=True):
        for piece in part.split(","):
            if not _is_cron_range(piece, low, high, words):
                expected = f"a {name} from {low} to {high}, *, a-b or */n"
                yield Problem(file, "spec.schedule", expected, repr(piece))
    zone = spec.get("timeZone")
    if zone is None:
        yield Problem(file, "spec.timeZone", "a time zone: else that of the controller", "none")
    elif zone not in zoneinfo.available_timezones():
        yield Problem(file, "spec.timeZone", "a name such as Etc/UTC", repr(zone))


def _is_cron_range(text: str, low: int, high: int, words: Sequence[str]) -> bool:
    span, slash, step = text.partition("/")
    if slash and not (step.isdigit() and int(step) > 0):
        return False
    if span == "*":
        return True
    ends = []
    for end in span.split("-"):
        lowered = end.lower()
        number = words.index(lowered) + low if lowered in words else end
        if not str(number).isdigit():
            return False
        ends.append(int(number))
    return len(ends) <= 2 and low <= ends[0] <= ends[-1] <= high


def cron_job_problems(
    file: str,
    spec: Mapping[str, Any],
    documents: Sequence[Mapping[str, Any]],
    dockerfile: str,
) -> Problems:
    """Of the CronJob that starts a RayJob."""
    if spec.get("concurrencyPolicy") != "Forbid":
        got = repr(spec.get("concurrencyPolicy"))
        yield Problem(file, "spec.concurrencyPolicy", "Forbid: one night at a time", got)
    template = spec["jobTemplate"]["spec"]["template"]
    where = "spec.jobTemplate.spec.template"
    yield from pod_problems(file, where, template)
    pod = template["spec"]
    if pod.get("restartPolicy") not in ("Never", "OnFailure"):
        got = repr(pod.get("restartPolicy"))
        yield Problem(file, f"{where}.spec.restartPolicy", "Never or OnFailure", got)
    named = {(document["kind"], document["metadata"]["name"]): document for document in documents}
    if ("ServiceAccount", pod.get("serviceAccountName")) not in named:
        got = repr(pod.get("serviceAccountName"))
        yield Problem(file, f"{where}.spec.serviceAccountName", "an account of this file", got)
    container = pod["containers"][0]
    script = _script_of(" ".join(container.get("command", [])))
    source = image_files(dockerfile).get(script or "")
    if source is None:
        expected = "python and a script that the Dockerfile copies to /app"
        yield Problem(file, f"{where}.spec.containers[0].command", expected, repr(script))
        return
    # One rule for each kind of request that the script sends.
    sent = set(re.findall(r'_send\("([A-Z]+)"', (ROOT / source).read_text()))
    verbs = {{"POST": "create"}.get(method, method.lower()) for method in sent}
    roles = [document for document in documents if document["kind"] == "Role"]
    allowed = {
        verb
        for role in roles
        for rule in role["rules"]
        if rule["apiGroups"] == ["ray.io"] and rule["resources"] == ["rayjobs"]
        for verb in rule["verbs"]
    }
    if allowed != verbs:
        expected = f"what {source} does with rayjobs: {_listed(verbs)}"
        yield Problem(file, "Role.rules", expected, _listed(allowed))


# ---- the service --------------------------------------------------------------------------------

# What a replica that ends takes beyond request_timeout_s (GRACE_S in serve/deployments.py).
GRACE_S = 10


def service_problems(file: str, spec: Mapping[str, Any]) -> Problems:
    """Of a RayService that is to outlive the loss of any one machine."""
    cluster = spec["rayClusterConfig"]
    yield from cluster_problems(file, "spec.rayClusterConfig", cluster)
    strategy = spec.get("upgradeStrategy", {}).get("type", "NewCluster")
    if strategy not in ("NewCluster", "None"):  # the third one needs a gateway
        yield Problem(file, "spec.upgradeStrategy.type", "NewCluster or None", strategy)
    if not spec.get("excludeHeadPodFromServeSvc"):
        yield Problem(file, "spec.excludeHeadPodFromServeSvc", "true", "false")
    if "gcsFaultToleranceOptions" not in cluster:
        yield Problem(file, "spec.rayClusterConfig.gcsFaultToleranceOptions", "Redis", "none")
    if cluster["headGroupSpec"].get("headService", {}).get("metadata", {}).get("name"):
        yield Problem(file, "spec.rayClusterConfig.headGroupSpec.headService", "no name", "one")
    place = "spec.serveConfigV2"
    try:
        (config,) = load_all(spec.get("serveConfigV2", ""))
    except (yaml.YAMLError, ValueError) as error:
        yield Problem(file, place, "one YAML document", " ".join(str(error).split()))
        return
    wrong = list(serve_problems(file, place, config))
    yield from wrong
    if wrong:
        return
    http = config["http_options"]
    if http["host"] != "0.0.0.0":
        yield Problem(file, f"{place}.http_options.host", "0.0.0.0 in a pod", http["host"])
    arguments = config["applications"][0]["args"]
    for index, group in enumerate(cluster["workerGroupSpecs"]):
        place = f"spec.rayClusterConfig.workerGroupSpecs[{index}].template.spec"
        pod = group["template"]["spec"]
        container = pod["containers"][0]
        ports = [port["containerPort"] for port in container.get("ports", [])]
        probe = container.get("readinessProbe", {}).get("httpGet", {})
        if ports != [http["port"]] or probe != {"path": "/-/healthz", "port": http["port"]}:
            expected = f"port {http['port']} and a readinessProbe of its /-/healthz"
            yield Problem(file, f"{place}.containers[0]", expected, f"{ports}, {probe}")
        if pod["terminationGracePeriodSeconds"] < arguments["request_timeout_s"] + GRACE_S:
            expected = f"at least request_timeout_s and {GRACE_S} s more"
            got = str(pod["terminationGracePeriodSeconds"])
            yield Problem(file, f"{place}.terminationGracePeriodSeconds", expected, got)
    if not any(group["minReplicas"] >= 2 for group in cluster["workerGroupSpecs"]):
        place = "spec.rayClusterConfig.workerGroupSpecs"
        yield Problem(file, place, "a group with minReplicas of 2 or more", "none")
    yield from _replica_problems(file, arguments, cluster["workerGroupSpecs"])


def _replica_problems(
    file: str, arguments: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> Problems:
    from erniem_batch.serve.config import Autoscaling, app_config

    most = 0.0
    for model in app_config(dict(arguments)).all_models:
        scaling = model.replicas
        low = scaling.min_replicas if isinstance(scaling, Autoscaling) else scaling
        high = scaling.max_replicas if isinstance(scaling, Autoscaling) else scaling
        most += high * model.num_cpus
        if low < 2:
            place = f"spec.serveConfigV2 model {model.name}"
            yield Problem(file, place, "2 replicas or more", str(low))
    limits = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in groups]
    there = sum(
        group["maxReplicas"] * quantity(limit["cpu"])
        for group, limit in zip(groups, limits, strict=True)
        if GPU not in limit
    )
    if most > there:
        expected = f"groups with {most:g} CPUs for all replicas"
        yield Problem(file, "spec.rayClusterConfig.workerGroupSpecs", expected, f"{there:g}")


def serve_problems(file: str, where: str, config: Any) -> Problems:
    """Of a configuration of Ray Serve. Its own schema takes misspelt keys in silence."""
    from pydantic import ValidationError
    from ray.serve.schema import (
        HTTPOptionsSchema,
        LoggingConfig,
        ServeApplicationSchema,
        ServeDeploySchema,
    )

    from erniem_batch.serve.config import app_config

    where = where and f"{where}."
    parts = [("", config, ServeDeploySchema)]
    parts.append(("http_options", config.get("http_options", {}), HTTPOptionsSchema))
    parts.append(("logging_config", config.get("logging_config", {}), LoggingConfig))
    applications = config.get("applications", [])
    for index, application in enumerate(applications):
        parts.append((f"applications[{index}]", application, ServeApplicationSchema))
    wrong = False
    for place, value, schema in parts:
        for key in set(value) - set(schema.model_fields):
            expected = f"only {_listed(schema.model_fields)}"
            yield Problem(file, f"{where}{place}".strip(".") or "top", expected, repr(key))
            wrong = True
    if wrong:
        return
    try:
        ServeDeploySchema(**config)
    except ValidationError as error:
        for item in error.errors():
            yield Problem(file, where + _path(item["loc"]), item["msg"], repr(item["input"]))
        return
    if len(applications) != 1:
        yield Problem(file, f"{where}applications", "one application", str(len(applications)))
        return
    (application,) = applications
    if application.get("import_path") != "erniem_batch.serve:app":
        got = repr(application.get("import_path"))
        yield Problem(file, f"{where}applications[0].import_path", "erniem_batch.serve:app", got)
    try:
        settings = app_config(application.get("args", {}))
    except ErnieMBatchError as error:
        yield Problem(file, f"{where}applications[0].args", "settings of AppConfig", str(error))
        return
    if settings.request_timeout_s >= config["http_options"]["request_timeout_s"]:
        place = f"{where}http_options.request_timeout_s"
        got = str(config["http_options"]["request_timeout_s"])
        yield Problem(file, place, "more than request_timeout_s of args", got)


# ---- VM clusters --------------------------------------------------------------------------------


def vm_problems(file: str, config: dict[str, Any]) -> Problems:
    """Of a file for `ray up`: what Ray checks itself, and what it does not."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        prepared = prepare_config(json.loads(json.dumps(config)))
        validate_config(prepared)
    except jsonschema.ValidationError as error:
        yield Problem(file, _path(error.absolute_path) or "top", "Ray's schema", error.message)
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
        got = _listed(config["file_mounts"])
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
    open_to_all = [path for path, value in _leaves(config["provider"]) if value == "0.0.0.0/0"]
    for path in open_to_all:
        yield Problem(file, f"provider.{path}", "a network of yours", "0.0.0.0/0")


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, member in value.items():
            yield from _leaves(member, f"{path}.{key}".strip("."))
    elif isinstance(value, list):
        for index, member in enumerate(value):
            yield from _leaves(member, f"{path}[{index}]")
    else:
        yield path, value


# ---- Prometheus and Grafana ---------------------------------------------------------------------

AGGREGATIONS = ("sum", "max", "min", "avg", "count")
FUNCTIONS = ("rate", "increase", "histogram_quantile", "clamp_min")
GROUPINGS = ("by", "without", "on", "ignoring")
OPERATORS = ("and", "or", "unless", "bool")
# Of every series, from the scraping.
COMMON_LABELS = ("instance", "job", "namespace", "pod", "ray_cluster")
TOKEN = re.compile(
    r"""(?P<text>"(?:[^"\\]|\\.)*") | (?P<name>[A-Za-z_:][\w:]*) | (?P<variable>\$\w+|\$\{\w+\})
    | (?P<number>\d+(?:\.\d+)?(?:ms|[smhdw])?) | (?P<sign>=~|!~|!=|==|<=|>=|[=<>+\-*/%(){}\[\],])
    | (?P<space>\s+)""",
    re.X,
)
DURATION = re.compile(r"\d+(ms|s|m|h|d|w)")


def exposed_metrics() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Kind and labels of each name that Prometheus knows."""
    exposed: dict[str, tuple[str, tuple[str, ...]]] = {"up": ("gauge", ())}
    for name, (kind, labels) in (BATCH_METRICS | SERVE_METRICS).items():
        if kind == "counter":
            exposed[f"ray_{name}_total"] = (kind, labels)
        elif kind == "histogram":
            exposed[f"ray_{name}_bucket"] = (kind, (*labels, "le"))
            exposed[f"ray_{name}_sum"] = exposed[f"ray_{name}_count"] = (kind, labels)
        else:
            exposed[f"ray_{name}"] = (kind, labels)
    return exposed


def expression_problems(file: str, where: str, expression: str) -> Problems:
    """Of an expression in Prometheus' language: metrics and labels that exist, counters as rates.

    No full grammar: enough to find what a renamed metric or a slip of the hand leaves behind.
    """
    tokens: list[tuple[str, str]] = []
    position = 0
    while position < len(expression):
        match = TOKEN.match(expression, position)
        if match is None:
            yield Problem(file, where, "an expression of Prometheus", expression[position:])
            return
        position = match.end()
        if match.lastgroup != "space":
            tokens.append((match.lastgroup or "", match[0]))
    opened: list[str] = []
    grouped: list[str] = []
    metrics: list[str] = []
    known = exposed_metrics()
    for index, (kind, text) in enumerate(tokens):
        before = [token for _, token in tokens[max(0, index - 2) : index]]
        after = tokens[index + 1][1] if index + 1 < len(tokens) else ""
        if text in ("(", "[", "{"):
            opened.append(
                "labels" if text == "(" and before[-1:] and before[-1] in GROUPINGS else text
            )
        elif text in (")", "]", "}"):
            pairs = {")": ("(", "labels"), "]": ("[",), "}": ("{",)}
            if not opened or opened.pop() not in pairs[text]:
                yield Problem(file, where, "brackets that close", expression)
                return
        if kind != "name" or text in OPERATORS or text in GROUPINGS:
            continue
        if opened and opened[-1] == "labels":
            grouped.append(text)
        elif opened and opened[-1] == "{":
            labels = (*known.get(metrics[-1], ("", ()))[1], *COMMON_LABELS) if metrics else ()
            if text not in labels:
                yield Problem(file, where, f"a label of {metrics[-1:]}: {_listed(labels)}", text)
        elif after == "(" or (text in AGGREGATIONS and after in GROUPINGS):
            if text not in (*FUNCTIONS, *AGGREGATIONS):
                yield Problem(file, where, _listed((*FUNCTIONS, *AGGREGATIONS)), text)
        elif text not in known:
            yield Problem(file, where, "a metric that exists", text)
            return
        else:
            metrics.append(text)
            rated = before in (["rate", "("], ["increase", "("])
            if (known[text][0] == "gauge") == rated and text != "up":
                expected = "rate() or increase() of a counter, and of nothing else"
                yield Problem(file, where, expected, text)
    if opened:
        yield Problem(file, where, "brackets that close", expression)
    if not metrics:
        yield Problem(file, where, "a metric", expression)
    for label in grouped:
        for metric in metrics:
            if label not in (*known[metric][1], *COMMON_LABELS):
                yield Problem(file, where, f"a label of {metric}", label)


def grouped_labels(expression: str) -> set[str]:
    """Labels that the result of an expression has."""
    groups = re.findall(r"\bby \(([^)]*)\)", expression)
    return {label.strip() for group in groups for label in group.split(",")}


def dashboard_problems(file: str, dashboard: Mapping[str, Any]) -> Problems:
    """Of a dashboard of Grafana."""
    for name in ("title", "uid", "schemaVersion", "templating", "panels"):
        if name not in dashboard:
            yield Problem(file, name, "a value", "none")
            return
    known = exposed_metrics()
    variables = {"datasource"}
    for variable in dashboard["templating"]["list"]:
        variables.add(variable["name"])
        if variable["type"] != "query":
            continue
        query = variable["query"]["query"]
        match = re.fullmatch(r"label_values\((\w+), (\w+)\)", query)
        if match is None or match[2] not in known.get(match[1], ("", ()))[1]:
            where = f"templating, {variable['name']}"
            yield Problem(file, where, "label_values of a metric and its label", query)
    identities = [panel["id"] for panel in dashboard["panels"]]
    if len(set(identities)) < len(identities):
        yield Problem(file, "panels", "ids of their own", repr(identities))
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard["panels"]:
        where = f"panel {panel['title']!r}"
        if not panel.get("description"):
            yield Problem(file, where, "a description", "none")
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                other = taken.setdefault((x, y), panel["title"])
                if other != panel["title"] or x >= 24:
                    yield Problem(file, where, "a free place within 24 columns", f"that of {other}")
                    return
        for target in panel["targets"]:
            expression = target["expr"]
            wrong = list(expression_problems(file, where, expression))
            yield from wrong
            for name in re.findall(r"\$\{?(\w+)", expression):
                if name not in variables and not name.startswith("__"):
                    yield Problem(file, where, f"a variable: {_listed(variables)}", name)
            for label in re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")):
                if label not in grouped_labels(expression):
                    got = f"{{{{{label}}}}} in the legend"
                    yield Problem(file, where, "a label that the result has", got)


SCRAPE_KEYS = {
    "": {"global", "rule_files", "scrape_configs"},
    "global": {"scrape_interval", "evaluation_interval", "scrape_timeout", "external_labels"},
    "scrape_configs": {
        *("job_name", "scrape_interval", "metrics_path", "scheme", "relabel_configs"),
        *("file_sd_configs", "http_sd_configs", "kubernetes_sd_configs", "static_configs"),
    },
    "file_sd_configs": {"files", "refresh_interval"},
    "http_sd_configs": {"url", "authorization", "refresh_interval"},
    "kubernetes_sd_configs": {"role", "namespaces"},
    "relabel_configs": {"source_labels", "action", "regex", "target_label", "replacement"},
}
ACTIONS = ("replace", "keep", "drop", "labelmap", "labeldrop", "labelkeep")
ROLES = ("node", "service", "pod", "endpoints", "endpointslice", "ingress")


def prometheus_problems(file: str, config: Mapping[str, Any], files: Mapping[str, str]) -> Problems:
    """Of a configuration of Prometheus."""

    def unknown_keys(where: str, kind: str, value: Any) -> Problems:
        for key in set(value) - SCRAPE_KEYS[kind]:
            yield Problem(file, where or "top", f"only {_listed(SCRAPE_KEYS[kind])}", repr(key))

    yield from unknown_keys("", "", config)
    yield from unknown_keys("global", "global", config.get("global", {}))
    for path, value in _leaves(config):
        if path.endswith(("_interval", "_timeout")) and not DURATION.fullmatch(str(value)):
            yield Problem(file, path, "a duration such as 15s", repr(value))
    for name in config.get("rule_files", []):
        if name not in files:
            yield Problem(file, "rule_files", "a file of deploy/", name)
    names = [job.get("job_name") for job in config.get("scrape_configs", [])]
    if len(set(names)) < len(names) or None in names or not names:
        yield Problem(file, "scrape_configs", "jobs with names of their own", repr(names))
    for index, job in enumerate(config.get("scrape_configs", [])):
        where = f"scrape_configs[{index}]"
        yield from unknown_keys(where, "scrape_configs", job)
        for kind in SCRAPE_KEYS["scrape_configs"] & SCRAPE_KEYS.keys() & job.keys():
            for number, part in enumerate(job[kind]):
                place = f"{where}.{kind}[{number}]"
                yield from unknown_keys(place, kind, part)
                if kind == "relabel_configs":
                    yield from _relabel_problems(file, place, part)
                if part.get("role", "pod") not in ROLES:
                    yield Problem(file, f"{place}.role", _listed(ROLES), part["role"])


def _relabel_problems(file: str, where: str, rule: Mapping[str, Any]) -> Problems:
    if rule.get("action", "replace") not in ACTIONS:
        yield Problem(file, f"{where}.action", _listed(ACTIONS), rule["action"])
    # yes without quotation marks is true in YAML.
    if not isinstance(rule.get("regex", ""), str):
        yield Problem(file, f"{where}.regex", "text", repr(rule["regex"]))
    if rule.get("action", "replace") == "replace" and "target_label" not in rule:
        yield Problem(file, where, "target_label", "none")


def alert_problems(file: str, config: Mapping[str, Any]) -> Problems:
    """Of rules for alerts."""
    rule_schema = _fields("alert expr for labels annotations", alert=STRING, expr=STRING)
    rule_schema["properties"] |= {
        "for": {"type": "string", "pattern": f"^{DURATION.pattern}$"},
        "labels": _fields("severity", severity={"enum": ["warning", "critical"]}),
        "annotations": _fields("summary", summary=STRING),
    }
    rules = {"type": "array", "items": rule_schema, "minItems": 1}
    group = _fields("name rules", "interval", name=STRING, rules=rules)
    schema = _fields("groups", groups={"type": "array", "items": group, "minItems": 1})
    wrong = list(schema_problems(file, "", config, schema))
    yield from wrong
    if wrong:
        return
    names: list[str] = []
    for rule in (rule for group in config["groups"] for rule in group["rules"]):
        where = rule["alert"]
        if where in names:
            yield Problem(file, where, "a name of its own", where)
        names.append(where)
        yield from expression_problems(file, where, rule["expr"])
        for label in re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]):
            if label not in grouped_labels(rule["expr"]):
                yield Problem(file, where, "a label that the result has", f"$labels.{label}")


# ---- the image ----------------------------------------------------------------------------------

# bash, wget: KubeRay's probes and start commands. rsync, openssh-client: `ray up`.
PACKAGES = {"bash", "wget", "rsync", "openssh-client", "tini"}
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "ERNIEM_BATCH_CACHE": "/cache",
    "HOME": f"/home/{IMAGE_USER}",
}
PREDEFINED = {"PATH"}


@dataclass(frozen=True, slots=True)
class Stage:
    """From one FROM to the next: its instructions, and its arguments with their defaults."""

    name: str
    base: str
    instructions: tuple[tuple[str, str], ...]
    arguments: Mapping[str, str]


def stages(dockerfile: str) -> list[Stage]:
    """A Dockerfile, read; arguments before the first FROM count for FROM lines only."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n", " ", "\n".join(lines))
    early: dict[str, str] = {}
    found: list[tuple[str, str, list[tuple[str, str]], dict[str, str]]] = []
    for line in filter(str.strip, text.splitlines()):
        word, _, rest = line.strip().partition(" ")
        word, rest = word.upper(), " ".join(rest.split())
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found.append((name, expanded(base, early), [], {}))
            continue
        if word == "ARG":
            name, _, default = rest.partition("=")
            (found[-1][3] if found else early)[name] = default
        if found:
            found[-1][2].append((word, rest))
    return [Stage(name, base, tuple(parts), given) for name, base, parts, given in found]


def expanded(text: str, values: Mapping[str, str]) -> str:
    """With ${NAME} put in."""
    return re.sub(r"\$\{(\w+)\}", lambda match: values.get(match[1], match[0]), text)


def image_files(dockerfile: str) -> dict[str, str]:
    """Files of the working directory of the image, by path below it: where they come from."""
    *_, final = stages(dockerfile)
    copied: dict[str, str] = {}
    for word, rest in final.instructions:
        if word != "COPY" or rest.startswith("--from="):
            continue
        *sources, target = expanded(rest, final.arguments).split()
        for source in sources:
            path = ROOT / source
            inside = target.removeprefix("./")
            if inside.startswith("/"):
                continue
            if path.is_dir():
                for file in path.rglob("*.py"):
                    below = file.relative_to(path).as_posix()
                    copied[f"{inside}/{below}"] = file.relative_to(ROOT).as_posix()
            elif path.is_file():
                copied[f"{inside}{path.name}" if inside.endswith("/") else inside] = source
    return copied


def dockerfile_problems(file: str, text: str, ignored: str) -> Problems:
    """Of a Dockerfile that cannot be built here."""
    read = stages(text)
    *_, final = read
    words = [word for stage in read for word, _ in stage.instructions]
    for word in {"ADD", "HEALTHCHECK"} & set(words):
        yield Problem(file, word, "none", word)
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = required["requires-python"].removeprefix(">=")
    users = [rest for word, rest in final.instructions if word == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1]):
        yield Problem(file, "the last USER", "a number that is not root's", str(users[-1:]))
    for stage in read:
        where = f"stage {stage.name or 'of the image'}"
        _, _, tag = stage.base.partition(":")
        if not re.match(rf"{re.escape(python)}[.-]", tag):
            yield Problem(file, where, f"an image of Python {python}", stage.base)
        yield from _argument_problems(file, where, stage)
        yield from _copy_problems(file, where, stage, {other.name for other in read}, ignored)
        yield from _install_problems(file, where, stage, set(required["optional-dependencies"]))
    environment = dict(
        pair.split("=", 1)
        for word, rest in final.instructions
        if word == "ENV"
        for pair in shlex.split(rest)
    )
    for name, value in SETTINGS.items():
        if environment.get(name) != value:
            got = repr(environment.get(name))
            yield Problem(file, f"ENV {name}", value, got)
    commands = " ".join(rest for word, rest in final.instructions if word == "RUN")
    for package in PACKAGES - set(commands.split()):
        yield Problem(file, "RUN apt-get install", package, "none")
    for word, rest in final.instructions:
        if word in ("CMD", "ENTRYPOINT"):
            try:
                ast.literal_eval(rest)
            except (SyntaxError, ValueError):
                yield Problem(file, word, "a JSON list: a shell would swallow signals", rest)


def _argument_problems(file: str, where: str, stage: Stage) -> Problems:
    texts = [rest for word, rest in stage.instructions if word != "ARG"]
    used = set(re.findall(r"\$\{(\w+)\}", " ".join(texts)))
    for name in set(stage.arguments) - used:
        yield Problem(file, f"{where}, ARG {name}", "that it is used", "not used")
    for name in used - set(stage.arguments) - PREDEFINED:
        yield Problem(file, where, f"ARG {name}", "none")


def _copy_problems(file: str, where: str, stage: Stage, names: set[str], ignored: str) -> Problems:
    for word, rest in stage.instructions:
        if word != "COPY":
            continue
        *sources, _ = expanded(rest, stage.arguments).split()
        if sources[0].startswith("--from="):
            name = sources[0].removeprefix("--from=")
            if name not in names:
                yield Problem(file, where, f"a stage: {_listed(names)}", name)
            continue
        for source in sources:
            if not (ROOT / source).exists():
                yield Problem(file, f"{where}, COPY", "a path in the repository", source)
            elif is_ignored(source, ignored):
                yield Problem(file, f"{where}, COPY", "a path that .dockerignore keeps", source)


def _install_problems(file: str, where: str, stage: Stage, extras: set[str]) -> Problems:
    for word, rest in stage.instructions:
        if word == "RUN" and "pip install" in rest and "-c constraints.txt" not in rest:
            yield Problem(file, f"{where}, RUN", "-c constraints.txt", rest)
    for name in set(filter(None, stage.arguments.get("EXTRAS", "").split(","))) - extras:
        yield Problem(file, f"{where}, ARG EXTRAS", _listed(extras), name)
    index = stage.arguments.get("TORCH_INDEX", "https://download.pytorch.org/whl/")
    if not index.startswith("https://download.pytorch.org/whl/"):
        yield Problem(file, f"{where}, ARG TORCH_INDEX", "that of pytorch.org", index)


def is_ignored(path: str, patterns: str) -> bool:
    """Whether a .dockerignore keeps a path out: the last pattern that matches decides."""
    parts = Path(path).parts
    tried = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    ignored = False
    for line in patterns.splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#"):
            bare = pattern.removeprefix("!").removeprefix("**/")
            if any(fnmatch.fnmatchcase(name, bare) for name in tried):
                ignored = not pattern.startswith("!")
    return ignored
