"""No run reads what an earlier one has written."""

import os

import pytest
from fakes import quick_jobs, write_jsonl

from erniem_batch import cli
from erniem_batch.errors import ConfigError
from erniem_batch.job.apart import require_apart, require_found_apart
from erniem_batch.job.compact import compact
from erniem_batch.job.units import find_files
from erniem_batch.train.config import FinetuneConfig
from erniem_batch.train.run import finetune


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quick_jobs(monkeypatch)


INSIDE = "is inside --output"
READS = "the next run would read its results"


@pytest.fixture(autouse=True)
def corpus(tmp_path):
    write_jsonl(tmp_path / "corpus" / "sub" / "a.jsonl", [{"text": "a"}])


@pytest.mark.parametrize(
    ("given", "output", "message"),
    [
        ("corpus", "corpus-out", None),
        ("corpus", "corpus", READS),
        ("corpus/", "corpus/out", READS),
        ("corpus", "corpus/sub/../out", READS),
        ("corpus", "corpus/sub/deep/out", READS),
        ("corpus/sub", "corpus", INSIDE),
        ("corpus/sub/a.jsonl", "corpus/sub", INSIDE),
        ("corpus/sub/a.jsonl", "corpus/sub/out", None),
        ("corpus", "corpus/_tagged", None),
        ("corpus/*", "corpus/_tagged", READS),
        ("corpus/*.jsonl", "corpus/out", None),
        ("corpus/*", "corpus/out", READS),
        ("corpus/*/*.jsonl", "corpus/out", READS),
        ("corpus/*/*.jsonl", "corpus/out/night", None),
        ("corpus/s*/*.jsonl", "corpus/out", None),
        ("corpus/**/*.jsonl", "corpus/out", READS),
        ("corpus/**/*.jsonl", "corpus/a/b/out", READS),
        ("corpus/sub/*.jsonl", "corpus", INSIDE),
        ("*/a.jsonl", "out", READS),
        ("s3://b/corpus", "s3://b/corpus-out", None),
        ("s3://b/corpus", "s3://b/corpus/out", READS),
        ("s3://b/corpus/", "s3://b/corpus", READS),
        ("s3://b/corpus/x", "s3://b/corpus", INSIDE),
        ("s3://b/corpus", "s3://c/corpus/out", None),
    ],
)
def test_input_and_output(tmp_path, monkeypatch, given, output, message):
    monkeypatch.chdir(tmp_path)
    from erniem_batch import storage

    target = storage.normal(os.path.normpath(output) if "://" not in output else output)
    if message is None:
        require_apart([given], target)
    else:
        with pytest.raises(ConfigError, match=message):
            require_apart([given], target)


@pytest.mark.parametrize("output", ["corpus", "corpus/out"])
def test_a_run_is_refused_before_any_work(tmp_path, job, capsys, output):
    with pytest.raises(ConfigError, match="Choose a folder beside it"):
        job(input=[str(tmp_path / "corpus")], output=str(tmp_path / output))
    assert not (tmp_path / "corpus" / "_run").exists()
    assert not (tmp_path / "corpus" / "out").exists()
    arguments = ["--input", str(tmp_path / "corpus"), "--output", str(tmp_path / output)]
    assert cli.main(["plan", "ner", *arguments]) == 2


def test_symbolic_links_are_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "corpus")
    with pytest.raises(ConfigError, match=READS):
        require_apart([str(tmp_path / "link")], str(tmp_path / "corpus" / "out"))
    with pytest.raises(ConfigError, match=READS):
        require_apart([str(tmp_path / "corpus")], str(tmp_path / "link" / "out"))


def test_a_link_inside_the_input(tmp_path):
    write_jsonl(tmp_path / "out" / "x.jsonl", [{"text": "a"}])
    (tmp_path / "corpus" / "more").symlink_to(tmp_path / "out")
    found = find_files([str(tmp_path / "corpus")])
    with pytest.raises(ConfigError, match="leads into --output"):
        require_found_apart(found, str(tmp_path / "out"))
    require_found_apart(found, str(tmp_path / "other"))


@pytest.mark.parametrize("to", [".", "..", "sub", "link"])
def test_the_second_dataset(tmp_path, job, to):
    job(input=[str(tmp_path / "corpus")], output=str(tmp_path / "night" / "out"))
    (tmp_path / "night" / "out" / "link").symlink_to(tmp_path / "night" / "out" / "_run")
    target = os.path.normpath(tmp_path / "night" / "out" / to)
    with pytest.raises(ConfigError, match="must be another folder"):
        compact(str(tmp_path / "night" / "out"), target)


def test_a_training(tmp_path, ner_model_dir):
    config = FinetuneConfig(
        task="ner", model=str(ner_model_dir), output=str(tmp_path / "corpus" / "model"),
        train=(str(tmp_path / "corpus"),),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=f"inside --train .*{READS}"):
        finetune(config)
