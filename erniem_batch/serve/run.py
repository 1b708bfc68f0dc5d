"""`erniem-batch serve`: the service on this machine, or on a cluster, from one command."""

import math
import os
import signal
import socket
import threading
from collections.abc import Callable

from rich.console import Console

from erniem_batch.errors import ConfigError
from erniem_batch.job.cluster import SPARE_CPUS, connect_to
from erniem_batch.serve.flags import ServeFlags
from erniem_batch.serve.tokens import allowed_hashes

NAME = "erniem-batch"


def serve(flags: ServeFlags, until: Callable[[], object] | None = None) -> None:
    """Serves until it is told to end (Ctrl-C or SIGTERM), and finishes what was accepted.

    Args:
        until: waits for the end; None: for a signal.

    Raises:
        ConfigError: the settings are impossible, or the port is taken.
    """
    cores = os.cpu_count() or 1
    config = flags.app_config(cores)
    allowed_hashes(config)  # said now, not by a replica later
    # One event loop in a replica instead of three. Ours is always free, which Serve does not trust
    # it to be; a lonely request is answered some milliseconds earlier. Read when Ray starts.
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
    # That opens a port of each replica for load balancers, and a replica that ends would give them
    # half a minute to notice. There are none, so the end need not wait.
    os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "0")
    if flags.address is None and "RAY_ADDRESS" not in os.environ:
        require_free(flags.host, flags.port)
    cpus = sum(model.num_cpus for model in config.all_models)
    is_local = connect_to(
        flags.address, max(cores, math.ceil(cpus)) + SPARE_CPUS, flags.metrics_port
    )
    import ray
    from ray import serve as ray_serve
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    from erniem_batch.serve.deployments import GRACE_S, app

    ended = threading.Event()
    if until is None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        until = ended.wait
    log = LoggingConfig(log_level="WARNING", enable_access_log=flags.access_log)
    console = Console(stderr=True)
    with console.status("loading the model …"):
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
        ray_serve.run(app(config), name=NAME, route_prefix="/", logging_config=log)
    scheme = "https" if flags.tls_cert else "http"
    console.print(f"serving {', '.join(m.name for m in config.all_models)}", highlight=False)
    console.print(f"  page     {scheme}://{flags.host}:{flags.port}/")
    console.print(f"  API      {scheme}://{flags.host}:{flags.port}/docs")
    if is_local:
        node = next(node for node in ray.nodes() if node["Alive"])
        console.print(f"  metrics  http://127.0.0.1:{node['MetricsExportPort']}/metrics")
    console.print("end with Ctrl-C")
    try:
        until()
    finally:
        console.print("finishing what was accepted …")
        try:
            ray_serve.delete(NAME)
        except TimeoutError:  # Serve waits a minute; a request may have taken longer
            console.print("gave up waiting for the last requests")
        finally:
            if is_local:
                ray_serve.shutdown()
                ray.shutdown()


def require_free(host: str, port: int) -> None:
    """Raises a ConfigError if somebody listens there.

    Ray would find out late, or not at all: its proxies share a port with those of another Ray.
    """
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise ConfigError(
            f"port {port} of {host} cannot be used ({error.strerror}): end what listens there, or "
            f"give another --port"
        ) from None
