"""Fields and types: KubeRay's kinds and Kubernetes' own, strictly."""

from collections.abc import Mapping
from typing import Any

import jsonschema
from kuberay_schema import METADATA

from manifests.common import Problem, Problems, joined, listed


def schema_problems(file: str, where: str, value: Any, schema: Mapping[str, Any]) -> Problems:
    """What a JSON schema does not allow."""
    for error in jsonschema.Draft202012Validator(schema).iter_errors(value):
        place = where + joined(error.absolute_path)
        if error.validator == "additionalProperties":
            known = error.schema.get("properties", {})
            for key in set(error.instance) - set(known):
                yield Problem(file, place or "top", f"only {listed(known)}", f"{key!r}")
        elif error.validator == "required":
            missing = [key for key in error.validator_value if key not in error.instance]
            yield Problem(file, place or "top", f"the field {', '.join(missing)}", "none")
        else:
            expected = f"{error.validator} {error.validator_value}"
            yield Problem(file, place or "top", expected, repr(error.instance))


def fields_of(required: str, optional: str = "", **known: Any) -> dict[str, Any]:
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
    rule = fields_of(
        "apiGroups resources verbs", apiGroups=STRINGS, resources=STRINGS, verbs=STRINGS
    )
    reference = fields_of("apiGroup kind name", apiGroup=STRING, kind=STRING, name=STRING)
    subject = fields_of("kind name", "namespace", kind=STRING, name=STRING, namespace=STRING)
    job = fields_of(
        *("template", "backoffLimit activeDeadlineSeconds ttlSecondsAfterFinished"),
        template=pod_template,
        backoffLimit=COUNT,
        activeDeadlineSeconds=COUNT,
        ttlSecondsAfterFinished=COUNT,
    )
    cron_job = fields_of(
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
        jobTemplate=fields_of("spec", "metadata", spec=job, metadata=METADATA),
    )
    labels = {"type": "object", "additionalProperties": STRING, "minProperties": 1}
    budget = fields_of(
        "selector minAvailable",
        selector=fields_of("matchLabels", matchLabels=labels),
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
    return fields_of(f"apiVersion kind metadata {' '.join(bodies[key])}", metadata=NAMED) | {
        "properties": {"apiVersion": STRING, "kind": STRING, "metadata": NAMED, **bodies[key]}
    }
