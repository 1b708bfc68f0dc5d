"""Training as its user starts it: on Ray, killed and taken up again, on several workers, to S3."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import save_tiny_model, write_jsonl
from fault.runs import Process, below, processes
from safetensors.torch import load, load_file

from erniem_batch import ErnieMTokenizer, cli, storage
from erniem_batch.config import PredictorConfig
from erniem_batch.model.fetch import local_folder
from erniem_batch.options import ClassifyOptions
from erniem_batch.predictor import Predictor
from erniem_batch.records import Prediction, Record
from erniem_batch.train import run
from erniem_batch.train.export import CURVE, HISTORY

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
N_ROWS = 90
MEASUREMENTS = 4
TIMEOUT_S = 240
GONE_S = 2  # the agents of a Ray that was killed stay for minutes
OUTPUT = {"encoder", "classify", "ner", HISTORY, CURVE, run.DONE}
KINDS = {"sports": "ball team goal", "weather": "rain sun wind", "music": "song band drum"}

Command = Callable[..., tuple[int, Any, str]]


@pytest.fixture(scope="module", autouse=True)
def soon() -> Iterator[None]:
    """Ray looks at its workers more often than every two seconds, for which they wait."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: ErnieMTokenizer) -> Path:
    """A tiny random model to start from, with dropout."""
    return save_tiny_model(
        tmp_path_factory.mktemp("models") / "start",
        tokenizer,
        "ErnieMForTokenClassification",
        hidden_size=16,
        max_position_embeddings=130,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two tasks."""
    folder = tmp_path_factory.mktemp("data")
    kinds = [list(KINDS)[i % 3] for i in range(N_ROWS)]
    texts = [f"{KINDS[kind]} of day {i}" + " and so on" * (i % 4) for i, kind in enumerate(kinds)]
    topics, names = [], []
    for i, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
        spans = [[0, len(KINDS[kind].split()[0]), kind.upper()]]
        topics.append({"id": str(i), "text": text, "label": kind})
        names.append({"id": str(i), "text": text, "spans": spans})
    write_jsonl(folder / "classify.jsonl", topics)
    write_jsonl(folder / "ner.jsonl", names)
    return folder


def _arguments(model: Path, data: Path, output: str | Path, **changes: Any) -> list[str]:
    flags = {
        "model": model,
        "output": output,
        "train": [f"{task}={data / f'{task}.jsonl'}" for task in ("classify", "ner")],
        "max_length": 64,
        "max_batch_tokens": 128,
        "learning_rate": 0.003,
        "epochs": 1,
        "evaluations": MEASUREMENTS,
        "num_cpus_per_worker": 1,
        **changes,
    }
    arguments = ["finetune"]
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value]
        arguments += ["--" + name.replace("_", "-"), *map(str, values)]
    return arguments


@pytest.fixture
def command(local_ray, model, data, capsys, monkeypatch) -> Command:
    """Runs one command on the Ray of this process: exit code, report, and what went to stderr."""
    monkeypatch.setattr(cli, "configure_logging", lambda *_: None)  # its handler outlives the test

    def finetune(output: str | Path, **flags: Any) -> tuple[int, Any, str]:
        code = cli.main(_arguments(model, data, output, **flags))
        said = capsys.readouterr()
        return code, json.loads(said.out) if said.out else None, said.err

    return finetune


@pytest.fixture(scope="module")
def straight(local_ray, model, data, tmp_path_factory) -> Path:
    """The output of one worker that nothing interrupted, with two passes a step."""
    output = tmp_path_factory.mktemp("straight") / "out"
    assert cli.main(_arguments(model, data, output, accumulate=2)) == 0
    return output


def _history(output: Path) -> list[dict[str, float]]:
    found: list[dict[str, float]] = json.loads((output / HISTORY).read_text())
    return found


def _n_measured(output: Path) -> int:
    return len(_history(output)) if (output / HISTORY).exists() else 0


def _has_checkpoint(output: Path) -> bool:
    """Whether Ray Train would go on from one."""
    return any("checkpoint_2" in x.read_text() for x in output.rglob("checkpoint_manager_*.json"))


def _require_same_figures(ours: Path, theirs: Path, tolerance: float) -> None:
    assert len(_history(ours)) == len(_history(theirs)) == MEASUREMENTS
    for one, other in zip(_history(ours), _history(theirs), strict=True):
        assert one == pytest.approx(other, abs=tolerance)


def _weights(output: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.name}/{name}": tensor
        for path in sorted(output.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


# ---- killed -----------------------------------------------------------------------------------


class Started:
    """The command in a process of its own, with a Ray of its own; ends all it has started."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_A")}
        environment["PYTHONPATH"] = str(ROOT)
        self.log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "erniem_batch.cli", *arguments],
                stdout=file, stderr=file, stdin=subprocess.DEVNULL, cwd=ROOT, env=environment,
                start_new_session=True,
            )  # fmt: skip
        self._known: dict[int, Process] = {}

    def wait_for(self, is_done: Callable[[], bool]) -> None:
        """Until it is, or the command has ended."""
        deadline = time.monotonic() + TIMEOUT_S
        while not is_done() and self._process.poll() is None:
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)

    def kill(self) -> list[str]:
        """The driver and its workers, at once; gives the names of the workers."""
        mine = below(self._process.pid)
        self._known |= {process.pid: process for process in mine}
        workers = [p for p in mine if "RayTrainWorker" in p.command]
        for pid in (self._process.pid, *(worker.pid for worker in workers)):
            os.kill(pid, signal.SIGKILL)
        self._process.wait()
        return [worker.command for worker in workers]

    def wait(self) -> int:
        return self._process.wait(TIMEOUT_S)

    def end(self) -> None:
        if self._process.poll() is None:
            self.kill()
        deadline = time.monotonic() + GONE_S
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _left(self) -> list[int]:
        there = processes()
        return [
            pid
            for pid, known in self._known.items()
            if pid in there and there[pid].started == known.started
        ]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[list[str]], Started]]:
    """Starts commands, and ends them with the test."""
    started: list[Started] = []

    def begin(arguments: list[str]) -> Started:
        started.append(Started(arguments, tmp_path / f"log-{len(started)}"))
        return started[-1]

    yield begin
    for command in started:
        command.end()


@pytest.mark.slow
def test_a_killed_training_goes_on(tmp_path, straight, model, data, start):
    """The same figures and weights as those of a training that nobody killed."""
    output = tmp_path / "out"
    arguments = _arguments(model, data, output, accumulate=2)
    first = start(arguments)
    first.wait_for(lambda: _n_measured(output) >= 2 and _has_checkpoint(output))
    assert first.kill(), "it had workers"
    assert 2 <= _n_measured(output) < MEASUREMENTS, first.log.read_text()
    assert not (output / run.DONE).exists()
    assert not (output / "encoder").exists()
    assert (output / run.SETTINGS).exists()

    again = start(arguments)
    assert again.wait() == 0, again.log.read_text()
    said = again.log.read_text()
    assert "going on with an interrupted training" in said
    assert "going on from step=" in said
    assert said.count("measured step=") < MEASUREMENTS
    assert "Traceback" not in said
    _require_same_figures(output, straight, 1e-6)
    ours, theirs = _weights(output), _weights(straight)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=0, msg=name)
    report = json.loads(said.splitlines()[-1])
    assert report["steps"] == _history(straight)[-1]["step"] > 10
    assert report["tasks"] == ["classify", "ner"]
    assert not (output / run.RUN).exists()


# ---- workers ----------------------------------------------------------------------------------


def test_one_worker(straight, command):
    """Who computes is no setting: for another number of them it is complete already."""
    assert {path.name for path in straight.iterdir()} == OUTPUT | {"_run"}  # with the lease
    assert _n_measured(straight) > 1
    code, report, _ = command(straight, workers=2, accumulate=1)
    assert (code, report["curve"]) == (0, str(straight / CURVE))


@pytest.mark.slow  # tests/unit has two processes without Ray
def test_two_workers_are_as_good_as_one(tmp_path, straight, command):
    output = tmp_path / "out"
    code, report, error = command(output, workers=2, accumulate=1)
    assert code == 0, error
    _require_same_figures(output, straight, 1e-5)
    ours, theirs = _weights(output), _weights(straight)
    assert ours.keys() == theirs.keys()
    assert all((tensor - theirs[name]).abs().max() < 1e-3 for name, tensor in ours.items())
    assert report["curve"] == str(output / CURVE)
    assert {path.name for path in output.iterdir()} == OUTPUT
    # Who computes is no setting: for one worker it is the same training, and complete.
    code, same, _ = command(output, workers=1, accumulate=2)
    assert (code, same) == (0, report)


@pytest.mark.slow  # tests/unit has the mistakes themselves
def test_a_mistake_that_only_workers_find(tmp_path, command):
    """It ends the run at once, and mended, the command may use the same output."""
    output = tmp_path / "out"
    flags = {"workers": 2, "max_steps": 2, "evaluations": 1}
    code, report, error = command(output, oversample="classify:*=0", **flags)
    assert (code, report) == (2, None)
    assert "error: classify: --epochs and --oversample leave nothing to train on" in error
    assert "Traceback" not in error
    assert not [path for path in output.rglob("*") if path.is_file()]
    code, report, error = command(output, **flags)
    assert (code, report["steps"]) == (0, 2), error


# ---- elsewhere --------------------------------------------------------------------------------


@pytest.mark.slow
def test_to_object_storage(s3_folder, command, data):
    """Data from there, the model to there, and from there into a predictor."""
    storage.write(f"{s3_folder}/in/rows.jsonl", (data / "classify.jsonl").read_bytes())
    output = f"{s3_folder}/out"
    flags = {"epochs": 4, "storage": "float16", "learning_rate": 0.01, "evaluations": 1}
    code, report, error = command(output, task="classify", train=f"{s3_folder}/in", **flags)
    assert code == 0, error
    assert report["score"] > 0.8
    names = {info.path.removeprefix(f"{output}/") for info in storage.find(output)}
    assert {"config.json", "model.safetensors", HISTORY, CURVE, run.DONE} <= names
    assert not [name for name in names if name.startswith(run.RUN)]
    weights = load(storage.read(f"{output}/model.safetensors"))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    folder = local_folder(output, "classify")
    assert not {path.name for path in folder.iterdir()} & {HISTORY, CURVE, run.DONE}
    predictor = Predictor.load(
        PredictorConfig(
            model=output, options=ClassifyOptions(), window_tokens=64, overlap_tokens=16,
            device="cpu", n_threads=1,
        )
    )  # fmt: skip
    outcomes = predictor.predict([Record(kind, f"{KINDS[kind]} of day 7") for kind in KINDS])
    assert all(isinstance(outcome, Prediction) for outcome in outcomes)
    assert [outcome.value[0].label for outcome in outcomes] == list(KINDS)
