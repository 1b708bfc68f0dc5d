"""Names of a package that are imported when they are asked for: torch and Ray take seconds."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazily(package: str, modules: Mapping[str, str], known: dict[str, Any]) -> Callable[[str], Any]:
    """The `__getattr__` of a package.

    Args:
        modules: for each name, the module of the package that it comes from.
        known: globals of the package, where a name stays.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        known[name] = getattr(import_module(f"{package}.{modules[name]}"), name)
        return known[name]

    return get
