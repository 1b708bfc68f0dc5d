"""Ray Serve around it: deployments, and the builder that `serve run` and YAML files name.

With one model, the replica that speaks HTTP holds the model too: a request takes one step less.
With several, each is a deployment of its own behind the one that speaks HTTP.
"""

import asyncio
import inspect
import logging
import sys
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from erniem_batch.serve.addresses import listen_as_told
from erniem_batch.serve.api import Refuse, make_api
from erniem_batch.serve.config import MAX_ONGOING_REQUESTS, AppConfig, Autoscaling, ModelConfig
from erniem_batch.serve.engine import Ask, Engine, Refusal, Served
from erniem_batch.serve.memory import Trimmer, keep_for_good
from erniem_batch.serve.metrics import BatchMetrics, RequestMetrics
from erniem_batch.serve.receive import OnlyTheBody
from erniem_batch.terminal import PrintableFilter

HTTP_CPUS = 0.5
# More than this waits for a replica, and the proxy says to come again.
MAX_QUEUED_REQUESTS = 1024
RETRY_AFTER_S = 1.0
# How long the deployment that speaks HTTP waits for one of a model, before it asks anew.
ASK_AGAIN_S = 30.0
HEALTH_PERIOD_S = 5
HEALTH_TIMEOUT_S = 30
# How often a replica that ends looks whether it is done.
DRAIN_PERIOD_S = 0.5
# Beyond our own deadline: until then the proxy waits, and a replica that ends finishes its work.
GRACE_S = 10.0
# A forward pass asks for Python's lock at each of its steps. So long it waits where the event loop
# has it; Python's own 5 ms are longer than most steps.
SWITCH_S = 0.0005
# No replica of a model answers.
UNAVAILABLE = Refusal(503, "unavailable", "the model is being (re)started: ask again", None, 5.0)

logger = logging.getLogger(__name__)


class MeteredEngine(Engine):
    """An engine that tells Prometheus."""

    async def start(self) -> None:
        sys.setswitchinterval(SWITCH_S)
        budgets = {task: predictor.max_batch_tokens for task, predictor in self.predictors.items()}
        self._trimmer = Trimmer()
        self.on_batch = self._metrics = BatchMetrics(self.config.name, await self.card(), budgets)
        await super().start()
        keep_for_good()

    def check(self) -> None:
        # Serve asks every few seconds: what waits is told even when no pass runs any more.
        self._metrics.tell_models()
        for task, batcher in self._batchers.items():
            self._metrics.set_waiting(task, batcher.n_waiting_tokens)
        self._threads.submit(self._trimmer)
        super().check()


class ModelServer:
    """A deployment that holds a model; others ask it by a handle."""

    async def __init__(self, config: ModelConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        configure_replica_logging()
        listen_as_told(0)
        self._engine = await asyncio.to_thread(MeteredEngine.load, config)
        await self._engine.start()

    async def answer(self, ask: Ask) -> Served | Refusal:
        """What a request gets."""
        return await self._engine.answer(ask)

    async def card(self) -> dict[str, Any]:
        """`messages.ModelCard`."""
        return await self._engine.card()

    async def problem(self) -> str | None:
        """What is wrong with it."""
        return await self._engine.problem()

    def check_health(self) -> None:
        """Raises an EngineError if this process is to be replaced."""
        self._engine.check()

    async def __del__(self) -> None:
        if hasattr(self, "_engine"):
            await self._engine.close()


class RemoteEngine:
    """An engine in another process, by its handle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def start(self) -> None:
        """Waits until one of its replicas is ready. A question that got lost is asked again."""
        while True:
            try:
                async with asyncio.timeout(ASK_AGAIN_S):
                    await self.card()
                    return
            except TimeoutError:
                logger.warning("no replica is ready deployment=%s", self._handle.deployment_name)

    async def close(self) -> None:
        """It ends by itself."""

    async def answer(self, ask: Ask) -> Served | Refusal:
        """What a request gets. A replica that dies meanwhile is asked once more, or another."""
        for _ in range(2):
            try:
                answer: Served | Refusal = await self._handle.answer.remote(ask)
                return answer
            except BackPressureError:
                message = "too many requests wait for a replica: ask again"
                return Refusal(429, "queue_full", message, retry_after=RETRY_AFTER_S)
            except (RayActorError, DeploymentUnavailableError):
                continue
        return UNAVAILABLE

    async def card(self) -> dict[str, Any]:
        """`messages.ModelCard`.

        Raises:
            Refuse: there is no replica to ask.
        """
        try:
            card: dict[str, Any] = await self._handle.card.remote()
        except (RayActorError, DeploymentUnavailableError, BackPressureError):
            raise Refuse(UNAVAILABLE) from None
        return card

    async def problem(self) -> str | None:
        """What is wrong with one of its replicas, or that none answers."""
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                problem: str | None = await self._handle.problem.remote()
                return problem
        except BackPressureError:
            return None  # it has much to do
        except TimeoutError:
            return "no replica answers"
        except (RayActorError, DeploymentUnavailableError) as error:
            return type(error).__name__


class HttpServer:
    """The deployment that speaks HTTP, with its one model or with handles to several.

    Args:
        models: by name; a config for a model of its own.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: AppConfig, models: Mapping[str, ModelConfig | DeploymentHandle]
    ) -> None:
        configure_replica_logging()
        listen_as_told(_n_replicas(models))
        self._config = config
        self._own: list[Engine] = []
        self._backends: dict[str, Engine | RemoteEngine] = {}
        for name, model in models.items():
            if isinstance(model, ModelConfig):
                engine = await asyncio.to_thread(MeteredEngine.load, model)
                self._own.append(engine)
                self._backends[name] = engine
            else:
                self._backends[name] = RemoteEngine(model)

    def __serve_build_asgi_app__(self) -> FastAPI:
        # Serve runs its lifespan, which starts the engines, before it calls the replica ready.
        api = make_api(self._config, self._backends, RequestMetrics())
        api.add_middleware(OnlyTheBody)
        api.openapi()  # made once, and not when the first client asks while others wait
        return api

    def check_health(self) -> None:
        """Raises an EngineError if this process is to be replaced."""
        for engine in self._own:
            engine.check()


def _n_replicas(models: Mapping[str, ModelConfig | DeploymentHandle]) -> int:
    """How many replicas the deployment that speaks HTTP may have."""
    own = [model.most_replicas for model in models.values() if isinstance(model, ModelConfig)]
    return max(own, default=1)


def app(args: AppConfig) -> serve.Application:
    """The service as Ray Serve runs it.

    Example:
        serve run erniem_batch.serve:app model=demo tasks=ner,classify
    """
    models = {model.name: model for model in args.all_models}
    if len(models) == 1:
        (only,) = models.values()
        server = serve.deployment(serve.ingress()(HttpServer), **_options("http", args, only))
        return server.bind(args, models)
    handles = {
        name: serve.deployment(ModelServer, **_options(name, args, model)).bind(model)
        for name, model in models.items()
    }
    # The models' settings are theirs alone: where one changes, the others go on.
    front = args.model_copy(update={"models": ()})
    server = serve.deployment(serve.ingress()(HttpServer), **_options("http", args, None))
    return server.bind(front, handles)


def _options(name: str, args: AppConfig, model: ModelConfig | None) -> dict[str, Any]:
    """Of a deployment; without model it is only there to speak HTTP."""
    options: dict[str, Any] = {
        "name": name,
        "ray_actor_options": {"num_cpus": HTTP_CPUS},
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "max_queued_requests": MAX_QUEUED_REQUESTS,
        "backpressure_config": {"status_code": 429, "retry_after_s": RETRY_AFTER_S},
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        "graceful_shutdown_wait_loop_s": DRAIN_PERIOD_S,
        "graceful_shutdown_timeout_s": args.request_timeout_s + GRACE_S,
    }
    if "max_surge_percent" in inspect.signature(serve.deployment).parameters:
        # A new model is loaded and ready before the old one goes.
        options["max_surge_percent"] = 100
    if model is None:
        return options
    options["ray_actor_options"] = {"num_cpus": model.num_cpus, "num_gpus": model.num_gpus}
    if isinstance(model.replicas, Autoscaling):
        options["autoscaling_config"] = model.replicas.model_dump()
    else:
        options["num_replicas"] = model.replicas
    return options


def configure_replica_logging() -> None:
    """Our lines go where Serve's go."""
    package = logging.getLogger("erniem_batch")
    package.handlers[:] = logging.getLogger("ray.serve").handlers
    for handler in package.handlers:
        if not any(isinstance(one, PrintableFilter) for one in handler.filters):
            handler.addFilter(PrintableFilter())
    package.setLevel(logging.INFO)
    package.propagate = False
