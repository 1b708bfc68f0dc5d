"""What the unit tests of predictor, tasks and job share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import Calls, Killed, ner_config, save_tiny_ner_model, save_tiny_service

from erniem_batch import ErnieMTokenizer
from erniem_batch.config import PredictorConfig
from erniem_batch.job import JobConfig, replay_job, run, run_job
from erniem_batch.job.actor import UnitTagger
from erniem_batch.job.units import from_table
from erniem_batch.predictor import Predictor


@pytest.fixture(scope="session")
def ner_model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: ErnieMTokenizer) -> Path:
    """A folder with a tiny random model for token classification."""
    return save_tiny_ner_model(tmp_path_factory.mktemp("model"), tokenizer)


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


@pytest.fixture
def job(tmp_path: Path, ner_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a job over tmp_path/in without Ray; `units` kills it after so many."""

    def call(
        tagger: type[UnitTagger] = UnitTagger,
        units: int | None = None,
        replay: bool = False,
        **options: Any,
    ) -> Any:
        done: list[Any] = []

        def tag_units(
            folder: Any, info: Any, todo: Any, assignment: Any, lease: Any, on_receipt: Any
        ) -> run.Work:
            made = tagger(assignment, Calls())
            run.unmark_success(folder.output)
            for unit in from_table(todo):
                if len(done) == units:
                    raise Killed
                done.append(made.tag(unit))
            lease.check()
            return run.Work(done)

        monkeypatch.setattr(run, "tag_units", tag_units)
        if replay:
            return replay_job(str(tmp_path / "out"), options), done
        values = {"input": [str(tmp_path / "in")], "output": str(tmp_path / "out")}
        values |= {"model": str(ner_model_dir), "window_tokens": 64, "overlap_tokens": 16}
        return run_job(ner_config(JobConfig, **{**values, **options})), done

    return call
