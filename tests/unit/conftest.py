"""What the unit tests of predictor, tasks and job share."""

from pathlib import Path

import pytest
from fakes import save_tiny_service

from erniem_batch import ErnieMTokenizer
from erniem_batch.config import PredictorConfig
from erniem_batch.predictor import Predictor


@pytest.fixture(scope="session")
def predictor(ner_model_dir: Path) -> Predictor:
    """Short windows, so that short texts need several."""
    return Predictor.load(
        PredictorConfig(
            model=str(ner_model_dir),
            window_tokens=32,
            overlap_tokens=8,
            max_batch_tokens=128,
            device="cpu",
            n_threads=1,
        )
    )


@pytest.fixture(scope="session")
def service_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: ErnieMTokenizer) -> Path:
    """A folder with tiny random models for all tasks, to be served together."""
    return save_tiny_service(tmp_path_factory.mktemp("service"), tokenizer)
