"""One Ray for all tests of this folder, a small model, and object stores."""

import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import stores
from fakes import tag_here


@pytest.fixture(scope="session")
def local_ray(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """A Ray of this process, which jobs then use instead of one of their own: starting it is slow.

    Without authentication: it listens on this machine only, and leaves no token file behind. Object
    stores, where there are any, come first: actors learn of them from their environment.
    """
    for store in ("s3", "gs"):
        with suppress(pytest.skip.Exception):
            request.getfixturevalue(store)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "disabled")
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv("ERNIEM_BATCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        # Actors find the package and tests/fakes.py as we do.
        tests = Path(__file__).parents[1]
        folders = [str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")]
        environment.setenv("PYTHONPATH", os.pathsep.join(filter(None, folders)))
        import ray

        ray.init(
            address="local",
            num_cpus=2,  # so that two actors take every CPU: with them the job must not stand still
            include_dashboard=False,
            object_store_memory=128 << 20,
            _node_ip_address="127.0.0.1",
            logging_level="warning",
            log_to_driver=False,
        )
        yield
        ray.shutdown()


@pytest.fixture(params=["here", pytest.param("ray", marks=pytest.mark.slow)])
def workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who tags units, where a test is about what comes before and after: this process, which saves
    the start of actors for each run, or actors as always.
    """
    if request.param == "ray":
        request.getfixturevalue("local_ray")
    else:
        tag_here(monkeypatch)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[stores.Store]:
    """An S3 server, and the environment variables by which this process and its children find it.

    Processes that are already running do not: ask for it before `local_ray`.
    """
    yield from _store(stores.seaweedfs, tmp_path_factory)


@pytest.fixture(scope="session")
def gs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[stores.Store]:
    """The same for Google Cloud Storage."""
    yield from _store(stores.fake_gcs, tmp_path_factory)


@pytest.fixture(scope="session")
def az(tmp_path_factory: pytest.TempPathFactory) -> Iterator[stores.Store]:
    """The same for Azure."""
    yield from _store(stores.azurite, tmp_path_factory)


def _store(start: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[stores.Store]:
    with ExitStack() as stack:
        try:
            store = stack.enter_context(start(tmp_path_factory.mktemp("store") / "files"))
        except stores.Missing as error:
            pytest.skip(str(error))
        yield store


@pytest.fixture
def s3_folder(s3: stores.Store) -> str:
    """A new, empty folder in S3."""
    return s3.url(uuid.uuid4().hex)


@pytest.fixture
def gs_folder(gs: stores.Store) -> str:
    """A new, empty folder in Google Cloud Storage."""
    return gs.url(uuid.uuid4().hex)


@pytest.fixture
def az_folder(az: stores.Store) -> str:
    """A new, empty folder in Azure."""
    return az.url(uuid.uuid4().hex)
