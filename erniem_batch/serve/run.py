"""`erniem-batch serve`: the service on this machine, or on a cluster, from one command."""

import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

from rich.console import Console

from erniem_batch import stopping
from erniem_batch.errors import ConfigError
from erniem_batch.job.cluster import SPARE_CPUS, connect_to
from erniem_batch.serve.config import AppConfig
from erniem_batch.serve.flags import ServeFlags
from erniem_batch.serve.hosts import is_address
from erniem_batch.serve.tokens import allowed_hashes, hashes_of_environment
from erniem_batch.terminal import safe_markup

NAME = "erniem-batch"
# For so many replicas.
DIRECT_PORTS = 1000

# For --access-log: lines come here at once, each of them. Ray would write them to files of its
# own, after a while, and leave out those that look alike.
ACCESS_LOG = {
    "RAY_SERVE_LOG_TO_STDERR": "1",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
    "RAY_DEDUP_LOGS": "0",
    "ERNIEM_BATCH_ACCESS_LOG": "1",
}


def serve(flags: ServeFlags, until: Callable[[], object] | None = None) -> None:
    """Serves until it is told to end (Ctrl-C or SIGTERM), and finishes what was accepted.

    Args:
        until: waits for the end; None: for a signal.

    Raises:
        ConfigError: the settings are impossible, or the port is taken.
    """
    cores = os.cpu_count() or 1
    config = flags.app_config(cores)
    config = _with_what_is_known_here(config, flags)
    if flags.address is None and "RAY_ADDRESS" not in os.environ:
        require_free("port", flags.host, flags.port)
        if flags.direct_port is not None:
            require_free("direct-port", flags.host, flags.direct_port)
    elif flags.direct_port is not None:
        raise ConfigError("--direct-port is for a Ray of its own, not for one that runs already")
    _set_environment(config, flags)
    cpus = sum(model.num_cpus for model in config.all_models)
    is_local = connect_to(
        flags.address, max(cores, math.ceil(cpus)) + SPARE_CPUS, flags.metrics_port
    )
    console = Console(stderr=True)
    with console.status("loading the model …"):
        _start(config, flags)
    with _told_to_end() if until is None else nullcontext(until) as wait:
        _tell(console, config, flags, is_local)
        try:
            wait()
        finally:
            _end(console, is_local)


def _set_environment(config: AppConfig, flags: ServeFlags) -> None:
    """What Ray Serve and our parts of its proxies read when they start."""
    os.environ.update(_settings_of_ray(flags.direct_port, os.environ))
    os.environ.update(config.body_limits.as_environment())
    if flags.access_log:
        os.environ.update(ACCESS_LOG)


def _start(config: AppConfig, flags: ServeFlags) -> None:
    """Start Serve and the application; return when the models are loaded."""
    from ray import serve as ray_serve
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    from erniem_batch.serve.deployments import GRACE_S, app

    log = LoggingConfig(log_level="WARNING", enable_access_log=flags.access_log)
    # Replicas alone tell of requests, and do so on the level of information.
    log_of_replicas = log.model_copy(update={"log_level": "INFO"}) if flags.access_log else log
    ray_serve.start(
        http_options=HTTPOptions(
            host=flags.host,
            port=flags.port,
            request_timeout_s=config.request_timeout_s + GRACE_S,
            ssl_certfile=flags.tls_cert,
            ssl_keyfile=flags.tls_key,
        ),
        logging_config=log,
    )
    ray_serve.run(app(config), name=NAME, route_prefix="/", logging_config=log_of_replicas)


def _tell(console: Console, config: AppConfig, flags: ServeFlags, is_local: bool) -> None:
    """Say what is served, and where."""
    import ray

    scheme = "https" if flags.tls_cert else "http"
    console.print(
        f"serving {safe_markup(', '.join(m.name for m in config.all_models))}", highlight=False
    )
    console.print(f"  page     {scheme}://{flags.host}:{flags.port}/")
    console.print(f"  API      {scheme}://{flags.host}:{flags.port}/docs")
    if flags.direct_port is not None:
        console.print(f"  direct   {scheme}://{flags.host}:{flags.direct_port}/")
    if is_local:
        node = next(node for node in ray.nodes() if node["Alive"])
        console.print(f"  metrics  http://127.0.0.1:{node['MetricsExportPort']}/metrics")
    console.print("end with Ctrl-C")


def _end(console: Console, is_local: bool) -> None:
    """Finish what was accepted; end a Ray that is our own."""
    import ray
    from ray import serve as ray_serve

    console.print("finishing what was accepted …")
    try:
        ray_serve.delete(NAME)
    except TimeoutError:  # Serve waits a minute; a request may have taken longer
        console.print("gave up waiting for the last requests")
    finally:
        if is_local:
            ray_serve.shutdown()
            ray.shutdown()


@contextmanager
def _told_to_end() -> Iterator[Callable[[], object]]:
    """A function that waits for a first signal. A Ctrl-C after it ends the process at once."""
    ended = threading.Event()

    def on_signal(number: int) -> None:
        if ended.is_set() and number == signal.SIGINT:
            stopping.finish(number)
        ended.set()

    with stopping.elsewhere(on_signal):
        yield ended.wait


def _with_what_is_known_here(config: AppConfig, flags: ServeFlags) -> AppConfig:
    """The same settings with what replicas, perhaps on other machines, cannot find out.

    Raises:
        ConfigError: the tokens are unusable; said now, not by a replica later.
    """
    hashes = allowed_hashes(config)
    changes: dict[str, object] = {}
    if here := hashes_of_environment():
        changes["tokens"] = tuple(dict.fromkeys([*config.tokens, *here]))
    if (config.allowed_hosts or not hashes) and not is_address(flags.host):
        changes["allowed_hosts"] = (*config.allowed_hosts, flags.host)
    return config.model_copy(update=changes)


def _settings_of_ray(direct_port: int | None, environment: Mapping[str, str]) -> dict[str, str]:
    """What Ray Serve is to read from the environment when it starts.

    Args:
        environment: wins over our defaults, but not over a flag.
    """
    defaults = {
        # One event loop in a replica instead of three. Ours is always free, which Serve does not
        # trust it to be; a lonely request is answered some milliseconds earlier.
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Belongs to it, but Ray 2.60 forgets the proxy: requests reach a replica by gRPC, which
        # costs both less than a call of an actor.
        "RAY_SERVE_PROXY_USE_GRPC": "1",
        # The proxy sends a small body along with its request, see serve/receive.py.
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": (
            "erniem_batch.serve.receive.middlewares_of_the_proxy"
        ),
        # Once a second the controller looks after its replicas, not ten times: on a machine that
        # computes with all cores that takes 3 % of them.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "1",
        # And the others add up their figures once a second; Ray tells them every ten.
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
        # That would open a port of each replica, whether or not somebody wants it.
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
        # Half a minute for load balancers to notice an end; there are none.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }
    settings = {name: environment.get(name, value) for name, value in defaults.items()}
    if direct_port is None:
        return settings
    return settings | {
        # The replica finds a free port itself, see serve/addresses.py: Ray's choice is but a try.
        "ERNIEM_BATCH_DIRECT_PORT": str(direct_port),
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(direct_port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(min(direct_port + DIRECT_PORTS, 65535)),
    }


def require_free(flag: str, host: str, port: int) -> None:
    """Raises a ConfigError if somebody listens there.

    Ray would find out late, or not at all: its proxies share a port with those of another Ray.
    """
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise ConfigError(
            f"port {port} of {host} cannot be used ({error.strerror}): end what listens there, or "
            f"give another --{flag}"
        ) from None
