"""Schedules and CronJobs."""

import re
import zoneinfo
from collections.abc import Mapping, Sequence
from typing import Any

from kuberay_schema import ROOT

from manifests.clusters_of_ray import pod_problems
from manifests.common import Problem, Problems, listed
from manifests.image import image_files
from manifests.jobs import script_of

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
    script = script_of(" ".join(container.get("command", [])))
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
        expected = f"what {source} does with rayjobs: {listed(verbs)}"
        yield Problem(file, "Role.rules", expected, listed(allowed))
