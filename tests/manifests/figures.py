"""Prometheus, alerts and dashboards: metrics that exist, asked for as their kind wants it."""

import re
from collections.abc import Mapping
from typing import Any

from manifests.common import Problem, Problems, leaves, listed
from manifests.schemas import STRING, fields_of, schema_problems

# Metrics by their names in the code, with kind and labels. Prometheus shows a counter `x` as
# ray_x_total, a histogram as ray_x_bucket, _sum and _count, a gauge as ray_x.
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
                yield Problem(file, where, f"a label of {metrics[-1:]}: {listed(labels)}", text)
        elif after == "(" or (text in AGGREGATIONS and after in GROUPINGS):
            if text not in (*FUNCTIONS, *AGGREGATIONS):
                yield Problem(file, where, listed((*FUNCTIONS, *AGGREGATIONS)), text)
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
                    yield Problem(file, where, f"a variable: {listed(variables)}", name)
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
            yield Problem(file, where or "top", f"only {listed(SCRAPE_KEYS[kind])}", repr(key))

    yield from unknown_keys("", "", config)
    yield from unknown_keys("global", "global", config.get("global", {}))
    for path, value in leaves(config):
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
                    yield Problem(file, f"{place}.role", listed(ROLES), part["role"])


def _relabel_problems(file: str, where: str, rule: Mapping[str, Any]) -> Problems:
    if rule.get("action", "replace") not in ACTIONS:
        yield Problem(file, f"{where}.action", listed(ACTIONS), rule["action"])
    # yes without quotation marks is true in YAML.
    if not isinstance(rule.get("regex", ""), str):
        yield Problem(file, f"{where}.regex", "text", repr(rule["regex"]))
    if rule.get("action", "replace") == "replace" and "target_label" not in rule:
        yield Problem(file, where, "target_label", "none")


def alert_problems(file: str, config: Mapping[str, Any]) -> Problems:
    """Of rules for alerts."""
    rule_schema = fields_of("alert expr for labels annotations", alert=STRING, expr=STRING)
    rule_schema["properties"] |= {
        "for": {"type": "string", "pattern": f"^{DURATION.pattern}$"},
        "labels": fields_of("severity", severity={"enum": ["warning", "critical"]}),
        "annotations": fields_of("summary", summary=STRING),
    }
    rules = {"type": "array", "items": rule_schema, "minItems": 1}
    group = fields_of("name rules", "interval", name=STRING, rules=rules)
    schema = fields_of("groups", groups={"type": "array", "items": group, "minItems": 1})
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
