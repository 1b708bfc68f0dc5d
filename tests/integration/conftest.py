"""One Ray for all tests of this folder, and a small model."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import save_tiny_ner_model

from erniem_batch import ErnieMTokenizer


@pytest.fixture(scope="session")
def ner_model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: ErnieMTokenizer) -> Path:
    """A folder with a tiny random model for token classification."""
    return save_tiny_ner_model(tmp_path_factory.mktemp("model"), tokenizer)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray of this process, which jobs then use instead of one of their own: starting it is slow.

    Without authentication: it listens on this machine only, and leaves no token file behind.
    """
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "disabled")
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
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
