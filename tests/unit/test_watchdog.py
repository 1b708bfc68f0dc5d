"""The watchdog ends its own process, so each test has one."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import listening
import pytest

from erniem_batch.job import watchdog
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


HOLD = """
import ctypes, re
dog = Watchdog(0.6, lambda: 0)
with dog.watching("u1"), dog.watching("u2"):
    {call}
"""


@pytest.mark.parametrize(
    "call",
    [
        "re.match('(a+)+$', 'a' * 60 + 'b')",
        # A while after the work began, and when the clock of the thread inside runs already.
        "time.sleep(0.4); ctypes.PyDLL(None).sleep(30)",
    ],
    ids=["regular expression", "later"],
)
def test_a_call_that_stops_all_threads_is_ended_from_outside(call):
    found, seconds, stderr = run(HOLD.format(call=call))
    assert found == -signal.SIGKILL
    assert seconds < 20
    assert "in a call that stops all threads, ending the process from outside" in stderr
    assert "units=u1,u2" in stderr


def test_a_call_that_stops_all_threads_for_a_short_time_is_none_of_this():
    code = HOLD.format(call="[ctypes.PyDLL(None).usleep(300_000) for _ in range(6)]")
    code = code.replace("lambda: 0", "lambda: next(counter)")
    assert run(code)[0] == 0


GUARDED = """
import os
dog = Watchdog(0.8, lambda: next(counter))
with dog.watching("u1"):
    print("at work", flush=True)
    time.sleep({seconds})
"""


@contextmanager
def guarded(seconds, timeout=0.8):
    """A process at work in a session of its own, and the one that guards it."""
    code = GUARDED.format(seconds=seconds).replace("Watchdog(0.8", f"Watchdog({timeout}")
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + code], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout.readline() == b"at work\n"
        (guard,) = listening.family(process.pid) - {process.pid}
        yield process, guard
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_machine_that_was_asleep_ends_nothing():
    with guarded(1.0) as (process, _):
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(2.5)
        os.killpg(process.pid, signal.SIGCONT)
        assert process.wait(20) == 0


@pytest.mark.slow
def test_a_process_that_is_stopped_alone_is_ended():
    with guarded(30.0) as (process, _):
        os.kill(process.pid, signal.SIGSTOP)
        assert process.wait(20) == -signal.SIGKILL


def test_the_guard_is_small_and_ends_with_its_process():
    with guarded(30.0) as (process, guard):
        time.sleep(0.5)
        status = Path(f"/proc/{guard}/status").read_text()
        resident = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])
        assert resident < 15_000
        os.killpg(process.pid, signal.SIGINT)  # of a terminal: the process ends, by itself
        assert process.wait(20) != 0
        wait_until_gone(guard)


def wait_until_gone(pid):
    give_up = time.monotonic() + 20
    while listening.command_of(pid):
        assert time.monotonic() < give_up
        time.sleep(0.05)


@pytest.mark.slow
def test_a_guard_that_is_gone_is_started_again():
    with guarded(30.0) as (process, guard):
        os.kill(guard, signal.SIGKILL)
        give_up = time.monotonic() + 20
        while not (new := listening.family(process.pid) - {process.pid, guard}):
            assert time.monotonic() < give_up
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGSTOP)
        assert new
        assert process.wait(20) == -signal.SIGKILL


def test_work_goes_on_where_no_process_can_be_started(monkeypatch, caplog):
    def refuse(*_, **__):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with Watchdog(60, lambda: 0).watching("u1"):
        pass
    assert "nothing watches this process from outside: Resource temporarily" in caplog.text


def test_without_work_nobody_watches(monkeypatch):
    monkeypatch.setattr(watchdog, "IDLE_S", 0.3)
    dog = Watchdog(0.4, lambda: 0)
    for _ in range(2):
        before = set(threading.enumerate())
        with dog.watching("u1"):
            children = listening.family(os.getpid())
            (guard,) = [pid for pid in children if "guard.py" in listening.command_of(pid)]
            (thread,) = set(threading.enumerate()) - before
        wait_until_gone(guard)
        thread.join(10)
        assert not thread.is_alive()


def test_without_a_timeout_nobody_watches():
    before = threading.active_count()
    dog = Watchdog(None, lambda: 0)
    with dog.watching("u1"):
        assert threading.active_count() == before
