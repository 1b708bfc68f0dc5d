"""The libraries of the extra `eval`, which a user may not have."""

from importlib import import_module
from typing import Any

from erniem_batch.errors import ConfigError


def library(name: str) -> Any:
    """A module of one of these libraries, by its full name.

    Raises:
        ConfigError: it is not installed; says how to install it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"evaluate needs a library that is not installed ({name.partition('.')[0]}): "
            f"pip install 'erniem-batch[eval]'"
        ) from error


def require_libraries(names: tuple[str, ...]) -> None:
    """Raises a ConfigError unless all are there, before a model runs for an hour."""
    for name in names:
        library(name)
