"""Ctrl-C and SIGTERM end a command the same way: one sentence, an exit code, no traceback.

`install` is called before anything heavy is imported. From then on a signal ends the process at
once; inside `orderly` it first raises `Stopped` in the main thread, so that what was begun is
tidied up. A thread of its own hears of signals too, and ends the process where the main thread
cannot: it may be inside a call that returns late, or its exception may get lost.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

SENTENCE = "stopped; run the same command again to go on"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# So long the main thread has for its end.
GRACE_S = 1.2
# Added to the number of a signal, as shells do.
EXIT_BASE = 128
EXIT_CODES = tuple(EXIT_BASE + number for number in SIGNALS)
SHOW_CURSOR = "\x1b[?25h\r\x1b[K"


class Stopped(BaseException):
    """A signal came: what is finished is kept, the rest is for the next run.

    A Ray that was started for the run is still on, and ends with the process.
    """

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """That of the process."""
        return EXIT_BASE + self.number


class _State:
    """What this process knows of its end."""

    installed = False
    orderly = 0  # how many blocks of `orderly` are open
    elsewhere = False
    number: int | None = None
    said = False
    last_words: list[Callable[[], object]] = []  # noqa: RUF012  # one for the process
    talking = threading.Lock()


def install() -> None:
    """Hear signals for the rest of this process. Only for programs, not for a library."""
    if _State.installed or threading.current_thread() is not threading.main_thread():
        return
    _State.installed = True
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_listen_to, args=(reader,), name="signals", daemon=True).start()
    sys.unraisablehook = _unless_stopped(sys.unraisablehook)
    listen()


def listen() -> None:
    """Take the handlers (again): Ray puts one of its own in their place."""
    if threading.current_thread() is not threading.main_thread() or _State.number is not None:
        return
    for number in SIGNALS if _State.installed else SIGNALS[1:] if _State.orderly else ():
        signal.signal(number, _on_signal)


@contextmanager
def orderly() -> Iterator[None]:
    """Signals raise `Stopped` in this block, which must be in the main thread.

    Without `install` that is so for SIGTERM alone; Ctrl-C stays a KeyboardInterrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    _State.orderly += 1
    try:
        listen()
        yield
    finally:
        _State.orderly -= 1
        if not _State.installed and not _State.orderly:
            signal.signal(signal.SIGTERM, before)
            _State.number = None


@contextmanager
def elsewhere(handler: Callable[[int], object]) -> Iterator[None]:
    """Signals go to a handler of the caller in this block, and end nothing."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _State.elsewhere = True
    for number in SIGNALS:
        signal.signal(number, lambda number, _: handler(number))
    try:
        yield
    finally:
        for number, handled in before.items():
            signal.signal(number, handled)
        _State.elsewhere = False


@contextmanager
def last_words(words: Callable[[], object]) -> Iterator[None]:
    """What is called in another thread should the block not end in time after a signal."""
    _State.last_words.append(words)
    try:
        yield
    finally:
        _State.last_words.remove(words)


def is_asked() -> bool:
    """Whether a signal has come. Waits a moment for the thread that hears it first."""
    if _State.installed and _State.number is None:
        time.sleep(0.05)
    return _State.number is not None


def exit_code() -> int:
    """That of a process that was asked to end."""
    return EXIT_BASE + (_State.number or signal.SIGTERM)


def say() -> None:
    """Tell on standard error that the command was stopped; a program does so once."""
    with _State.talking:
        if _State.said and _State.installed:
            return
        _State.said = True
        text = (SHOW_CURSOR if sys.stderr.isatty() else "") + SENTENCE + "\n"
        if threading.current_thread() is threading.main_thread():
            sys.stderr.write(text)
            sys.stderr.flush()
        else:  # the main thread may hold the lock of the stream
            with suppress(OSError):
                os.write(2, text.encode())


def finish(number: int) -> NoReturn:
    """End the process after a signal, from whatever thread."""
    try:
        say()
    finally:
        os._exit(EXIT_BASE + number)


def _on_signal(number: int, _: object) -> None:
    """In the main thread."""
    for each in SIGNALS:  # once is enough
        if signal.getsignal(each) is _on_signal:
            signal.signal(each, signal.SIG_IGN)
    _State.number = number
    if not _State.orderly:
        finish(number)
    raise Stopped(number)


def _listen_to(reader: int) -> None:
    while True:
        (number,) = os.read(reader, 1)
        if number not in SIGNALS or _State.elsewhere:
            continue
        _State.number = number
        if _State.orderly:
            time.sleep(GRACE_S)
            for words in list(_State.last_words):
                with suppress(Exception):
                    words()
        finish(number)


def _unless_stopped(hook: Callable[[Any], object]) -> Callable[[Any], object]:
    """Nothing is said of a `Stopped` that got lost in a destructor: the thread ends the process."""

    def told(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, Stopped):
            hook(unraisable)

    return told
