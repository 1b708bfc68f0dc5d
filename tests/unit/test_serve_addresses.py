"""Where the servers of a replica listen, with Ray's own functions around real sockets."""

import asyncio
import socket
from contextlib import asynccontextmanager
from typing import Any

import pytest
from ray.serve._private import http_util, replica
from ray.serve.config import HTTPOptions
from starlette.responses import PlainTextResponse

from erniem_batch.serve import addresses
from erniem_batch.serve.addresses import DIRECT_PORT, listen_as_told


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two free ports, one behind the other; what `listen_as_told` changes is put back."""
    for module, name in (
        (replica, "start_asgi_http_server"),
        (replica, "add_port_to_grpc_server"),
        (http_util, "set_socket_reuse_port"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(addresses, "RETRY_S", 0.05)
    for first in range(20_000, 30_000, 2):
        try:
            with listener(first), listener(first + 1):
                monkeypatch.setenv(DIRECT_PORT, str(first))
                return [first, first + 1]
        except OSError:
            continue
    raise AssertionError("no two ports are free")


def listener(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


async def application(scope: Any, receive: Any, send: Any) -> None:
    await PlainTextResponse("here")(scope, receive, send)


@asynccontextmanager
async def started() -> Any:
    """As a replica starts it: Serve has given it some other port."""
    options = HTTPOptions(host="127.0.0.1", port=1)
    loop = asyncio.get_running_loop()
    task, server = await replica.start_asgi_http_server(
        application, options, event_loop=loop, enable_so_reuseport=False
    )
    yield server
    server.should_exit = True
    await asyncio.wait_for(task, 10)


async def until_answered(port: int) -> None:
    async with asyncio.timeout(10):
        while await answer(port) != b"here":
            await asyncio.sleep(0.05)


async def answer(port: int) -> bytes:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return b""
    writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    said = await reader.read()
    writer.close()
    return said.rpartition(b"\r\n")[2]


def test_a_replica_listens_where_it_was_told(ports: list[int]) -> None:
    """Also at once after another one died there with connections open."""

    async def test() -> None:
        for _ in range(2):
            async with started():
                await until_answered(ports[0])

    listen_as_told(1)
    asyncio.run(test())


def test_a_port_that_is_taken_is_waited_for(
    ports: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(addresses, "REPORT_S", 0.1)

    async def test() -> None:
        with listener(ports[0]):
            starting = asyncio.create_task(_enter(started()))
            context, _ = await asyncio.wait_for(starting, 10)
            await asyncio.sleep(0.3)
        await until_answered(ports[0])
        await context.__aexit__(None, None, None)

    listen_as_told(1)
    asyncio.run(test())
    assert f"no direct port is free yet ports={ports[0]}" in caplog.text


async def _enter(context: Any) -> Any:
    return context, await context.__aenter__()


def test_one_that_never_gets_its_port_ends_when_told(ports: list[int]) -> None:
    async def test() -> None:
        with listener(ports[0]):
            async with started():
                pass

    listen_as_told(1)
    asyncio.run(test())


def test_each_of_several_replicas_has_a_port(ports: list[int]) -> None:
    """Though they start at the same time, and look for a free one together."""

    async def test() -> None:
        async with started(), started():
            await asyncio.gather(*map(until_answered, ports))
        with listener(ports[0]), listener(ports[1]):
            pass

    listen_as_told(2)
    asyncio.run(test())


@pytest.mark.parametrize(
    ("node", "expected"), [("127.0.0.1", "127.0.0.1:0"), ("198.51.100.7", "[::]:0")]
)
def test_the_way_between_deployments_is_as_open_as_ray(
    ports: list[int], monkeypatch: pytest.MonkeyPatch, node: str, expected: str
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(addresses, "get_node_ip_address", lambda: node)
    monkeypatch.setattr(replica, "add_port_to_grpc_server", lambda server, at: seen.append(at))
    monkeypatch.delenv(DIRECT_PORT)
    start = replica.start_asgi_http_server
    listen_as_told(1)
    replica.add_port_to_grpc_server(None, "[::]:0")
    assert seen == [expected]
    assert replica.start_asgi_http_server is start


def test_a_server_that_loses_a_race_for_a_port_takes_the_next(ports: list[int]) -> None:
    """The port was free when it looked, and is not when it listens."""

    async def test() -> None:
        calls: list[int] = []

        async def start(port: int) -> Any:
            calls.append(port)
            if len(calls) == 1:
                raise RuntimeError("bind")
            if len(calls) == 2:
                return asyncio.create_task(_fail()), None
            return asyncio.create_task(asyncio.sleep(0)), None

        server = addresses.PatientServer("127.0.0.1", ports, start)
        await asyncio.wait_for(server.run(), 10)
        assert calls == [ports[0], ports[1], ports[0]]

    asyncio.run(test())


async def _fail() -> None:
    raise OSError("listen")
