"""RayService, and the configuration of Serve in it."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from erniem_batch.errors import ErnieMBatchError
from manifests.clusters_of_ray import GPU, cluster_problems, quantity
from manifests.common import Problem, Problems, joined, listed, load_all

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
            expected = f"only {listed(schema.model_fields)}"
            yield Problem(file, f"{where}{place}".strip(".") or "top", expected, repr(key))
            wrong = True
    if wrong:
        return
    try:
        ServeDeploySchema(**config)
    except ValidationError as error:
        for item in error.errors():
            yield Problem(file, where + joined(item["loc"]), item["msg"], repr(item["input"]))
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
