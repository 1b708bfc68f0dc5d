"""Lowest scores by label and language: one number, or a file that somebody tuned."""

import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import yaml

from erniem_batch import storage
from erniem_batch.errors import ConfigError
from erniem_batch.model.files import short_reason, short_repr

ANY = "*"
MAX_BYTES = 1 << 20
MAX_NUMBERS = 100_000


class Thresholds:
    """The lowest score that counts for a label in a language.

    Args:
        value: a number for all; or a mapping, in which a number is that of a label and a mapping
            that of a language, in the same form. "*" stands for all other labels.
        default: for labels that are not named.

    Raises:
        ConfigError: not of this form; says where.

    Example:
        >>> t = Thresholds({"*": 0.5, "PER": 0.7, "de": {"PER": 0.6}})
        >>> t("PER"), t("PER", "de"), t("LOC", "de")
        (0.7, 0.6, 0.5)
    """

    def __init__(self, value: float | Mapping[str, Any] | None, default: float = 0.0) -> None:
        self._default = default
        if not isinstance(value, Mapping):
            value = {} if value is None else {ANY: _number(value)}
        self._labels: dict[str, float] = {}
        self._languages: dict[str, dict[str, float]] = {}
        for name, item in value.items():
            if isinstance(item, Mapping):
                self._languages[str(name)] = {
                    str(label): _number(number, f"{name}.{label}") for label, number in item.items()
                }
            else:
                self._labels[str(name)] = _number(item, str(name))

    def __call__(self, label: str, language: str | None = None) -> float:
        for table in (self._languages.get(language or "", {}), self._labels):
            for name in (label, ANY):
                if name in table:
                    return table[name]
        return self._default

    @property
    def by_language(self) -> bool:
        """Whether the language of a text matters."""
        return bool(self._languages)


def _number(value: Any, where: str = "") -> float:
    wrong = isinstance(value, bool) or not isinstance(value, int | float)
    if wrong or not 0 <= value <= 1:
        place = f" for {where!r}" if where else ""
        raise ConfigError(f"min_score must be from 0 to 1, got {short_repr(value)}{place}")
    return float(value)


def read_thresholds(path: str) -> dict[str, Any]:
    """The mapping in a JSON or YAML file, local or by URL; or the mapping itself, as text.

    Raises:
        ConfigError: no such file, or not a mapping of this form.
    """
    data = path.encode() if path.lstrip().startswith("{") else _read(path)
    if len(data) > MAX_BYTES:
        raise ConfigError(f"--min-score: expected at most {MAX_BYTES:,} bytes, got {len(data):,}")
    try:
        text = data.decode("utf-8")
        # In YAML every name stays a string: "no" is Norwegian, not false.
        is_json = PurePosixPath(path).suffix.lower() == ".json"
        content = json.loads(text) if is_json else yaml.load(text, Loader=yaml.BaseLoader)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(
            f"--min-score {path}: not valid JSON or YAML: {short_reason(error)}"
        ) from None
    if not isinstance(content, Mapping):
        raise ConfigError(f"--min-score {path}: expected a mapping from labels to numbers")
    _check_size(path, content)
    try:
        numbers: dict[str, Any] = with_numbers(content)
        Thresholds(numbers)
    except ConfigError as error:
        raise ConfigError(f"--min-score {path}: {error}") from None
    return numbers


def _read(path: str) -> bytes:
    url = storage.normal(path)
    info = storage.stat(url)
    if info is not None and info.size > MAX_BYTES:
        raise ConfigError(
            f"--min-score {path}: expected at most {MAX_BYTES:,} bytes, got {info.size:,}"
        )
    data = storage.read(url)
    if data is None:
        raise ConfigError(f"--min-score: there is no file {path}")
    return data


def _check_size(path: str, content: Mapping[str, Any]) -> None:
    """Two levels of at most MAX_NUMBERS numbers: YAML can name a mapping many times."""
    languages = [inner for inner in content.values() if isinstance(inner, Mapping)]
    if any(isinstance(item, Mapping | list) for inner in languages for item in inner.values()):
        raise ConfigError(f"--min-score {path}: expected a number for each label of a language")
    if (n := len(content) + sum(map(len, languages))) > MAX_NUMBERS:
        raise ConfigError(
            f"--min-score {path}: expected at most {MAX_NUMBERS:,} numbers, got {n:,}"
        )


def with_numbers(value: Any) -> Any:
    """The same with text that is a number as a number."""
    if isinstance(value, Mapping):
        return {name: with_numbers(inner) for name, inner in value.items()}
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
