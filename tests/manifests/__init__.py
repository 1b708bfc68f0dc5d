"""What must be right in deploy/, as functions that give back what is wrong.

The manifests cannot be run in a test; what can be said of them without a cluster is said here:
their schema, the rules that KubeRay's operator and Ray apply on top of it, what they say of each
other, and of this package (scripts, flags, versions, metrics).
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml
from kuberay_schema import ROOT

from manifests.common import (
    DEPLOY,
    Problem,
    Problems,
    image_name_problems,
    load_all,
    reduced_schemas,
)
from manifests.figures import alert_problems, dashboard_problems, prometheus_problems
from manifests.image import dockerfile_problems
from manifests.kubernetes import kubernetes_problems
from manifests.machines import vm_problems
from manifests.service import serve_problems


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
