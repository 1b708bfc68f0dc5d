"""The watchdog ends its own process, so each test has one."""

import subprocess
import sys
import time

import pytest

from erniem_batch.job.watchdog import EXIT_HUNG, Watchdog

HEAD = """
import itertools, time
from erniem_batch.job.watchdog import Watchdog
counter = itertools.count()
"""


def run(code):
    """Exit code, seconds and stderr of a program."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HEAD + code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, time.monotonic() - started, done.stderr


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        # Stands still.
        (
            """
dog = Watchdog(0.4, lambda: 0)
with dog.watching("u1"), dog.watching("u2"):
    time.sleep(30)
""",
            EXIT_HUNG,
        ),
        # Gets on, slowly, then ends and has nothing more to do.
        (
            """
dog = Watchdog(0.4, lambda: next(counter))
with dog.watching("u1"):
    time.sleep(0.9)
dog = Watchdog(0.4, lambda: 0)
time.sleep(0.9)
""",
            0,
        ),
        # Each unit is short, though the counter never moves.
        (
            """
dog = Watchdog(0.6, lambda: 0)
for i in range(6):
    with dog.watching(f"u{i}"):
        time.sleep(0.2)
""",
            0,
        ),
        # One that hangs is not hidden by an error in another.
        (
            """
dog = Watchdog(0.4, lambda: 0)
try:
    with dog.watching("u1"):
        raise ValueError
except ValueError:
    pass
with dog.watching("u2"):
    time.sleep(30)
""",
            EXIT_HUNG,
        ),
    ],
    ids=["stands still", "gets on", "short units", "after an error"],
)
def test_a_process_that_stands_still_is_ended(code, expected):
    found, seconds, stderr = run(code)
    assert found == expected
    assert seconds < 20
    if expected:
        assert "no progress for 0 s, ending the process units=" in stderr
        assert "u2" in stderr


def test_without_a_timeout_nobody_watches():
    import threading

    before = threading.active_count()
    dog = Watchdog(None, lambda: 0)
    with dog.watching("u1"):
        assert threading.active_count() == before
