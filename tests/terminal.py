"""A command in a terminal of its own, to which Ctrl-C goes as a person presses it."""

import os
import pty
import select
import signal
import subprocess
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

CTRL_C = b"\x03"


class Terminal:
    """A process that has the terminal, and what it has written so far."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], cwd: Path) -> None:
        self._master, slave = pty.openpty()
        self._text = b""
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_take_terminal,
            env=environment,
            cwd=cwd,
        )
        os.close(slave)

    def press(self, keys: bytes) -> None:
        """Type; Ctrl-C is a signal to the process and all others of its group."""
        os.write(self._master, keys)

    def hears(self, number: int) -> bool:
        """Whether the process handles a signal by now."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return False
        (mask,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")]
        return bool(int(mask, 16) >> (number - 1) & 1)

    def text(self, seconds: float = 0.0) -> str:
        """All that it has written, after waiting for more."""
        while select.select([self._master], [], [], seconds)[0]:
            try:
                data = os.read(self._master, 65_536)
            except OSError:  # nobody has the other end any more
                break
            if not data:
                break
            self._text += data
        return self._text.decode("utf-8", "replace")

    def wait(self, seconds: float) -> int:
        """Its exit code; what it writes meanwhile is read, so that it never blocks."""
        give_up = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < give_up, self.text()
            self.text(0.02)
        return self.process.returncode

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def _take_terminal() -> None:
    import fcntl

    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, signal.SIGTERM])
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@contextmanager
def in_terminal(
    command: Sequence[str], environment: dict[str, str], cwd: Path
) -> Iterator[Terminal]:
    terminal = Terminal(command, environment, cwd)
    try:
        yield terminal
    finally:
        terminal.close()
