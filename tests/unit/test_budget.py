"""The token budget that is found by trying."""

import json

import pytest
import torch

from erniem_batch import budget as module
from erniem_batch.budget import choose, find_budget, ladder, measure
from erniem_batch.config import PredictorConfig
from erniem_batch.model.encoder import ErnieMModel
from erniem_batch.predictor import Predictor


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ERNIEM_BATCH_CACHE", str(tmp_path))
    return tmp_path / "budgets"


@pytest.fixture
def model(random_model):
    return random_model(ErnieMModel)


def test_a_window_fits():
    assert ladder("cpu", 512) == [1024, 2048, 512]
    assert ladder("cpu", 100) == [256, 512, 1024, 2048]
    assert ladder("cpu", 256) == [512, 1024, 2048, 256]
    assert ladder("cpu", 3000) == [3000]
    assert ladder("cuda", 512)[0] == 4096


def test_the_least_that_is_nearly_as_fast():
    assert choose({512: 98.0, 1024: 99.0, 2048: 100.0}) == 512
    assert choose({512: 90.0, 1024: 99.0, 2048: 100.0}) == 1024
    assert choose({512: 0.0}) == 512


def test_every_rung_is_tried(model):
    speeds = measure(model, [300, 64])
    assert list(speeds) == [64, 300]
    assert min(speeds.values()) > 0


def test_it_is_remembered(folder, model, monkeypatch):
    found = find_budget(model, 64)
    (path,) = folder.glob("*.json")
    noted = json.loads(path.read_text())
    assert noted["max_batch_tokens"] == found
    assert set(noted["tokens_per_s"]) == {"256", "512", "1024", "2048"}
    assert noted["torch"] == torch.__version__
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("tried again"))
    assert find_budget(model, 64) == found
    path.write_text(json.dumps({**noted, "max_batch_tokens": 777}))
    assert find_budget(model, 64) == 777


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"max_batch_tokens": "many"}'])
def test_a_damaged_note_is_made_anew(folder, model, content):
    find_budget(model, 64)
    (path,) = folder.glob("*.json")
    path.write_text(content)
    assert find_budget(model, 64) in ladder("cpu", 64)
    assert json.loads(path.read_text())["max_batch_tokens"] in ladder("cpu", 64)


def test_other_facts_are_found_for_themselves(folder, model):
    find_budget(model, 64)
    find_budget(model, 32)
    find_budget(model.double(), 32)
    assert len(list(folder.glob("*.json"))) == 3


def test_without_a_place_to_note_it(tmp_path, model, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ERNIEM_BATCH_CACHE", str(tmp_path / "file"))
    assert find_budget(model, 64) in ladder("cpu", 64)


@pytest.mark.parametrize(("most", "expected"), [(600, [256, 512]), (300, [256]), (1, [256])])
def test_what_does_not_fit_is_left_out(model, monkeypatch, most, expected):
    def seconds(model, n_tokens, n_layers):
        if n_tokens > most:
            raise torch.OutOfMemoryError("no room")
        return 1.0

    monkeypatch.setattr(module, "_seconds", seconds)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert list(measure(model, ladder("cpu", 64))) == expected


def test_a_predictor_takes_what_was_found_or_what_it_is_told(folder, ner_model_dir):
    sizes = {"window_tokens": 32, "overlap_tokens": 8, "device": "cpu", "n_threads": 1}
    found = Predictor.load(PredictorConfig(model=str(ner_model_dir), **sizes))
    assert found.max_batch_tokens in ladder("cpu", 32)
    (path,) = folder.glob("*.json")
    assert json.loads(path.read_text())["threads"] == 1
    told = PredictorConfig(model=str(ner_model_dir), max_batch_tokens=99, **sizes)
    assert Predictor.load(told).max_batch_tokens == 99
    assert len(list(folder.glob("*.json"))) == 1
