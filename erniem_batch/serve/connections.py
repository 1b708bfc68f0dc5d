"""Connections on which no request comes: uvicorn keeps them for ever, we close them.

uvicorn ends an idle connection only after a first response. A client that never finishes the head
of a request would hold its connection as long as it likes.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http import auto

# A head that is larger than this is no request of ours.
MAX_HEAD_BYTES = 65_536

# uvicorn's own protocol, whichever parser is installed.
Protocol: Any = auto.AutoHTTPProtocol


class BoundedConnection(Protocol):  # type: ignore[misc]  # a class that uvicorn chooses
    """A connection that is closed unless the head of a request arrives in time.

    The time also runs while a client sends the rest of a body that was refused already.

    Attributes:
        head_timeout_s: seconds from the first byte, or from the start of the connection.
    """

    head_timeout_s = 10.0
    _timer: asyncio.TimerHandle | None = None
    _n_head = 0

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Start the clock."""
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        """Restart the clock with a new head, stop it when the head is complete."""
        if self._is_between_requests():
            self._start_timer()
            self._n_head += 0 if self._has_unread_body() else len(data)
        super().data_received(data)
        if not self._is_between_requests():
            self._stop_timer()
        elif self._n_head > MAX_HEAD_BYTES:
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        """Stop the clock."""
        self._stop_timer()
        super().connection_lost(error)

    def _is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _has_unread_body(self) -> bool:
        return self.cycle is not None and self.cycle.more_body

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.head_timeout_s, self._close)

    def _stop_timer(self) -> None:
        self._n_head = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        if self.transport.get_protocol() is self:  # else it has become a web socket
            self.transport.close()


def bound_heads(timeout_s: float) -> None:
    """Let every uvicorn server that this process starts from now on use `BoundedConnection`."""
    BoundedConnection.head_timeout_s = timeout_s
    auto.AutoHTTPProtocol = BoundedConnection
