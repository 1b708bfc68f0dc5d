"""What a service may be told: the same fields in YAML, on the command line and in Python."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from erniem_batch.config import DEMO, PredictorConfig, shares_weights
from erniem_batch.errors import ConfigError
from erniem_batch.options import TASKS, options_of
from erniem_batch.serve.body_limits import BodyLimits

TaskName = Literal["ner", "classify", "choose", "qa", "embed", "extract"]
Positive = Annotated[int, Field(ge=1)]
MAX_ONGOING_REQUESTS = 1024
QUEUE_TOKENS = 65_536
# A name, all names below one, an address, or any.
HOST = r"^(\*|(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*|[0-9a-fA-F:.]+)$"


class Strict(BaseModel):
    """A typo is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Autoscaling(Strict):
    """How many replicas, by how many requests each has at a time."""

    min_replicas: Annotated[int, Field(ge=0)] = 1
    max_replicas: Positive = 4
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 32
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is more than {self.max_replicas=}")
        return self


class ModelConfig(Strict):
    """One model: a deployment of its own, for one or several tasks.

    Attributes:
        name: by which requests ask for it.
        model: a model folder, its URL, hf://org/name of the Hugging Face Hub, or `demo`;
            or the output of a training of several tasks. What its heads have in common is held
            once.
        tasks: what it is to do; default: all that it can.
        options: for each task, instead of the defaults; requests may give others.
        window_tokens, overlap_tokens, max_batch_tokens, dtype, detect_language: see
            PredictorConfig.
        num_cpus, num_gpus: of a replica. Threads of a forward pass are num_cpus, rounded up.
        replicas: a number, or how it grows and shrinks.
        max_queue_tokens: that may wait at a replica, of short requests (up to 512 tokens) and of
            longer ones each; beyond it, requests are told to come again.
        max_request_tokens: of all windows that one request makes, follow-up questions included;
            larger requests are answered by 413. Default: max_queue_tokens, but at least 65,536.
        hang_s: a forward pass that takes longer means that the replica is replaced.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)] = DEMO
    model: str = DEMO
    tasks: tuple[TaskName, ...] = ()
    options: dict[TaskName, dict[str, Any]] = {}
    detect_language: bool = False
    window_tokens: Positive = PredictorConfig.window_tokens
    overlap_tokens: Annotated[int, Field(ge=0)] = PredictorConfig.overlap_tokens
    max_batch_tokens: Positive | None = None
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    num_cpus: Annotated[float, Field(ge=0)] = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0
    replicas: Positive | Autoscaling = 1
    max_queue_tokens: Positive = QUEUE_TOKENS
    max_request_tokens: Positive | None = None
    hang_s: Annotated[float, Field(gt=0)] = 300

    @field_validator("tasks", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _names(value)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for task in self.tasks or TASKS:
            self.predictor(task)  # checks itself
        return self

    @property
    def n_threads(self) -> int | None:
        """Of the forward passes of a replica; None: as torch likes."""
        return None if self.num_gpus else max(1, math.ceil(self.num_cpus))

    @property
    def request_tokens(self) -> int:
        """Limit of `max_request_tokens`, whether it was given or not."""
        return self.max_request_tokens or max(self.max_queue_tokens, QUEUE_TOKENS)

    @property
    def most_replicas(self) -> int:
        """Of those there may ever be."""
        replicas = self.replicas
        return replicas.max_replicas if isinstance(replicas, Autoscaling) else replicas

    def predictor(self, task: str) -> PredictorConfig:
        """What a predictor of this model for a task is told.

        Raises:
            ConfigError: no such option, or an impossible value.
        """
        return PredictorConfig(
            model=self.model,
            options=options_of(task, self.options.get(task, {})),  # type: ignore[call-overload]
            detect_language=self.detect_language,
            window_tokens=self.window_tokens,
            overlap_tokens=self.overlap_tokens,
            max_batch_tokens=self.max_batch_tokens,
            dtype=self.dtype,
            device="cuda" if self.num_gpus else "cpu",
            n_threads=self.n_threads,
            share_weights=shares_weights(self.most_replicas, self.n_threads or 1),
        )


class AppConfig(Strict):
    """A service.

    Attributes:
        model, tasks, num_cpus, num_gpus: of the only model; or
        models: several.
        request_timeout_s: after so long a request is answered by 504.
        max_body_bytes: larger requests are answered by 413.
        body_timeout_s: a request whose whole body does not arrive within so long is answered by
            408.
        max_total_body_bytes: memory of a proxy for the bodies of all its requests; beyond it, a
            request is answered by 503.
        max_items: of one request.
        max_values: JSON values of one request (numbers, texts, lists, objects …), counted before
            they are parsed. Above these limits and the next two, the answer is 413 as well.
        max_text_characters: of one text, after normalisation (NFKC), which makes some characters
            up to 18 times as long.
        max_characters: of all texts of a request, options and names included, counted likewise.
        tokens: SHA-256, in hex, of each bearer token that is let in. More come from the environment
            variable ERNIEM_BATCH_TOKENS and from `tokens_file`. Where none of the three is given,
            everybody is let in; one that is given but empty is an error.
        tokens_file: such hashes, one a line; what stands behind a hash, or
            behind a #, is a comment.
        allowed_hosts: names besides those of this machine by which clients without a token may call
            the service: `tags.example.org`, `*.example.org`, or `*` for any. Without tokens, other
            names are refused by 421; with tokens, only where this is given.
        cors_origins: web pages of other origins that may call.
        page: whether there is a page to try things at `/`.
    """

    model: str = DEMO
    tasks: tuple[TaskName, ...] = ()
    num_cpus: Annotated[float, Field(ge=0)] = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0
    models: tuple[ModelConfig, ...] = ()
    request_timeout_s: Annotated[float, Field(gt=0)] = 60
    max_body_bytes: Positive = 4 << 20
    body_timeout_s: Annotated[float, Field(gt=0)] = BodyLimits.timeout_s
    max_total_body_bytes: Positive = BodyLimits.total_bytes
    max_items: Positive = 1024
    max_values: Positive = 32_768
    max_text_characters: Positive = 262_144
    max_characters: Positive = 4 << 20
    tokens: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...] = ()
    tokens_file: Annotated[str, Field(min_length=1)] | None = None
    allowed_hosts: tuple[Annotated[str, Field(pattern=HOST)], ...] = ()
    cors_origins: tuple[str, ...] = ()
    page: bool = True

    @field_validator("tasks", "tokens", "allowed_hosts", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _names(value)

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [model.name for model in self.all_models]
        if len(set(names)) < len(names):
            raise ValueError(f"models: each needs a name of its own, got {', '.join(names)}")
        shorthand = {"model", "tasks", "num_cpus", "num_gpus"} & self.model_fields_set
        if self.models and shorthand:
            raise ValueError(f"{', '.join(sorted(shorthand))}: say it in models, where there are")
        if "tokens" in self.model_fields_set and not self.tokens:
            raise ValueError("tokens: is given but holds no hash; leave it out to let everybody in")
        return self

    @property
    def body_limits(self) -> BodyLimits:
        """What a proxy has to know of these settings."""
        return BodyLimits(
            timeout_s=self.body_timeout_s,
            max_bytes=self.max_body_bytes,
            total_bytes=self.max_total_body_bytes,
        )

    @property
    def all_models(self) -> tuple[ModelConfig, ...]:
        """`models`, or the only one."""
        name = DEMO if self.model == DEMO else "default"
        only = ModelConfig(
            name=name,
            model=self.model,
            tasks=self.tasks,
            num_cpus=self.num_cpus,
            num_gpus=self.num_gpus,
        )
        return self.models or (only,)


def _names(value: Any) -> Any:
    """`serve run … tasks=ner,classify` gives text."""
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    return value


def app_config(values: dict[str, Any]) -> AppConfig:
    """The settings of a service.

    Raises:
        ConfigError: names each field that is wrong.
    """
    try:
        return AppConfig.model_validate(values)
    except ValidationError as error:
        wrong = [
            f"{'.'.join(map(str, item['loc'])) or 'settings'}: {item['msg']}"
            for item in error.errors(include_url=False, include_input=False)
        ]
        raise ConfigError("; ".join(wrong)) from None
