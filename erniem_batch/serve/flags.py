"""The flags of `erniem-batch serve`; without pydantic and Ray, which help texts do not need."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from cyclopts import Parameter

from erniem_batch import storage
from erniem_batch.config import DEMO
from erniem_batch.errors import ConfigError

if TYPE_CHECKING:
    from erniem_batch.serve.config import AppConfig


@dataclass(frozen=True, kw_only=True)
class ServeFlags:
    """A service from the command line.

    Args:
        model: Model folder, its URL, hf://org/name of the Hugging Face Hub, or "demo";
            or the output of a training of several tasks.
        tasks: What to serve, comma-separated. Default: all that the model can.
        config: YAML file with all settings (those of `args` in deploy/serve.yaml): several models,
            options, autoscaling. Instead of --model, --tasks and the numbers of CPUs and GPUs.
        host: Address to listen on. Others than this machine only reach 0.0.0.0 or its own address;
            give --tokens-file and --tls-cert then.
        port: Port to listen on.
        direct_port: Port on which the replica itself listens too, for the same API without Ray's
            proxy between: some ten milliseconds less a request. Of several replicas each has the
            next one. For a local Ray. Default: none.
        num_cpus: CPUs (and threads) of a replica. Default: all of this machine on four cores or
            fewer, else 4.
        num_gpus: GPUs of a replica.
        tokens_file: File with the hashes of bearer tokens that are let in, as `erniem-batch token`
            makes them.
        allowed_host: Name by which clients may call the service when there are no tokens, besides
            localhost and the address it listens on; *.example.org for all names below. Repeatable.
        tls_cert: Certificate (PEM), for https.
        tls_key: Its key (PEM).
        metrics_port: Port of the Prometheus metrics on a local Ray. Default: any, shown at start.
        access_log: Log every request: method, path, status and time.
        address: Ray cluster to use. Default: a local one, for as long as the service runs.
    """

    model: str = DEMO
    tasks: str | None = None
    config: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    direct_port: int | None = None
    num_cpus: int | None = None
    num_gpus: float = 0.0
    tokens_file: str | None = None
    allowed_host: Annotated[tuple[str, ...], Parameter(negative=())] = ()
    tls_cert: str | None = None
    tls_key: str | None = None
    metrics_port: int | None = None
    access_log: Annotated[bool, Parameter(negative=())] = False
    address: str | None = None

    def app_config(self, cores: int) -> "AppConfig":
        """The settings of the service.

        Raises:
            ConfigError: they are impossible, or said twice.
        """
        from erniem_batch.model.fetch import marked_as_path
        from erniem_batch.serve.config import app_config

        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("--tls-cert and --tls-key go together")
        values: dict[str, Any] = {}
        if self.tokens_file is not None:
            values["tokens_file"] = self.tokens_file
        if self.config is not None:
            if self.model != DEMO or self.tasks or self.num_cpus or self.num_gpus:
                raise ConfigError("--config says all of --model, --tasks, --num-cpus, --num-gpus")
            return self._with_hosts(app_config(_read(self.config) | values))
        cpus = self.num_cpus or (1 if self.num_gpus else min(cores, 4))
        values |= {"model": marked_as_path(self.model), "num_cpus": cpus, "num_gpus": self.num_gpus}
        return self._with_hosts(app_config(values | ({"tasks": self.tasks} if self.tasks else {})))

    def _with_hosts(self, config: "AppConfig") -> "AppConfig":
        """The same settings, with the hosts of the flags."""
        from erniem_batch.serve.config import app_config

        if not self.allowed_host:
            return config
        values = config.model_dump(exclude_unset=True)
        return app_config(values | {"allowed_hosts": (*config.allowed_hosts, *self.allowed_host)})


def _read(path: str) -> dict[str, Any]:
    data = storage.read(storage.normal(path))
    if data is None:
        raise ConfigError(f"--config: there is no file {path}")
    try:
        values = yaml.safe_load(data)
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: expected a mapping of settings")
    return values
