"""What a signal does at awkward moments. Each test has a process of its own."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from erniem_batch import stopping
from erniem_batch.stopping import SENTENCE, Stopped

# `ready` tells that the signal may come; its number is in the environment.
HEAD = """
import hashlib, os, signal, sys, threading, time
from erniem_batch import stopping
def ready(): os.kill(os.getpid(), int(sys.argv[1]))
stopping.GRACE_S = 0.4
"""
INSTALLED = HEAD + "stopping.install()\n"


def run(code, number=signal.SIGINT, head=INSTALLED):
    """Exit code, seconds from the signal on, standard error."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", head + code, str(int(number))],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, time.monotonic() - started, done.stderr


# The main thread ends by itself.
PROMPT = {
    "before all else": "ready(); time.sleep(30)",
    "in a block": """
try:
    with stopping.orderly():
        ready(); time.sleep(30)
except stopping.Stopped as stopped:
    stopping.say(); os._exit(stopped.exit_code)
""",
    "while a module is imported": "ready(); import asyncio; time.sleep(30)",
    "in another thread too": """
threading.Thread(target=time.sleep, args=(30,)).start()
ready(); time.sleep(30)
""",
}
# Only the other thread can end it.
LATE = {
    "in a call that returns late": """
with stopping.orderly():
    threading.Timer(0.2, ready).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)
""",
    "where somebody catches all": """
with stopping.orderly():
    while True:
        try:
            ready(); time.sleep(30)
        except BaseException:
            time.sleep(30)
""",
    "in a destructor": """
class Late:
    def __del__(self):
        ready(); time.sleep(0.1)
with stopping.orderly():
    late = Late()
    del late
    time.sleep(30)
""",
    "behind a handler of somebody else": """
with stopping.orderly():
    for number in stopping.SIGNALS:
        signal.signal(number, lambda *_: None)
    ready(); time.sleep(30)
""",
}


@pytest.mark.parametrize("code", PROMPT.values(), ids=PROMPT)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends(code, number):
    found, _, told = run(code, number)
    assert (found, told) == (128 + number, f"{SENTENCE}\n")


@pytest.mark.parametrize("code", LATE.values(), ids=LATE)
def test_it_ends_where_the_main_thread_cannot(code):
    found, seconds, told = run(code)
    assert (found, told) == (130, f"{SENTENCE}\n")
    assert seconds < 15


def test_what_was_begun_is_ended_from_outside():
    code = """
with stopping.orderly(), stopping.last_words(lambda: os.write(2, b"released ")):
    try:
        ready(); time.sleep(30)
    except BaseException:
        time.sleep(30)
"""
    assert run(code)[::2] == (130, f"released {SENTENCE}\n")


def test_signals_may_be_somebody_elses():
    code = """
heard = []
with stopping.elsewhere(heard.append):
    ready(); ready(); time.sleep(0.2)
sys.exit(7 if len(heard) == 2 else 1)
"""
    assert run(code)[::2] == (7, "")


def test_a_second_key_changes_nothing():
    code = """
with stopping.orderly():
    try:
        ready(); time.sleep(30)
    except stopping.Stopped:
        ready(); ready()
        stopping.finish(signal.SIGINT)
"""
    assert run(code)[::2] == (130, f"{SENTENCE}\n")


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, "Stopped"), (signal.SIGINT, "KeyboardInterrupt")]
)
def test_a_library_leaves_ctrl_c_alone(number, error):
    """Who calls `run_job` from Python has handlers of its own, and gets them back."""
    code = f"""
before = signal.getsignal(signal.SIGTERM)
try:
    with stopping.orderly():
        ready(); time.sleep(30)
except BaseException as stopped:
    assert type(stopped).__name__ == "{error}"
assert signal.getsignal(signal.SIGTERM) is before
assert threading.active_count() == 1
"""
    assert run(code, number, HEAD)[::2] == (0, "")


def test_importing_the_entry_is_light():
    """A signal that comes before it is heard ends in Python's own way."""
    code = "import erniem_batch.entry, sys; sys.exit(len(set(sys.modules) & {heavy}))"
    heavy = {"torch", "numpy", "pyarrow", "ray", "pydantic", "yaml", "rich", "cyclopts", "pandas"}
    done = subprocess.run([sys.executable, "-c", code.format(heavy=heavy)], check=False)
    assert done.returncode == 0


def test_in_this_process_nothing_is_installed():
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    with stopping.orderly(), pytest.raises(Stopped) as stopped:
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.exit_code == 143
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before
    threading.Thread(target=stopping.install).start()
    assert not stopping.is_asked()
