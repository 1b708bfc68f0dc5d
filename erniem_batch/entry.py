"""Entry points of all commands. Light, so that Ctrl-C is heard while the rest is imported."""

import sys
from collections.abc import Callable, Sequence

from erniem_batch import stopping


def program(arguments: Sequence[str] | None = None) -> int:
    """Run `erniem-batch`; its exit code."""
    stopping.install()
    from erniem_batch.cli import leave, main

    return leave(main(arguments))


def script(command: str) -> int:
    """Run one command of `erniem-batch`, for a script of its own; its exit code."""
    return program([command, *sys.argv[1:]])


def tool(main: Callable[[], int]) -> int:
    """Run a program that is no command of `erniem-batch`; its exit code."""
    stopping.install()
    return main()
