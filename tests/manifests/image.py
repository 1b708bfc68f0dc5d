"""The Dockerfile, as far as it can be checked without building it."""

import ast
import fnmatch
import re
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kuberay_schema import ROOT

from manifests.common import Problem, Problems, listed

IMAGE_USER = "app"


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
                yield Problem(file, where, f"a stage: {listed(names)}", name)
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
        yield Problem(file, f"{where}, ARG EXTRAS", listed(extras), name)
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
