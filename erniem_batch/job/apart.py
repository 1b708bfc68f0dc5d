"""Whether input and output are apart: a run must not read what an earlier one has written."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import pyarrow as pa
import pyarrow.compute as pc

from erniem_batch import storage
from erniem_batch.errors import ConfigError


def require_apart(
    inputs: Sequence[str], output: str, *, flag: str = "--input", inside: bool = True
) -> None:
    """Check that no input holds the output, and the output no input.

    An output below a folder whose name begins with `_` or `.` is not read with its input folder.

    Args:
        inputs: Paths, URLs or patterns, as the user gave them.
        output: Normal path or URL.
        flag: The flag of the inputs, for the message.
        inside: Whether an input inside the output is refused, too.

    Raises:
        ConfigError: One of them does.
    """
    target = storage.real(output)
    for given in inputs:
        source = storage.normal(given)
        if storage.is_pattern(source) and not storage.exists(source):
            reads, holds = _pattern_reads(source, target)
        else:
            root = storage.real(source)
            reads = is_within(target, root) and not _is_hidden(target[len(root) :])
            holds = is_within(root, target)
        if reads:
            raise ConfigError(
                f"--output {output} is inside {flag} {given}: the next run would read its results "
                f"as input. Choose a folder beside it, such as {_beside(source)}"
            )
        if holds and inside:
            raise ConfigError(
                f"{flag} {given} is inside --output {output}: choose another folder for the results"
            )


def require_found_apart(found: pa.Table, output: str) -> None:
    """Check that no input file is in the output by way of a symbolic link.

    Raises:
        ConfigError: One is.
    """
    if storage.is_remote(output):
        return
    target = storage.real(output)
    folders = pc.replace_substring_regex(found["path"], r"/[^/]*$", "").unique()
    for folder in folders.to_pylist():
        if not storage.is_remote(folder) and is_within(storage.real(folder), target):
            raise ConfigError(
                f"--input: {folder} leads into --output {output}: the results would be read as "
                f"input. Choose another folder for them"
            )


def is_within(path: str, folder: str) -> bool:
    """Whether a path is a folder or below it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _is_hidden(rest: str) -> bool:
    return any(part.startswith(("_", ".")) for part in rest.split("/"))


def _beside(source: str) -> str:
    parts = source.split("/")
    while parts and storage.is_pattern(parts[-1]):
        parts.pop()
    return "/".join(parts).rstrip("/") + "-out"


def _pattern_reads(pattern: str, target: str) -> tuple[bool, bool]:
    """Whether a pattern looks into a folder, and whether all that it matches is inside it."""
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if storage.is_pattern(part))
    root = storage.real("/".join(parts[:first]) or "/")
    if is_within(root, target):
        return False, True
    if not is_within(target, root):
        return False, False
    return _matches(parts[first:], target[len(root) :].strip("/").split("/")), False


def _matches(pattern: Sequence[str], names: Sequence[str]) -> bool:
    """Whether a pattern matches one of the folders on a way, or something below its end."""
    states = _with_empty({0}, pattern)
    for name in names:
        if len(pattern) in states:
            return True
        after = set()
        for state in states:
            if pattern[state] == "**" and not name.startswith("."):
                after.add(state)
            elif fnmatchcase(name, pattern[state]):
                after.add(state + 1)
        states = _with_empty(after, pattern)
    return bool(states)


def _with_empty(states: set[int], pattern: Sequence[str]) -> set[int]:
    """The same, with those that `**` reaches by matching nothing."""
    found = set(states)
    for state in sorted(states):
        while state < len(pattern) and pattern[state] == "**":
            state += 1
            found.add(state)
    return found
