"""A manifest as a whole: kinds, names, references."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kuberay_schema import POD_TEMPLATE

from manifests.clusters_of_ray import cluster_problems
from manifests.common import Problem, Problems
from manifests.jobs import job_problems
from manifests.schemas import core_schema, schema_problems
from manifests.service import service_problems
from manifests.times import cron_job_problems, schedule_problems

# A RayJob and a RayService lend their name to a cluster, with six more letters.
NAME_LENGTHS = {"RayCluster": 53, "RayJob": 47, "RayService": 47, "RayCronJob": 47}


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
