"""Where the servers of a replica listen. Ray Serve gives no choice, so its own calls are wrapped.

Where Ray gives a wrapped function another name, `listen_as_told` does nothing and a test fails.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ray.serve._private import http_util, replica
from ray.util import get_node_ip_address

logger = logging.getLogger(__name__)

# First port for requests without the proxy; set by `erniem-batch serve --direct-port`.
DIRECT_PORT = "ERNIEM_BATCH_DIRECT_PORT"
LOOPBACK = "127.0.0.1"
EVERYWHERE = "[::]:"
# Seconds between two tries to bind, and until a port that stays taken is reported.
RETRY_S = 0.5
REPORT_S = 10.0

# Of Ray: starts a server on host and port of its options; its task and the server.
Start = Callable[..., Awaitable[tuple["asyncio.Task[Any]", Any]]]


def listen_as_told(n_replicas: int) -> None:
    """Let the servers that Serve starts in this replica listen where they should.

    The one for other deployments listens on this machine only where the whole Ray does. The one for
    requests without the proxy takes the first free port from the one that was asked for.

    Args:
        n_replicas: how many replicas the deployment may have; each has one of as many ports.
    """
    add_port = getattr(replica, "add_port_to_grpc_server", None)
    if add_port is not None and get_node_ip_address() == LOOPBACK:
        replica.add_port_to_grpc_server = _on_loopback(add_port)
    start = getattr(replica, "start_asgi_http_server", None)
    first = os.environ.get(DIRECT_PORT)
    if start is not None and first is not None:
        ports = range(int(first), min(int(first) + n_replicas, 65_536))
        replica.start_asgi_http_server = _on_a_port_of(ports, start)
        http_util.set_socket_reuse_port = _reuse_address


def _on_loopback(add_port: Callable[[Any, str], int]) -> Callable[[Any, str], int]:
    def add(server: Any, address: str) -> int:
        return add_port(server, address.replace(EVERYWHERE, f"{LOOPBACK}:"))

    return add


def _on_a_port_of(ports: Sequence[int], start: Start) -> Start:
    async def start_there(
        app: Any, http_options: Any, *, event_loop: asyncio.AbstractEventLoop, **_: Any
    ) -> tuple["asyncio.Task[Any]", Any]:
        async def start_on(port: int) -> tuple["asyncio.Task[Any]", Any]:
            options = http_options.model_copy(update={"port": port})
            # Else connections of a replica that died keep the port for a minute, see below.
            return await start(app, options, event_loop=event_loop, enable_so_reuseport=True)

        server = PatientServer(http_options.host, ports, start_on)
        task = event_loop.create_task(server.run())
        await server.tried.wait()
        return task, server

    return start_there


def _reuse_address(listener: socket.socket) -> bool:
    """In the place of Ray's, which also lets several replicas share a port."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return True


class PatientServer:
    """A server that waits for a port of several until one is free. Ray tells it when to end.

    Serve itself would take another port for good, which nobody knows.

    Attributes:
        tried: set when all ports have been tried once.
        should_exit: whether it is to finish its requests and end.
    """

    def __init__(
        self,
        host: str,
        ports: Sequence[int],
        start: Callable[[int], Awaitable[tuple["asyncio.Task[Any]", Any]]],
    ) -> None:
        self.tried = asyncio.Event()
        self._host = host
        self._ports = ports
        self._start = start
        self._server: Any = None
        self._should_exit = False

    @property
    def should_exit(self) -> bool:
        return self._should_exit

    @should_exit.setter
    def should_exit(self, value: bool) -> None:
        self._should_exit = value
        if self._server is not None:
            self._server.should_exit = value

    async def run(self) -> None:
        """Bind, retry until that works, serve until the end."""
        loop = asyncio.get_running_loop()
        report_at = loop.time() + REPORT_S
        while not self._should_exit:
            if await self._serve():
                return
            self.tried.set()
            if loop.time() >= report_at:
                report_at = loop.time() + REPORT_S
                logger.warning("no direct port is free yet ports=%s", _listed(self._ports))
            await asyncio.sleep(RETRY_S)

    async def _serve(self) -> bool:
        """Serve on the first port that is free, until the end; False if none is."""
        for port in self._ports:
            if not _is_free(self._host, port):
                continue
            try:
                task, self._server = await self._start(port)
                logger.info("listening directly port=%d", port)
                self.tried.set()
                await task
                return True
            except (OSError, RuntimeError):  # somebody else was faster
                self._server = None
        return False


def _is_free(host: str, port: int) -> bool:
    """Whether nobody listens there."""
    try:
        with socket.create_server((host, port), family=_family(host)):
            return True
    except OSError:
        return False


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _listed(ports: Sequence[int]) -> str:
    return str(ports[0]) if len(ports) == 1 else f"{ports[0]}-{ports[-1]}"
