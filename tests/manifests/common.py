"""What all checks share: a problem, files read strictly, pinned versions, names of images."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml
from kuberay_schema import REDUCED, ROOT

from erniem_batch import __version__

DEPLOY = ROOT / "deploy"


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
                yield Problem(file, f"line {number}", f"one of {listed(good)}", name)


def joined(parts: Iterable[str | int]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.removeprefix(".")


def listed(values: Iterable[Any]) -> str:
    return ", ".join(sorted(map(str, values)))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, member in value.items():
            yield from leaves(member, f"{path}.{key}".strip("."))
    elif isinstance(value, list):
        for index, member in enumerate(value):
            yield from leaves(member, f"{path}[{index}]")
    else:
        yield path, value
