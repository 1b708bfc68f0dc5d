"""Makes tests/data/kuberay_schema.json from KubeRay's custom resource definitions.

    python tests/kuberay_schema.py FOLDER

FOLDER holds rayclusters.yaml, rayjobs.yaml, rayservices.yaml and raycronjobs.yaml, as they lie in
helm-chart/kuberay-operator/crds of KubeRay (Apache-2.0). They are four megabytes, nearly all of it
fields that deploy/kuberay never uses: the result knows those that it does use, with their types.
Run it again when a manifest uses a field that the result does not know.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
REDUCED = Path(__file__).parent / "data" / "kuberay_schema.json"
MANIFESTS = ROOT / "deploy" / "kuberay"
CRDS = ("rayclusters", "rayjobs", "rayservices", "raycronjobs")
NOTE = (
    "Made by tests/kuberay_schema.py from the custom resource definitions of KubeRay "
    "(https://github.com/ray-project/kuberay, helm-chart/kuberay-operator/crds, 1.7, Apache-2.0): "
    "the fields that deploy/kuberay uses, without descriptions, unknown fields forbidden."
)
# The definitions leave the metadata of a resource and of a pod open.
METADATA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
    "additionalProperties": False,
}
KEPT = (
    *("type", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength"),
    *("minItems", "maxItems", "required"),
)
# Where a pod template stands in the definitions, for Kubernetes' own kinds that have one too.
POD_TEMPLATE = "PodTemplate"


def full_schemas(folder: Path) -> dict[str, Any]:
    """A JSON schema for each kind, by `apiVersion/kind`, and for a pod template."""
    schemas = {}
    for name in CRDS:
        with (folder / f"{name}.yaml").open() as file:
            definition = yaml.load(file, yaml.CSafeLoader)["spec"]
        for version in definition["versions"]:
            if version["name"] == "v1":
                key = f"{definition['group']}/v1/{definition['names']['kind']}"
                schemas[key] = strict(version["schema"]["openAPIV3Schema"])
    job = schemas["ray.io/v1/RayJob"]["properties"]["spec"]["properties"]
    schemas[POD_TEMPLATE] = job["submitterPodTemplate"]
    return schemas


def strict(schema: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """A part of a definition as JSON schema, in which unknown fields are errors."""
    if name == "metadata" and "properties" not in schema:
        return METADATA
    made = {key: schema[key] for key in KEPT if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    elif schema.get("nullable") and "type" in made:
        made["type"] = [made["type"], "null"]
    if "properties" in schema:
        made["properties"] = {
            key: strict(value, key) for key, value in schema["properties"].items()
        }
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
        # The API server fills in what has a default.
        optional = {key for key, value in schema["properties"].items() if "default" in value}
        if "required" in made:
            made["required"] = [key for key in made["required"] if key not in optional]
    elif isinstance(schema.get("additionalProperties"), Mapping):
        made["additionalProperties"] = strict(schema["additionalProperties"])
    if "items" in schema:
        made["items"] = strict(schema["items"])
    return made


def reduced(schema: Mapping[str, Any], values: Sequence[Any]) -> dict[str, Any]:
    """Of a strict schema, what the values use."""
    made = dict(schema)
    objects = [value for value in values if isinstance(value, Mapping)]
    if "properties" in schema:
        made["properties"] = {
            key: reduced(part, [value[key] for value in objects if key in value])
            for key, part in schema["properties"].items()
            if schema is METADATA or any(key in value for value in objects)
        }
    elif isinstance(schema.get("additionalProperties"), Mapping):
        members = [member for value in objects for member in value.values()]
        made["additionalProperties"] = reduced(schema["additionalProperties"], members)
    if "items" in schema:
        members = [member for value in values if isinstance(value, list) for member in value]
        made["items"] = reduced(schema["items"], members)
    return made


def used_values(folder: Path = MANIFESTS) -> dict[str, list[Any]]:
    """What the manifests say, by the key of its schema."""
    used: dict[str, list[Any]] = {}
    for document in _documents(folder):
        key = f"{document['apiVersion']}/{document['kind']}"
        used.setdefault(key, []).append(document)
        if document["kind"] == "CronJob":
            template = document["spec"]["jobTemplate"]["spec"]["template"]
            used.setdefault(POD_TEMPLATE, []).append(template)
    return used


def _documents(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.yaml")):
        yield from yaml.safe_load_all(path.read_text())


def main(folder: str) -> None:
    """Writes REDUCED."""
    used = used_values()
    kinds = {
        key: reduced(schema, used[key])
        for key, schema in full_schemas(Path(folder)).items()
        if key in used
    }
    text = json.dumps({"$comment": NOTE, "kinds": kinds}, indent=1, sort_keys=True)
    REDUCED.write_text(text + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
