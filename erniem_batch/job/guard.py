"""A small process that ends its parent when the parent stands still. See `watchdog.py`.

It runs this file alone, without the package, and needs no more than a bare Python: some 8 MB.
Standard input is a file that both share, of the layout below.

Exit codes: 0 the parent is gone or was ended.
"""

import os
import signal
import struct
import sys
import time

# At work or not, when it last got on (monotonic clock, which all processes share), length of the
# text behind it that names the work.
LAYOUT = struct.Struct("<qdq")
SIZE = 512
# The process watches itself, and says more when it ends itself: it comes first.
GRACE = 0.25
MIN_GRACE_S = 0.5


def read() -> tuple[bool, float, str]:
    """Whether the parent is at work, when it last got on, and at what it works."""
    data = os.pread(0, SIZE, 0)
    at_work, since, length = LAYOUT.unpack_from(data)
    return bool(at_work), since, data[LAYOUT.size : LAYOUT.size + length].decode("utf-8", "replace")


def watch(parent: int, timeout: float) -> None:
    """Return when the parent is gone; end it if it does not get on for so many seconds."""
    limit = timeout + max(MIN_GRACE_S, GRACE * timeout)
    pause = min(1.0, timeout / 4)
    asleep_until = last = time.monotonic()
    while os.getppid() == parent:
        time.sleep(pause)
        now = time.monotonic()
        if now - last > 2 * pause + 1.0:  # the machine stood still, and the parent with it
            asleep_until = now
        last = now
        state = at_work, since, names = read()
        stands_still = at_work and now - max(since, asleep_until) > limit
        if stands_still and read() == state and os.getppid() == parent:
            end(parent, timeout, names)


def end(parent: int, timeout: float, names: str) -> None:
    """End the parent, and say why."""
    sys.stderr.write(
        f"no progress for {timeout:.0f} s in a call that stops all threads, "
        f"ending the process from outside pid={parent} units={names}\n"
    )
    sys.stderr.flush()
    os.kill(parent, signal.SIGKILL)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: for the whole run, not for us
    watch(int(sys.argv[1]), float(sys.argv[2]))
