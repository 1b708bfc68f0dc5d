"""Stops this process before one of its effects on a folder, as if it had been suspended there.

The drill puts this file as `sitecustomize.py` beside the package, so that every Python of a run
imports it: the driver, and the workers of Ray. What it has to do is in an environment variable:

    {"folder": "out", "who": "driver", "at": 17, "record": "effects", "stopped": "…"}

Without `at` it only writes down the effects, one a line. An effect is a file that is renamed,
linked or deleted, or a request that writes or deletes an object. Those on `lease.json` are left
out: how many there are depends on time.
"""

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

VARIABLE = "ERNIEM_DRILL_PAUSE"
LOCAL = {"link": 1, "rename": 0, "replace": 1, "unlink": 0}  # which argument tells the file
REQUESTS = ("PutObject", "DeleteObject", "CompleteMultipartUpload")


class Pause:
    """Counts effects, and stops the process before the chosen one.

    Args:
        folder: path, or bucket and key, that the names of affected files begin with.
        at: number of the effect; None: only counting.
        record: file to which each effect is appended.
        stopped: file that says which process has stopped, and before what.
    """

    def __init__(
        self, folder: str, record: str, at: int | None = None, stopped: str = "", **_: Any
    ) -> None:
        self._folder = folder.rstrip("/") + "/"
        self._record, self._at, self._stopped = record, at, stopped
        self._count = 0

    def before(self, kind: str, path: str) -> None:
        """Called before an effect on a path."""
        name = path.removeprefix(self._folder)
        left_over = kind == "unlink" and name.endswith(".tmp")
        if name == path or "lease.json" in name or left_over:
            return
        number, self._count = self._count, self._count + 1
        if self._at is None:
            self._append(self._record, f"{kind} {plain(name)}\n")
        elif number == self._at:
            self._append(self._stopped, f"{os.getpid()} {kind} {name}\n")
            os.kill(os.getpid(), signal.SIGSTOP)

    @staticmethod
    def _append(path: str, text: str) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, text.encode())
        os.close(descriptor)


def plain(name: str) -> str:
    """The name of a file without what differs from one to the next: its kind."""
    return re.sub(r"[0-9a-f]{8,}|\d+", "N", name)


def who_am_i() -> str:
    """Which part of a run this process is."""
    command = " ".join(sys.orig_argv)
    if "erniem_batch.cli" in command:
        return "driver"
    return "actor" if "default_worker.py" in command else ""


def install(pause: Pause) -> None:
    """Makes the functions that have effects tell of them."""
    for name, place in LOCAL.items():
        setattr(os, name, _telling(pause, name, place, getattr(os, name)))
    if not pause._folder.startswith("/"):
        _install_requests(pause)


def _telling(
    pause: Pause, name: str, place: int, function: Callable[..., Any]
) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        if len(arguments) > place:
            pause.before(name, os.fsdecode(arguments[place]))
        return function(*arguments, **options)

    return call


def _install_requests(pause: Pause) -> None:
    from aiobotocore.client import AioBaseClient

    call = AioBaseClient._make_api_call

    async def telling(self: Any, operation: str, parameters: Any) -> Any:
        if operation in REQUESTS:
            pause.before(operation, f"{parameters['Bucket']}/{parameters['Key']}")
        return await call(self, operation, parameters)

    AioBaseClient._make_api_call = telling


if __name__ == "sitecustomize" and VARIABLE in os.environ:
    _values = json.loads(os.environ[VARIABLE])
    if who_am_i() and who_am_i() == _values["who"]:
        install(Pause(**_values))
