"""The files of deploy/ are right as far as that can be seen without a cluster; and the checks that
say so find what they are there for: each planted mistake is one that somebody could make."""

import ast
import copy
import importlib.util
import json
import re
import ssl
from pathlib import Path
from types import ModuleType
from typing import Any

import certifi
import httpx
import pytest
import yaml
from kuberay_schema import POD_TEMPLATE, REDUCED, ROOT, full_schemas, reduced, strict, used_values
from manifests import all_problems, deploy_files, difference, file_problems
from manifests.clusters_of_ray import cluster_problems, quantity
from manifests.common import DEPLOY, load_all
from manifests.figures import SERVE_METRICS, expression_problems
from manifests.image import image_files, is_ignored, stages
from manifests.jobs import job_problems
from manifests.schemas import schema_problems
from manifests.service import service_problems
from manifests.times import schedule_problems

FILES = deploy_files()


@pytest.fixture(scope="session")
def definitions(shared_dir: Path) -> dict[str, Any]:
    """KubeRay's own, whole."""
    if not (shared_dir / "k8s").is_dir():
        pytest.skip("no definitions of KubeRay in ../shared/k8s")
    return full_schemas(shared_dir / "k8s")


# ---- as they are --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_file(name):
    assert [str(problem) for problem in file_problems(name, FILES)] == []


def test_files_agree():
    assert [str(problem) for problem in all_problems(FILES)] == []


def test_the_policy_of_the_readme_leaves_the_service_open_and_nothing_else():
    """What the manifests need: 8000 for clients, Ray among its pods, figures for Prometheus."""
    (block,) = re.findall(
        r"```yaml\n(apiVersion: networking.*?)```", (DEPLOY / "README.md").read_text(), flags=re.S
    )
    policy = yaml.safe_load(block)
    assert policy["kind"] == "NetworkPolicy"
    assert policy["spec"]["podSelector"]["matchLabels"] == {"ray.io/is-ray-node": "yes"}
    rules = policy["spec"]["ingress"]
    assert [rule["ports"] for rule in rules if "from" not in rule] == [[{"port": 8000}]]
    assert {"from": [{"podSelector": {}}]} in rules
    assert "containerPort: 8000" in (DEPLOY / SERVICE).read_text()


def test_manifests_are_what_kuberay_defines(definitions):
    for name in FILES:
        assert [str(problem) for problem in file_problems(name, FILES, definitions)] == []


def test_the_reduced_definitions_are_made_from_kuberays(definitions):
    used = used_values()
    kinds = {key: reduced(definitions[key], used[key]) for key in definitions if key in used}
    assert json.loads(REDUCED.read_text())["kinds"] == kinds
    assert kinds.keys() == {POD_TEMPLATE, *(key for key in definitions if key.startswith("ray.io"))}


# ---- mistakes -----------------------------------------------------------------------------------

CLUSTER, JOB, CRON = "kuberay/raycluster.yaml", "kuberay/rayjob.yaml", "kuberay/cronjob.yaml"
NIGHTLY, SERVICE = "kuberay/raycronjob.yaml", "kuberay/rayservice.yaml"
AWS, GCP, IMAGE = "cluster/aws.yaml", "cluster/gcp.yaml", "docker/Dockerfile"
BATCH, SERVE, SCRAPE = "grafana-batch.json", "grafana-serve.json", "prometheus.yml"
MISTAKES = [
    # fields and their types
    (JOB, "  entrypoint: >-", "  entryPoint: >-", ["spec", "'entryPoint'"]),
    (CLUSTER, "minReplicas: 0", "minReplica: 0", ["workerGroupSpecs[0]", "'minReplica'"]),
    (CLUSTER, "maxReplicas: 5", 'maxReplicas: "5"', ["workerGroupSpecs[0].maxReplicas", "integer"]),
    (CLUSTER, "memory: 8Gi", "memory: 8GiB", ["headGroupSpec", "memory", "8GiB"]),
    (CLUSTER, "drop: [ALL]", "drops: [ALL]", ["capabilities", "'drops'"]),
    (CLUSTER, "  name: erniem-batch\n", "  names: erniem-batch\n", ["metadata", "'names'"]),
    (CLUSTER, "kind: RayCluster", "kind: RayClusters", ["kind", "RayClusters"]),
    (CLUSTER, "  headGroupSpec:", "  rayVersion: 2.60.0\n  headGroupSpec:", ["twice"]),
    (CLUSTER, "spec:\n", "spec:\n\t- a\n", ["the file", "YAML"]),
    (CRON, "concurrencyPolicy: Forbid", "concurrencyPolicy: Never", ["concurrencyPolicy"]),
    (CRON, "backoffLimit: 3", "backofLimit: 3", ["jobTemplate.spec", "'backofLimit'"]),
    (CRON, "verbs: [get", "verb: [get", ["rules[0]", "'verb'"]),
    # what the operator demands on top
    (CLUSTER, "minReplicas: 0 ", "minReplicas: 5 ", ["minReplicas <= replicas", "5, 0, 4"]),
    (CLUSTER, "  replicas: 0\n", "  replicas: 9\n", ["minReplicas <= replicas", "0, 9, 5"]),
    (CLUSTER, "restartPolicy: Never", "restartPolicy: Always", ["headGroupSpec", "autoscaler v2"]),
    (CLUSTER, "version: v2", "version: v1", ["autoscalerOptions", "version v2"]),
    (CLUSTER, 'num-cpus: "0" ', 'num-cpus: "2" ', ["num-cpus", "no work on the head"]),
    (CLUSTER, "groupName: gpu", "groupName: cpu", ["names of their own"]),
    (CLUSTER, "name: erniem-batch\n", f"name: {'e' * 54}\n", ["metadata.name", "at most 53"]),
    (CLUSTER, "mode: token", "mode: disabled", ["authOptions.mode", "token"]),
    (JOB, "name: erniem-batch-ner", "name: Erniem-batch", ["metadata.name"]),
    (
        JOB,
        "shutdownAfterJobFinishes: true",
        "shutdownAfterJobFinishes: false",
        ["ttlSecondsAfterFinished", "unless shutdownAfterJobFinishes"],
    ),
    (JOB, "K8sJobMode", "SidecarMode", ["submitterPodTemplate", "SidecarMode"]),
    (JOB, "K8sJobMode", "InteractiveMode", ["backoffLimit", "InteractiveMode"]),
    (JOB, "K8sJobMode", "JobMode", ["submissionMode", "'JobMode'"]),
    (JOB, "activeDeadlineSeconds: 79200", "activeDeadlineSeconds: 0", ["activeDeadlineSeconds"]),
    (SERVICE, "type: NewCluster", "type: Rolling", ["upgradeStrategy.type", "Rolling"]),
    (
        SERVICE,
        "value: /cache}",
        "value: /cache}\n            - {name: REDIS_PASSWORD, value: x}",
        ["gcsFaultToleranceOptions", "REDIS_PASSWORD"],
    ),
    (NIGHTLY, '"30 2 * * *"', '"30 26 * * *"', ["spec.schedule", "'26'"]),
    (CRON, '"30 2 * * *"', '"0 30 2 * * *"', ["spec.schedule", "day of week"]),
    (CRON, "timeZone: Etc/UTC", "timeZone: Berlin", ["spec.timeZone", "'Berlin'"]),
    (JOB, "backoffLimit: 2 ", "backoffLimit: -1 ", ["spec.backoffLimit", "retries"]),
    (CRON, "  timeZone: Etc/UTC\n", "", ["spec.timeZone", "that of the controller"]),
    # the command line
    (JOB, "pipelines/ner.py", "pipelines/names.py", ["entrypoint", "pipelines/names.py"]),
    (JOB, "--actors 1:8", "--actor 1:8", ["entrypoint", "--actor"]),
    (NIGHTLY, "--actors 1:8", "--actors 8:1", ["jobTemplate.entrypoint", "8:1"]),
    (JOB, "--actors 1:8 ", "", ["entrypoint", "--actors MIN:MAX"]),
    (JOB, "--actors 1:8", "--actors 1:80", ["entrypoint", "80 actors", "room for 10"]),
    (JOB, "maxReplicas: 5", "maxReplicas: 4", ["entrypoint", "1 CPU more", "0 CPUs more"]),
    (JOB, "--output s3://BUCKET/tagged/", "", ["entrypoint", "--output"]),
    (JOB, " --address auto", "", ["entrypoint", "--address auto"]),
    (JOB, "pipelines/ner.py", "pipelines/finetune.py", ["entrypoint", "finetune"]),
    (
        JOB,
        FILES[JOB].partition("python pipelines/")[2].partition("\n  submissionMode")[0],
        "replay.py s3://BUCKET/tagged/",
        ["entrypoint", "replay takes no flags of a job"],
    ),
    # versions and images
    (CLUSTER, 'rayVersion: "2.60.0"', 'rayVersion: "2.59.0"', ["rayVersion", "2.60.0", "2.59.0"]),
    (CLUSTER, "ray2.60.0-cpu", "ray2.59.0-cpu", ["line", "ray2.59.0"]),
    (CLUSTER, "0.1.0-ray2.60.0-cuda", "latest", ["line", "latest"]),
    (CLUSTER, "ray2.60.0-cuda", "ray2.60.0-cpu", ["workerGroupSpecs[1]", "image", "-cuda"]),
    ("README.md", "0.1.0-ray2.60.0-cpu", "0.2.0-ray2.60.0-cpu", ["line", "0.2.0"]),
    # what pods may do, and what they get
    (CLUSTER, "runAsNonRoot: true", "runAsNonRoot: false", ["securityContext", "not root"]),
    (CLUSTER, "runAsUser: 1000", "runAsUser: 0", ["securityContext", "not root"]),
    (CLUSTER, "Escalation: false", "Escalation: true", ["securityContext", "Escalation: false"]),
    (
        CLUSTER,
        'limits: {cpu: "2", memory: 8Gi}',
        'limits: {cpu: "2", memory: 9Gi}',
        ["headGroupSpec", "requests = limits of memory"],
    ),
    (CLUSTER, 'memory: "500000000"', 'memory: "9000000000"', ["object-store-memory"]),
    (CLUSTER, "mountPath: /cache", "mountPath: /models", ["ERNIEM_BATCH_CACHE", "emptyDir"]),
    (CLUSTER, "- {name: tmp, mountPath: /tmp}", "- {name: temp, mountPath: /tmp}", ["volumes"]),
    (CLUSTER, "envFrom: *credentials", "envFrom: []", ["workerGroupSpecs[0]", "envFrom"]),
    (CLUSTER, "\n        terminationGracePeriodSeconds: 30", "", ["terminationGrace"]),
    (CLUSTER, "type: RuntimeDefault", "type: Unconfined", ["seccompProfile", "Unconfined"]),
    (CLUSTER, 'limits: {cpu: "2", memory: 8Gi}', "limits: {memory: 8Gi}", ["cpu in requests"]),
    (
        CLUSTER,
        'requests: {cpu: "2", memory: 8Gi}\n            limits: {cpu: "2", memory: 8Gi}',
        'requests: {cpu: "2"}\n            limits: {cpu: "2"}',
        ["resources.limits", "memory"],
    ),
    # the CronJob around it
    (CRON, "concurrencyPolicy: Forbid", "concurrencyPolicy: Replace", ["one night at a time"]),
    (
        CRON,
        "serviceAccountName: erniem-batch-nightly",
        "serviceAccountName: default",
        ["serviceAccountName", "'default'"],
    ),
    (
        CRON,
        "  kind: Role\n  name: erniem-batch-nightly",
        "  kind: Role\n  name: nightly",
        ["RoleBinding.roleRef", "nightly"],
    ),
    (CRON, "verbs: [get, create, delete]", "verbs: [get, create]", ["Role.rules", "delete"]),
    (CRON, "deploy/start_rayjob.py", "deploy/kuberay/start_rayjob.py", ["command", "Dockerfile"]),
    (CRON, "restartPolicy: Never", "restartPolicy: Always", ["restartPolicy", "OnFailure"]),
    # the service
    (
        SERVICE,
        "    proxy_location:",
        "    proxy_locations:",
        ["serveConfigV2", "'proxy_locations'"],
    ),
    (
        SERVICE,
        "      host: 0.0.0.0",
        "      host: 127.0.0.1",
        ["serveConfigV2.http_options.host", "0.0.0.0"],
    ),
    (SERVICE, "      request_timeout_s: 70", "      request_timeout: 70", ["'request_timeout'"]),
    (SERVICE, "      request_timeout_s: 70", "      request_timeout_s: 7", ["http_options", "7"]),
    (SERVICE, "          tasks: [ner]", "          task: [ner]", ["args", "models.0.task"]),
    (SERVICE, "min_replicas: 2", "min_replicas: 9", ["args", "min_replicas=9"]),
    (SERVICE, "min_replicas: 2", "min_replicas: 1", ["model names", "2 replicas"]),
    (SERVICE, "max_replicas: 8", "max_replicas: 9", ["workerGroupSpecs", "18 CPUs", "16"]),
    (SERVICE, "erniem_batch.serve:app", "erniem_batch.serve:application", ["import_path"]),
    (SERVICE, "containerPort: 8000", "containerPort: 8001", ["readinessProbe", "8001"]),
    (SERVICE, "path: /-/healthz", "path: /healthz", ["readinessProbe", "/healthz"]),
    (SERVICE, "Seconds: 90", "Seconds: 60", ["terminationGracePeriodSeconds", "request_timeout_s"]),
    (SERVICE, "excludeHeadPodFromServeSvc: true", "excludeHeadPodFromServeSvc: false", ["exclude"]),
    (
        SERVICE,
        "    matchLabels: {app.kubernetes.io/name: erniem-batch-serve}",
        "    matchLabels: {app.kubernetes.io/name: erniem}",
        ["PodDisruptionBudget"],
    ),
    ("serve.yaml", "  route_prefix: /", "  route: /", ["'route'"]),
    ("serve.yaml", "schema_lang: en", "schema_lang: fr", ["applications[0].args", "schema_lang"]),
    (SERVICE, "minReplicas: 2", "minReplicas: 1", ["a group with minReplicas of 2"]),
    (SERVICE, "      encoding: JSON", "      encoding: [JSON", ["serveConfigV2", "one YAML"]),
    ("serve.yaml", "port: 8000", "port: http", ["http_options.port", "'http'"]),
    (
        "serve.yaml",
        "applications:\n",
        "applications:\n- {name: a, import_path: b:c, route_prefix: /b}\n",
        ["one app"],
    ),
    # machines in a cloud
    (AWS, "max_workers: 5 ", "max_workers: 9 ", ["available_node_types.cpu", "cluster's 8"]),
    (AWS, "idle_timeout_minutes", "idle_timeout_minuts", ["Ray's schema", "idle_timeout_minuts"]),
    (AWS, "    min_workers: 0 ", "    min_worker: 0 ", ["Ray's schema", "min_worker"]),
    (AWS, "resources: {CPU: 0}", "resources: {CPU: 2}", ["available_node_types.head", "no work"]),
    (AWS, "idle_timeout_minutes: 5 ", "# ", ["idle_timeout_minutes", "a value"]),
    (AWS, "head_node_type: head", "head_node_type: main", ["cluster/aws.yaml", "head_node_type"]),
    (AWS, "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", ["--dashboard-host=127.0.0.1"]),
    (AWS, "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled", ["docker.run_options"]),
    (AWS, "  ~/.ray/auth_token: ~/.ray/auth_token", "  {}", ["file_mounts", "auth_token"]),
    (AWS, "203.0.113.0/24\n\nauth", "0.0.0.0/0\n\nauth", ["provider", "0.0.0.0/0"]),
    (AWS, "head_setup_commands: []\n", "", ["head_setup_commands", "boto3"]),
    (AWS, "setup_commands: []\nhead_", "head_", ["setup_commands", "pip install"]),
    (AWS, "ray2.60.0-aws", "ray2.60.0-cpu", ["docker.head_image", "-aws"]),
    (GCP, "ray2.60.0-cuda", "ray2.60.0-cpu", ["available_node_types.gpu", "-cuda"]),
    (GCP, "RAY_enable_autoscaler_v2=1 ", "", ["head_start_ray_commands", "autoscaler_v2"]),
    (GCP, "GPU: 1", "GPU: one", ["Ray's schema", "one"]),
    # the image
    (IMAGE, "USER 1000:1000", "USER root", ["the last USER", "root"]),
    (IMAGE, "USER 1000:1000", "USER 1000:1000\nUSER 0", ["the last USER", "0"]),
    (IMAGE, "USER 1000:1000", "USER app", ["the last USER", "app"]),
    (IMAGE, "python:3.11-slim-bookworm", "python:latest", ["Python 3.11", "latest"]),
    (IMAGE, "python:3.11-slim-bookworm", "python:3.12-slim", ["Python 3.11", "3.12"]),
    (IMAGE, "COPY pipelines ./", "COPY pipeline ./", ["COPY", "pipeline"]),
    (IMAGE, "COPY erniem_batch", "COPY tests", ["COPY", ".dockerignore", "tests"]),
    (IMAGE, "--from=build", "--from=builder", ["a stage", "builder"]),
    (IMAGE, "pip install -c constraints.txt", "pip install", ["-c constraints.txt"]),
    (IMAGE, "EXTRAS=s3,gs,az", "EXTRAS=s3,gcs,az", ["ARG EXTRAS", "gcs"]),
    (IMAGE, "ARG CLOUD_CLIENT=\n", "ARG CLOUD_CLIENT=\nARG PROXY=\n", ["ARG PROXY", "not used"]),
    (IMAGE, "ARG MODEL=deploy/docker/model\n", "", ["ARG MODEL"]),
    (IMAGE, "pytorch.org/whl/cpu", "pytorch.org/cpu", ["ARG TORCH_INDEX", "pytorch.org"]),
    (IMAGE, "    HF_HUB_OFFLINE=1 \\\n", "", ["ENV HF_HUB_OFFLINE"]),
    (IMAGE, " tini wget ", " tini ", ["apt-get install", "wget"]),
    (IMAGE, "USER 1000", "HEALTHCHECK CMD true\nUSER 1000", ["HEALTHCHECK"]),
    (IMAGE, '["tini", "--"]', "tini --", ["ENTRYPOINT", "signals"]),
    # figures
    (BATCH, "ray_erniem_batch_rows_total{", "ray_erniem_batch_row_total{", ["Rows", "row_total"]),
    (
        SERVE,
        "sum by (route) (",
        "sum by (task) (",
        ["'Requests'", "ray_erniem_serve_requests_total"],
    ),
    (BATCH, 'stage=\\"forward\\"', 'stages=\\"forward\\"', ["stages", "a label of"]),
    (BATCH, "rate(ray_erniem_batch_tokens_total", "avg(ray_erniem_batch_tokens_total", ["rate()"]),
    (BATCH, "max by (output) (ray_", "max by (output) ((ray_", ["brackets"]),
    (BATCH, "{{stage}} {{error}}", "{{stage}} {{reason}}", ["Dead letters", "{{reason}}"]),
    (
        BATCH,
        "label_values(ray_erniem_batch_rows_total, task)",
        "label_values(ray_erniem_batch_rows, task)",
        ["templating", "label_values"],
    ),
    (BATCH, '$task\\"})"', '$tasks\\"})"', ["a variable", "tasks"]),
    (BATCH, '"x": 8', '"x": 4', ["a free place", "that of"]),
    (BATCH, '"uid": "erniem-batch",', "", ["uid", "a value"]),
    (BATCH, '"id": 2,', '"id": 1,', ["ids of their own"]),
    (BATCH, '"description": "Model actors of each run."', '"description": ""', ["a description"]),
    (SCRAPE, "action: keep", "action: keeps", ["action", "keeps"]),
    (SCRAPE, "    target_label: pod\n", "    action: replace\n", ["target_label"]),
    ("alerts.yml", "alert: ServiceFull", "alert: ServiceErrors", ["a name of its own"]),
    (SCRAPE, "scrape_interval: 15s", "scrape_intervall: 15s", ["global", "'scrape_intervall'"]),
    (SCRAPE, "scrape_interval: 15s", "scrape_interval: 15", ["scrape_interval", "a duration"]),
    (SCRAPE, 'regex: "yes"', "regex: yes", ["relabel_configs[0].regex", "True"]),
    (SCRAPE, "role: pod", "role: pods", ["role", "pods"]),
    (SCRAPE, "- alerts.yml", "- alarms.yml", ["rule_files", "alarms.yml"]),
    (SCRAPE, "job_name: ray-http", "job_name: ray", ["names of their own"]),
    ("alerts.yml", "outcome=", "result=", ["BatchDeadLetters", "result"]),
    ("alerts.yml", "for: 5m", "for: 5", ["for", "5"]),
    ("alerts.yml", "severity: critical", "severity: high", ["severity", "'high'"]),
    ("alerts.yml", "$labels.output", "$labels.run", ["BatchUnitsFail", "$labels.run"]),
    # between files
    ("README.md", "`kuberay/rayjob.yaml`", "`kuberay/job.yaml`", ["kuberay/rayjob.yaml"]),
    (JOB, "idleTimeoutSeconds: 300", "idleTimeoutSeconds: 60", [".idleTimeoutSeconds"]),
    (NIGHTLY, "backoffLimit: 2 ", "backoffLimit: 3 ", ["spec.jobTemplate.backoffLimit"]),
    (CLUSTER, "name: erniem-batch-storage", "name: erniem-storage", ["erniem-storage"]),
    (CRON, "configMap: {name: erniem-batch-rayjob}", "configMap: {name: rayjob}", ["rayjob"]),
]


@pytest.mark.parametrize(
    ("name", "old", "new", "words"), MISTAKES, ids=[f"{m[0]}-{m[2].strip()[:30]}" for m in MISTAKES]
)
def test_a_mistake_is_named(name, old, new, words):
    assert old in FILES[name], "the mistake is planted nowhere"
    files = FILES | {name: FILES[name].replace(old, new, 1)}
    problems = [str(problem) for problem in file_problems(name, files) or all_problems(files)]
    assert any(all(word in problem for word in words) for problem in problems), problems


# Rules of KubeRay's operator about fields that no manifest here uses: the reduced definitions do
# not know them, so that they are tried without.
CHECKS = {
    CLUSTER: lambda spec: cluster_problems(CLUSTER, "spec", spec),
    JOB: lambda spec: job_problems(JOB, "spec", spec, FILES[IMAGE]),
    SERVICE: lambda spec: service_problems(SERVICE, spec),
}
FIELDS = [
    (CLUSTER, ["workerGroupSpecs", 0, "suspend"], True, "false, with autoscaling"),
    (CLUSTER, ["headGroupSpec", "resources"], {"CPU": "0"}, "not both"),
    (CLUSTER, ["headGroupSpec", "rayStartParams", "labels"], "a=b", "labels beside it"),
    (JOB, ["deletionStrategy"], {"deletionRules": [{"policy": "DeleteSelf"}]}, "deletionRules"),
    (JOB, ["clusterSelector"], {"ray.io/cluster": "c"}, "a cluster of its own"),
    (SERVICE, ["rayClusterConfig", "gcsFaultToleranceOptions"], None, "Redis"),
    (
        SERVICE,
        ["rayClusterConfig", "headGroupSpec", "headService"],
        {"metadata": {"name": "head"}},
        "no name",
    ),
]


@pytest.mark.parametrize(("name", "path", "value", "word"), FIELDS)
def test_a_rule_of_the_operator(name, path, value, word):
    """None as value: the field is left out."""
    spec = copy.deepcopy(load_all(FILES[name])[0]["spec"])
    assert not list(CHECKS[name](spec))
    *parents, field = path
    part = spec
    for parent in parents:
        part = part[parent]
    part[field] = value
    if value is None:
        del part[field]
    problems = [str(problem) for problem in CHECKS[name](spec)]
    assert any(word in problem for problem in problems), problems


# ---- the checks themselves ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule",
    [
        "* * * * *",
        "*/15 0-6 1,15 * mon-fri",
        "0 2 * JAN,feb 0",
        "5-50/5 * 31 12 SUN",
        "0 0 1-1 1 6",
    ],
)
def test_schedules(schedule):
    assert not list(schedule_problems("f", {"schedule": schedule, "timeZone": "Asia/Tokyo"}))


@pytest.mark.parametrize(
    "schedule",
    [
        *("@daily", "60 * * * *", "* * 0 * *", "* * * * 7", "5-1 * * * *", "*/0 * * * *"),
        *("* * L * *", "TZ=UTC 0 2 * * *", "* * * * moon", "1,,2 * * * *", "1-2-3 * * * *", ""),
    ],
)
def test_what_is_no_schedule(schedule):
    assert list(schedule_problems("f", {"schedule": schedule, "timeZone": "UTC"}))


@pytest.mark.parametrize(
    ("expression", "word"),
    [
        ("sum(rate(ray_erniem_batch_rows_total[5m])) > 0.5", None),
        ('up{job="ray"} == 0', None),
        ("sum by (le) (rate(ray_erniem_batch_unit_seconds_bucket[5m]))", None),
        ("rate(ray_erniem_batch_actors[5m])", "rate() or increase()"),
        ("ray_erniem_batch_rows_total", "rate() or increase()"),
        ("sum by (le) (rate(ray_erniem_batch_rows_total[5m]))", "a label of"),
        ("summ(ray_erniem_batch_actors)", "summ"),
        ("ray_erniem_batch_actors{task='ner'}", "an expression"),
        ("(ray_erniem_batch_actors", "brackets"),
        ("ray_erniem_batch_actors]", "brackets"),
        ("1 + 1", "a metric"),
        ("erniem_batch_actors", "a metric that exists"),
    ],
)
def test_expressions(expression, word):
    problems = [str(problem) for problem in expression_problems("f", "w", expression)]
    assert (word is None) == (problems == []), problems
    assert word is None or any(word in problem for problem in problems), problems


def test_definitions_become_strict():
    schema = strict(
        {
            "properties": {
                "metadata": {"type": "object"},
                "size": {"x-kubernetes-int-or-string": True, "pattern": "^[0-9]+$"},
                "port": {"type": "integer", "default": 80},
                "free": {
                    "type": "object",
                    "properties": {"a": {"type": "string"}},
                    "x-kubernetes-preserve-unknown-fields": True,
                },
            },
            "required": ["size", "port"],
            "type": "object",
        }
    )
    assert not list(schema_problems("f", "", {"size": 1, "free": {"b": 1}}, schema))
    for value, where in (
        ({"size": "x"}, "size"),
        ({"size": 1, "sise": 1}, "top"),
        ({"metadata": {"name": "n"}}, "top"),
        ({"size": 1, "metadata": {"label": {}}}, "metadata"),
        ({"size": 1, "free": {"a": 1}}, "free.a"),
    ):
        assert [problem.where for problem in schema_problems("f", "", value, schema)] == [where]


def test_small_parts():
    assert (quantity("500m"), quantity("2"), quantity(3), quantity("1Gi")) == (0.5, 2, 3, 2**30)
    assert difference({"a": [{"b": 1}]}, {"a": [{"b": 2}]}) == ".a[0].b"
    assert difference({"a": 1}, {"a": 1, "b": 2}) == ".b"
    assert difference({"a": [1]}, {"a": [1]}) is None
    patterns = "# all\n*\n!a\n!b/c\n**/__pycache__\na/secret\n"
    assert [
        name for name in ("a/x", "b/c/d", "b/x", "z", "a/secret") if is_ignored(name, patterns)
    ] == [
        "b/x",
        "z",
        "a/secret",
    ]
    build, final = stages(FILES[IMAGE])
    assert (build.name, final.name, final.base) == ("build", "", "python:3.11-slim-bookworm")
    copied = image_files(FILES[IMAGE])
    assert copied["pipelines/ner.py"] == "pipelines/ner.py"
    assert copied["deploy/start_rayjob.py"] == "deploy/kuberay/start_rayjob.py"


def test_metrics_of_the_service_are_those_in_its_code():
    tree = ast.parse((ROOT / "erniem_batch" / "serve" / "metrics.py").read_text())
    kinds = {"Counter": "counter", "Gauge": "gauge", "Histogram": "histogram"}
    made = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            kind, first = kinds.get(node.func.id.capitalize()), node.args[0]
            if kind and isinstance(first, ast.Constant):
                made["erniem_serve_" + first.value.removeprefix("erniem_serve_")] = kind
    assert made == {name: kind for name, (kind, _) in SERVE_METRICS.items()}


# ---- start_rayjob.py ----------------------------------------------------------------------------


class FakeKubernetes:
    """Answers as the API server does, for RayJobs of one namespace.

    Args:
        phases: of the job, one at each question; the last one stays. None: it is gone.
    """

    def __init__(self, *phases: str | None, there: bool = False, broken: int = 0) -> None:
        self.phases, self.there, self.broken = list(phases), there, broken
        self.seen: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        assert request.headers["Authorization"] == "Bearer t0ken"
        assert request.url.path.startswith("/apis/ray.io/v1/namespaces/nightly/rayjobs")
        self.seen.append(request.method)
        if self.broken:
            self.broken -= 1
            return httpx.Response(503)
        if request.method == "POST":
            assert json.loads(request.content)["kind"] == "RayJob"
            self.there = True
            return httpx.Response(201, json={})
        if not self.there:
            return httpx.Response(404, json={})
        if request.method == "DELETE":
            # Else the submitter of the old job could be taken for that of the new one.
            assert request.url.params["propagationPolicy"] == "Foreground"
            self.there = False
            return httpx.Response(200, json={})
        phase = self.phases.pop(0) if len(self.phases) > 1 else self.phases[0]
        if phase is None:
            return httpx.Response(404, json={})
        ended = {"Complete": "SUCCEEDED", "Failed": "FAILED"}.get(
            phase.partition(":")[0], "RUNNING"
        )
        status = {"jobDeploymentStatus": phase, "jobStatus": ended, "message": "exit code 3"}
        return httpx.Response(200, json={"status": status if phase else {}})


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """deploy/kuberay/start_rayjob.py."""
    spec = importlib.util.spec_from_file_location(
        "start_rayjob", DEPLOY / "kuberay" / "start_rayjob.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(script: ModuleType, kubernetes: FakeKubernetes) -> tuple[int, float]:
    """Exit code, and seconds that it would have waited."""
    waited: list[float] = []
    with httpx.Client(base_url="https://k", transport=httpx.MockTransport(kubernetes)) as client:
        jobs = script.RayJobs(client, "nightly", lambda: "t0ken")
        (job,) = load_all(FILES[JOB])
        return script.run(jobs, job, waited.append), sum(waited)


def test_a_night(script, capsys):
    kubernetes = FakeKubernetes("", "Initializing", "Running", "Complete")
    assert start(script, kubernetes) == (0, 3 * script.POLL_S)
    assert kubernetes.seen == ["GET", "POST", "GET", "GET", "GET", "GET"]
    assert "SUCCEEDED" in capsys.readouterr().out


def test_a_night_after_another(script):
    kubernetes = FakeKubernetes("Failed", "Running", "Complete", there=True)
    assert start(script, kubernetes)[0] == 0
    assert kubernetes.seen[:5] == ["GET", "DELETE", "GET", "POST", "GET"]


def test_a_run_that_goes_on_is_not_started_twice(script):
    kubernetes = FakeKubernetes("Running", "Retrying", "Failed", there=True)
    assert start(script, kubernetes)[0] == 1
    assert set(kubernetes.seen) == {"GET"}


def test_how_a_failed_run_ended_is_said(script, capsys):
    assert start(script, FakeKubernetes("Running", "Failed"))[0] == 1
    assert "exit code 3" in capsys.readouterr().out.splitlines()[-1]


def test_a_run_that_somebody_deletes(script):
    assert start(script, FakeKubernetes("Running", None))[0] == 1


def test_an_api_server_that_is_away_for_a_while(script):
    assert start(script, FakeKubernetes("Complete", broken=5))[0] == 0
    with pytest.raises(httpx.HTTPStatusError):
        start(script, FakeKubernetes("Complete", broken=1000))


def test_what_kubernetes_refuses(script, capsys):
    def refuse(request: httpx.Request) -> httpx.Response:
        return httpx.Response(404 if request.method == "GET" else 403, text="not allowed")

    with httpx.Client(base_url="https://k", transport=httpx.MockTransport(refuse)) as client:
        jobs = script.RayJobs(client, "nightly", lambda: "t0ken")
        with pytest.raises(SystemExit) as ended:
            script.run(jobs, load_all(FILES[JOB])[0])
    assert ended.value.code == 2
    assert "not allowed" in capsys.readouterr().out


def test_in_a_pod_it_finds_what_kubernetes_puts_there(script, tmp_path, monkeypatch):
    (tmp_path / "namespace").write_text("nightly")
    (tmp_path / "token").write_text("t0ken")
    (tmp_path / "ca.crt").write_text(Path(certifi.where()).read_text())
    (tmp_path / "rayjob.yaml").write_text(FILES[JOB])
    kubernetes = FakeKubernetes("Complete")

    def client(base_url: str, verify: ssl.SSLContext, timeout: float) -> httpx.Client:
        assert verify.verify_mode is ssl.CERT_REQUIRED
        return real(base_url=base_url, transport=httpx.MockTransport(kubernetes))

    real = httpx.Client
    monkeypatch.setattr(script.httpx, "Client", client)
    monkeypatch.setattr(script, "ACCOUNT", tmp_path)
    assert script.main(str(tmp_path / "rayjob.yaml")) == 0
    assert kubernetes.seen == ["GET", "POST", "GET"]
