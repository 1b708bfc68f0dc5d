"""A real browser before the real service with the real demo model.

Everything here lives as long as one file of tests, not as the session: while Playwright's sync API
is started, its event loop counts as running, and `asyncio.run` of other tests would fail.
"""

import asyncio
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from serving import served

from erniem_batch.serve.api import make_api
from erniem_batch.serve.batcher import Device, Turn
from erniem_batch.serve.config import AppConfig, ModelConfig
from erniem_batch.serve.engine import Engine
from erniem_batch.serve.tokens import new_token

# Pages are painted without an emulated graphics card, which would take most of the time.
FLAGS = ("--disable-gpu", "--disable-software-rasterizer")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAX_BODY_BYTES = 200_000


@dataclass(eq=False)
class Service:
    """The service on a free port of this machine, in a thread with an event loop of its own."""

    config: AppConfig
    token: str | None = None
    url: str = ""
    engines: dict[str, Engine] = field(default_factory=dict)

    @contextmanager
    def running(self) -> Iterator["Service"]:
        self.engines = {model.name: Engine.load(model) for model in self.config.all_models}
        with served(make_api(self.config, self.engines)) as url:
            self.url = f"{url}/"
            yield self

    def ask(self, task: str, inputs: Any, **options: Any) -> Any:
        """The answer to a request that goes past the page."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        body = {"inputs": inputs, "options": options}
        answer = httpx.post(f"{self.url}v1/{task}", json=body, headers=headers, timeout=20)
        return answer.raise_for_status().json()

    @contextmanager
    def busy(self, model: str, task: str) -> Iterator[None]:
        """The device is taken, and a request waits: with a short queue, the next is refused."""
        batcher = self.engines[model]._batchers[task]
        loop = batcher._workers[0].get_loop()

        def do(work: Any) -> "Future[Any]":
            return asyncio.run_coroutine_threadsafe(work, loop)

        turn = do(_taken(batcher.device)).result(10)
        waiting = do(_ask(self, model, task))
        try:
            do(_until(lambda: batcher.n_waiting_tokens > 0)).result(10)
            yield
        finally:
            do(_given(batcher.device, turn)).result(10)
            waiting.result(10)


async def _ask(service: Service, model: str, task: str) -> None:
    headers = {"Authorization": f"Bearer {service.token}"}
    async with httpx.AsyncClient(headers=headers, timeout=20) as client:
        body = {"inputs": "Ada Lovelace lived in London.", "model": model}
        (await client.post(f"{service.url}v1/{task}", json=body)).raise_for_status()


async def _until(is_so: Any) -> None:
    while not is_so():
        await asyncio.sleep(0.01)


async def _taken(device: Device) -> Turn:
    return device.widen(await device.take())


async def _given(device: Device, turn: Turn) -> None:
    device.give(turn)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """Open to all, with the demo model and all its tasks."""
    model = ModelConfig(num_cpus=1)
    config = AppConfig(models=(model,), max_body_bytes=MAX_BODY_BYTES)
    with Service(config).running() as running:
        yield running


@pytest.fixture(scope="module")
def guarded() -> Iterator[Service]:
    """For bearers of a token, two models with few tasks, and next to no room to wait."""
    token, digest = new_token()
    models = (
        ModelConfig(name="names", tasks=("ner",), max_queue_tokens=1),
        ModelConfig(name="both", tasks=("ner", "embed")),
    )
    with Service(AppConfig(models=models, tokens=(digest,)), token).running() as running:
        yield running


def _chromium() -> str | None:
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Chromium, as it is installed."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = _chromium()
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)}, and CHROMIUM is not set")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Watch:
    """What no page may do.

    Attributes:
        statuses: of refusals that the test is about; the browser notes them on its console.
    """

    statuses: set[int] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def over(self, page: Any, home: str) -> None:
        origin = urlsplit(home).netloc
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("console", self._on_console)
        page.on("dialog", self._on_dialog)
        page.on("request", lambda request: self._on_request(request.url, origin))

    def _on_console(self, message: Any) -> None:
        expected = any(f"status of {status}" in message.text for status in self.statuses)
        if message.type in ("error", "warning") and not expected:
            self.problems.append(f"console: {message.text}")

    def _on_dialog(self, dialog: Any) -> None:
        self.problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _on_request(self, url: str, origin: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob") and parts.netloc != origin:
            self.problems.append(f"request to another origin: {url}")


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Fails a test whose page had an error, opened a dialog or asked another origin."""
    watch = Watch()
    yield watch
    assert watch.problems == []


@pytest.fixture
def open_page(chromium, watch) -> Iterator[Any]:
    """Opens the page of a service, in a window of its own."""
    contexts = []

    def open_(service: Service, fragment: str = "", **options: Any) -> Any:
        context = chromium.new_context(**{"viewport": {"width": 1200, "height": 860}, **options})
        context.set_default_timeout(10_000)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        contexts.append(context)
        page = context.new_page()
        watch.over(page, service.url)
        page.goto(service.url + fragment)
        return page

    yield open_
    for context in contexts:
        context.close()


@pytest.fixture
def page(open_page, service) -> Any:
    """The page of the open service, ready."""
    page = open_page(service)
    page.locator("#form").wait_for()
    return page


@pytest.fixture
def screenshots() -> Path:
    """The folder for pictures, where one is wanted."""
    folder = os.environ.get("SCREENSHOTS")
    if not folder:
        pytest.skip("pictures are made where SCREENSHOTS names a folder")
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def dropped(page: Any, selector: str, name: str, content: str) -> None:
    """Drops a file on an element."""
    transfer = page.evaluate_handle(
        """([name, content]) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([content], name));
          return transfer;
        }""",
        [name, content],
    )
    for event in ("dragover", "drop"):
        page.dispatch_event(selector, event, {"dataTransfer": transfer})


@pytest.fixture
def drop() -> Any:
    """See `dropped`."""
    return dropped


@pytest.fixture
def as_jsonl() -> Any:
    """Rows as lines; strings stand for themselves."""
    return lambda rows: "".join(
        (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n"
        for row in rows
    )
