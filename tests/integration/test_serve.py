"""The service on a real Ray Serve: one model, several models, their failures and their changes."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import listening
import pytest
from fakes import save_tiny_ner_model, save_tiny_service
from fault.runs import free_port
from starting import start

from erniem_batch import ErnieMTokenizer
from erniem_batch.serve.config import AppConfig, ModelConfig

SIZES = {"window_tokens": 64, "overlap_tokens": 16, "max_batch_tokens": 256, "num_cpus": 0.1}
TEXT = "Ada Lovelace lived in London, 北京は大きい都市です。"
pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def service_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: ErnieMTokenizer) -> Path:
    """Tiny models of all tasks, to be served together."""
    return save_tiny_service(tmp_path_factory.mktemp("service"), tokenizer)


@pytest.fixture(scope="module")
def url(local_ray: None) -> Iterator[str]:
    """A Ray Serve on the Ray of these tests, without any application."""
    from ray import serve

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 60})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture
def run(url: str) -> Iterator[Callable[[AppConfig], None]]:
    """Runs an application, in place of the one before; ends it after the test."""
    from ray import serve

    from erniem_batch.serve import app

    yield lambda config: start(app(config), "test")
    serve.delete("test")


def ask(url: str, text: str = TEXT, task: str = "ner", **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/{task}", json={"inputs": text, **body}, timeout=60)


async def many(url: str, n: int, seconds: float = 60.0, **body: Any) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=n)
    async with httpx.AsyncClient(limits=limits, timeout=seconds) as client:
        posts = [client.post(f"{url}/v1/ner", json={"inputs": TEXT, **body}) for _ in range(n)]
        return await asyncio.gather(*posts)


class Load:
    """Asks again and again from a few threads until it is ended; counts what came."""

    def __init__(self, url: str, threads: int = 4) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self.counts: Counter[int | str] = Counter()
        self.digests: set[str] = set()
        self._url, self._threads, self._ended = url, threads, False
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> "Load":
        for _ in range(self._threads):
            self._pool.submit(self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._pool.shutdown()

    def _ask(self) -> None:
        while not self._ended:
            try:
                with httpx.Client(timeout=60) as client:
                    response = client.post(f"{self._url}/v1/ner", json={"inputs": TEXT})
                self.counts[response.status_code] += 1
            except httpx.TransportError as error:
                self.counts[type(error).__name__] += 1


def one_model(folder: Path, **changes: Any) -> AppConfig:
    model = ModelConfig(name="tiny", model=str(folder), **{**SIZES, **changes})
    return AppConfig(models=(model,))


# ---- tests --------------------------------------------------------------------------------------


def test_one_model(url, run, service_dir, tmp_path):
    run(one_model(service_dir, tasks=("ner", "embed")))
    response = ask(url)
    assert response.status_code == 200
    assert response.json()["results"][0]["entities"]
    assert response.headers["x-request-id"]
    assert httpx.get(f"{url}/readyz").status_code == 200
    response = httpx.post(f"{url}/v1/ner", json={}, headers={"x-request-id": "mine"})
    assert response.status_code == 422
    assert response.json()["error"]["request_id"] == "mine"
    assert ask(url, task="qa").status_code == 422
    response = httpx.post(f"{url}/v1/qa", json={"inputs": {"question": "a", "context": "b"}})
    assert response.status_code == 404
    # The proxy has 60 s, the caller less; ours ends first.
    late = httpx.post(
        f"{url}/v1/ner", json={"inputs": TEXT}, headers={"x-request-timeout-seconds": "0.0001"}
    )
    assert late.status_code in (408, 504)
    statuses = Counter(r.status_code for r in asyncio.run(many(url, 64)))
    assert statuses == {200: 64}


@pytest.mark.slow  # the drill of the service does this, too
def test_a_change_of_model_under_load(url, run, service_dir, tokenizer, tmp_path):
    """No request fails, and the new model is ready before the old one goes."""
    other = save_tiny_ner_model(tmp_path / "other", tokenizer, num_hidden_layers=1)
    run(one_model(service_dir, tasks=("ner",)))
    before = httpx.get(f"{url}/v1/models").json()["data"][0]["digests"]["ner"]
    with Load(url) as load:
        time.sleep(1)
        run(one_model(other))
        after = httpx.get(f"{url}/v1/models").json()["data"][0]["digests"]["ner"]
        time.sleep(1)
    assert before != after
    assert set(load.counts) == {200}
    assert load.counts[200] > 20


@pytest.mark.slow  # as all that tests/fault/serve_drill.py goes deeper into
def test_a_replica_that_dies_is_replaced(url, run, service_dir):
    from ray import serve

    run(one_model(service_dir, tasks=("ner",)))
    with Load(url) as load:
        time.sleep(1)
        deployment = serve.status().applications["test"].deployments["http"]
        assert deployment.replica_states == {"RUNNING": 1}
        os.kill(replica_pid(), signal.SIGKILL)
        time.sleep(1)
        give_up = time.monotonic() + 60
        while ask(url).status_code != 200:
            assert time.monotonic() < give_up, load.counts
            time.sleep(0.2)
        good = load.counts[200]
        time.sleep(1)
    assert load.counts[200] > good, "and goes on"
    assert sum(n for status, n in load.counts.items() if status not in (200, 503)) <= 8, load.counts


def replica_pid() -> int:
    """The process of the only replica of "http"."""
    from ray.serve.context import _get_global_client

    details = _get_global_client().get_serve_details()
    (replica,) = details["applications"]["test"]["deployments"]["http"]["replicas"]
    return int(replica["pid"])


@pytest.mark.slow  # tests/unit has several models in one application
def test_several_models(url, run, service_dir, ner_model_dir):
    """Each a deployment of its own; what they refuse reaches the client as what it is."""
    models = (
        ModelConfig(name="names", model=str(ner_model_dir), max_queue_tokens=200, **SIZES),
        ModelConfig(name="rest", model=str(service_dir), tasks=("qa", "ner", "embed"), **SIZES),
    )
    run(AppConfig(models=models))
    assert ask(url).json()["model"] == "names", "the first that can"
    assert ask(url, model="rest").json()["model"] == "rest"
    assert ask(url, task="embed").json()["model"] == "rest"
    assert ask(url, model="none").status_code == 404
    assert ask(url, task="embed", model="names").status_code == 404
    cards = httpx.get(f"{url}/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["names", "rest"]
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok", "problems": []}
    responses = asyncio.run(many(url, 150))
    assert set(r.status_code for r in responses) <= {200, 429}
    refused = [r for r in responses if r.status_code == 429]
    assert refused, "150 times 20 tokens do not fit into a queue of 200"
    assert all(int(r.headers["retry-after"]) >= 1 for r in refused)
    assert all(r.json()["error"]["code"] == "queue_full" for r in refused)
    assert ask(url).status_code == 200


@pytest.mark.slow
def test_a_child_that_has_no_room(url, service_dir, monkeypatch):
    """Serve's own refusal, of a deployment behind the one that speaks HTTP, is a 429 too."""
    from ray import serve

    from erniem_batch.serve import app

    models = tuple(
        ModelConfig(name=name, model=str(service_dir), tasks=("ner",), **SIZES) for name in "ab"
    )
    monkeypatch.setattr("erniem_batch.serve.deployments.MAX_QUEUED_REQUESTS", 1)
    monkeypatch.setattr("erniem_batch.serve.deployments.MAX_ONGOING_REQUESTS", 1)
    application = app(AppConfig(models=models))
    monkeypatch.undo()
    front = application._bound_deployment
    roomy = front.options(max_ongoing_requests=500, max_queued_requests=-1)
    start(roomy.bind(*front.init_args), "test")
    try:
        statuses = Counter(r.status_code for r in asyncio.run(many(url, 40)))
        assert set(statuses) == {200, 429}, statuses
    finally:
        serve.delete("test")


def drawn_metrics() -> set[str]:
    """Names of all metrics that the dashboard draws."""
    path = Path(__file__).parents[2] / "deploy" / "grafana-serve.json"
    names = set(re.findall(r"ray_erniem_serve_[a-z_]+", path.read_text()))
    assert len(names) >= 10
    # Nothing is padded where one text is asked at a time.
    return names - {"ray_erniem_serve_padding_tokens_total"}


@pytest.mark.slow  # Ray tells of metrics every ten seconds
def test_what_nobody_waits_for_is_not_computed(url, run, service_dir):
    """A client that goes is noticed by the proxy, which cancels its request at the replica."""
    run(one_model(service_dir, tasks=("ner",)))
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/ner", json={"inputs": TEXT * 10_000}, timeout=0.5)
    gone = re.compile(r"^ray_erniem_serve_requests_total\{.*status=\"499\".*\} 1", flags=re.M)
    give_up = time.monotonic() + 30
    while not gone.search(metrics()):
        assert time.monotonic() < give_up
        time.sleep(1)


def metrics() -> str:
    """What this Ray tells Prometheus."""
    import ray

    node = next(node for node in ray.nodes() if node["Alive"])
    return httpx.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics").text


@pytest.mark.slow
def test_what_is_served_stays_among_the_metrics(run, service_dir):
    """Ray forgets a gauge that nobody has set for some time."""
    run(one_model(service_dir, tasks=("ner", "qa")))
    time.sleep(60)
    told = re.findall(r"^ray_erniem_serve_model_info\{.*task=\"(\w+)\"", metrics(), flags=re.M)
    assert sorted(told) == ["ner", "qa"]


def serve_command(service_dir: Path, *flags: str) -> list[str]:
    program = "from erniem_batch.cli import program; raise SystemExit(program())"
    model = ("--model", str(service_dir), "--tasks", "ner,qa")
    return [sys.executable, "-c", program, "serve", *model, *flags]


@contextmanager
def serving(log: Path, command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """`erniem-batch serve` as people run it, with a Ray of its own, from the moment it is ready."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        wait_for(lambda: "end with Ctrl-C" in log.read_text() or process.poll() is not None, 200)
        assert process.poll() is None, log.read_text()
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], Any], seconds: float) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.5)


def test_the_command_serves_and_ends(service_dir, tmp_path):
    """One line for each request in the log, nothing open to others, a calm end on SIGTERM."""
    port, direct_port = free_port(), free_port()
    log = tmp_path / "log"
    flags = ("--port", str(port), "--direct-port", str(direct_port), "--access-log")
    with serving(log, serve_command(service_dir, *flags)) as process:
        answers = [ask(f"http://127.0.0.1:{n}") for n in (port, direct_port)]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert answers[0].json() == answers[1].json()
        (metrics,) = re.findall(r"http://\S+/metrics", log.read_text())
        give_up = time.monotonic() + 60
        while absent := drawn_metrics() - set(
            re.findall(r"^(ray_erniem_serve_\w+)\{", httpx.get(metrics).text, flags=re.M)
        ):
            assert time.monotonic() < give_up, absent
            ask(f"http://127.0.0.1:{port}")
            time.sleep(1)
        only_this_machine_is_reached(process.pid)
        each_request_is_logged(f"http://127.0.0.1:{port}", log)
        each_request_is_logged(f"http://127.0.0.1:{direct_port}", log)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert time.monotonic() - started < 45


def only_this_machine_is_reached(pid: int) -> None:
    """As the table in deploy/README.md says."""
    found = listening.addresses(pid)
    assert len(found) > 10, "Ray opens many"
    others = {(host, port) for host, port in found if host.removeprefix("::ffff:") != "127.0.0.1"}
    assert not others


def each_request_is_logged(url: str, log: Path) -> None:
    """Method, route, status and time; nothing that a client chose."""
    before = len(log.read_text())
    httpx.get(f"{url}/secret-path?secret-query=1", headers={"X-Request-ID": "secret id"})
    question = {"question": "secret-text?", "context": "secret-text"}
    httpx.post(f"{url}/v1/qa?secret-query=1", json={"inputs": question})
    httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer secret-token"})
    for what in ("GET / 404", "POST /v1/qa 200", "GET /v1/models 200"):
        line = re.compile(rf"^.*{what} [\d.]+ms$", flags=re.M)
        wait_for(lambda line=line: line.search(log.read_text()[before:]), 20)
        assert len(line.findall(log.read_text()[before:])) == 1
    assert "secret" not in log.read_text()


@pytest.mark.slow
def test_a_replica_that_is_replaced_listens_directly_again(service_dir, tmp_path):
    port, direct_port = free_port(), free_port()
    flags = ("--port", str(port), "--direct-port", str(direct_port))
    with serving(tmp_path / "log", serve_command(service_dir, *flags)) as process:
        url = f"http://127.0.0.1:{direct_port}"
        for _ in range(2):
            with httpx.Client() as client:  # an open connection, which the kill leaves behind
                assert client.get(f"{url}/readyz").status_code == 200
                (pid,) = [
                    pid
                    for pid in listening.family(process.pid)
                    if listening.command_of(pid).startswith("ray::ServeReplica")
                ]
                os.kill(pid, signal.SIGKILL)
                wait_for(lambda: not answers(url), 20)
            wait_for(lambda: answers(url), 90)
            assert ask(url).status_code == 200
        assert not answers(f"http://127.0.0.1:{direct_port + 1}")


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_many_halves_of_requests_block_nobody(service_dir, tmp_path):
    """More than all requests that Serve works on at a time, by both ports; each gets a 408."""
    port, direct_port = free_port(), free_port()
    path = tmp_path / "serve.yaml"
    model = f"{{name: tiny, model: {service_dir}, tasks: [ner], num_cpus: 1}}"
    path.write_text(f"body_timeout_s: 20\nmodels: [{model}]\n")
    flags = ("--port", str(port), "--direct-port", str(direct_port))
    command = [*serve_command(service_dir)[:4], "--config", str(path), *flags]
    with serving(tmp_path / "log", command):
        for number in (port, direct_port):
            url = f"http://127.0.0.1:{number}"
            assert ask(url).status_code == 200
            started = time.monotonic()
            halves = [
                half_a_request(number, size) for size in (100, 1_000_000) for _ in range(1100)
            ]
            slowest = 0.0
            while time.monotonic() - started < 15:
                asked = time.monotonic()
                assert ask(url).status_code == 200
                slowest = max(slowest, time.monotonic() - asked)
            assert slowest < 5
            for half in halves:
                half.settimeout(40)
                assert half.recv(12) == b"HTTP/1.1 408"
                half.close()


def half_a_request(port: int, size: int) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=20)
    head = f"POST /v1/ner HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n"
    client.sendall(head.encode() + b'{"inputs": ')
    return client
