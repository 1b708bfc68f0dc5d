"""A web application on a free port of this machine, for tests that want real connections."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from erniem_batch.serve.api import make_api
from erniem_batch.serve.config import AppConfig, ModelConfig
from erniem_batch.serve.engine import Engine

ENDS_IN_S = 30


@contextmanager
def served(app: Any, lifespan: Any = "on") -> Iterator[str]:
    """Its address, while it runs in a thread with an event loop of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan=lifespan, ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "it did not start"
                time.sleep(0.02)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(ENDS_IN_S)


@contextmanager
def served_model(model: Path, app: dict[str, Any] | None = None, **settings: Any) -> Iterator[str]:
    """The address of the service of a model that is called tiny.

    Args:
        app: settings of AppConfig.
        settings: of ModelConfig.
    """
    config = ModelConfig(name="tiny", model=str(model), **settings)
    api = make_api(AppConfig(models=(config,), **(app or {})), {"tiny": Engine.load(config)})
    with served(api) as url:
        yield url
