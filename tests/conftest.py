"""What all tests share: small models, the small tokenizer, and the optional reference data.

Nothing here needs more than this repository; tests that take `shared_dir` go deeper where the
reference data lie beside it, and are skipped elsewhere.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import ner_config, save_tiny_ner_model, tag_here
from xdist.scheduler import LoadScopeScheduling

from erniem_batch import ErnieMConfig, ErnieMTokenizer
from erniem_batch.job import JobConfig, replay_job, run_job
from erniem_batch.job.actor import UnitTagger

DATA = Path(__file__).parent / "data"


def pytest_configure() -> None:
    torch.set_num_threads(1)


# They may run beside those that share a Ray.
WITH_SERVERS_OF_THEIR_OWN = (
    "test_observability.py",
    "test_serve_hostile.py",
    "test_submit.py",
    "test_training.py",
)


class ByCost(LoadScopeScheduling):
    """Which tests stay together in one of the two processes: those of a file; and all that start
    Ray and object stores, or make the models of the XLM-R oracle.
    """

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        if path.endswith(WITH_SERVERS_OF_THEIR_OWN):
            return path
        if "/fault/" in path or "/integration/" in path:
            return "servers"
        return "xlmr" if path.endswith(("test_pipelines.py", "test_xlmr_oracle.py")) else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByCost:
    return ByCost(config, log)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    return DATA


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Reference data too large for this repository, in a folder `shared` beside it."""
    folder = Path(__file__).parents[2] / "shared"
    if not (folder / "golden").is_dir():
        pytest.skip("no reference data in ../shared")
    return folder


@pytest.fixture(scope="session")
def tokenizer_dir() -> Path:
    return DATA / "tiny_tokenizer"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> ErnieMTokenizer:
    """8,002 tokens; behaves as in transformers."""
    return ErnieMTokenizer.from_pretrained(tokenizer_dir)


@pytest.fixture(scope="session")
def tiny_config() -> ErnieMConfig:
    return ErnieMConfig(
        vocab_size=120,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=66,
        initializer_range=0.25,
    )


@pytest.fixture
def random_model(tiny_config: ErnieMConfig) -> Callable[..., Any]:
    """Makes a model whose biases, norms and padding row are random too, so that mix-ups show."""

    def make(cls: type[torch.nn.Module], config: ErnieMConfig = tiny_config, **options: Any) -> Any:
        generator = torch.Generator().manual_seed(7)
        model = cls(config, **options).eval()
        for parameter in model.parameters():
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.data += 1.0
        return model

    return make


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three sequences of 12, 7 and 3 tokens, padded with 1; 0 first, 2 last, as in real ones."""
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.ones(3, 12, dtype=torch.long)
    for row, length in enumerate((12, 7, 3)):
        input_ids[row, :length] = torch.randint(3, 120, (length,), generator=generator)
        input_ids[row, 0], input_ids[row, length - 1] = 0, 2
    return {"input_ids": input_ids, "attention_mask": (input_ids != 1).long()}


@pytest.fixture(scope="session")
def ner_model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: ErnieMTokenizer) -> Path:
    """A folder with a tiny random model for token classification."""
    return save_tiny_ner_model(tmp_path_factory.mktemp("model"), tokenizer)


@pytest.fixture
def job(tmp_path: Path, ner_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a job over tmp_path/in without Ray; `units` kills it after so many."""

    def call(
        tagger: type[UnitTagger] | None = None,
        units: int | None = None,
        replay: bool = False,
        **options: Any,
    ) -> Any:
        done = tag_here(monkeypatch, tagger=tagger, until=units)
        if replay:
            return replay_job(options.pop("output", str(tmp_path / "out")), options), done
        values = {"input": [str(tmp_path / "in")], "output": str(tmp_path / "out")}
        values |= {"model": str(ner_model_dir), "window_tokens": 64, "overlap_tokens": 16}
        return run_job(ner_config(JobConfig, **{**values, **options})), done

    return call
