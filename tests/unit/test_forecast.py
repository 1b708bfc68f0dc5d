"""`plan`: what it says of a corpus, against what the run then does."""

import json
from dataclasses import replace

import pyarrow as pa
import pytest
from fakes import ner_config, write_jsonl, write_parquet

from erniem_batch import storage
from erniem_batch.cli import main
from erniem_batch.errors import ConfigError
from erniem_batch.job import JobConfig
from erniem_batch.job import forecast as module
from erniem_batch.job.forecast import PlanFlags, forecast, ratio, save, scripts_of
from erniem_batch.job.rundir import RunFolder
from erniem_batch.predictor import Predictor


@pytest.fixture
def plan(tmp_path, ner_model_dir):
    """Makes a forecast for tmp_path/in with settings of the fixture `job`."""

    def call(flags=None, **options):
        values = {"input": [str(tmp_path / "in")], "output": str(tmp_path / "out")}
        values |= {"model": str(ner_model_dir), "window_tokens": 64, "overlap_tokens": 16}
        config = ner_config(JobConfig, **{**values, **options})
        made = forecast(config, flags or PlanFlags(tokens_per_s=1000.0))
        save(config, made)
        return made

    return call


def rows(n, words=7):
    return [
        {"id": i, "text": f"Ada lived in London {'and there ' * (i % words)}"} for i in range(n)
    ]


def snapshot(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_it_is_exact_when_it_reads_all(tmp_path, plan, job, kind):
    for i in range(3):
        path = tmp_path / "in" / f"{i}.{kind}"
        if kind == "parquet":
            write_parquet(path, pa.Table.from_pylist(rows(90 + i)), group_rows=40)
        else:
            write_jsonl(path, rows(90 + i))
    made = plan(PlanFlags(read_all=True, tokens_per_s=1000.0), unit_bytes=3000)
    report, done = job(unit_bytes=3000)
    assert (made.rows, made.tokens, made.units) == (report.n_rows, report.n_tokens, len(done))
    assert (made.rows_error, made.tokens_error, made.windows) == (0, 0, report.n_windows)
    assert made.sample_rows == 273
    compared = RunFolder(str(tmp_path / "out")).read_report()["forecast"]
    differences = {x["what"]: x["predicted"] - x["actual"] for x in compared}
    del differences["seconds"]
    assert differences == {"units": 0, "rows": 0, "tokens": 0}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_sample_comes_near_and_says_how_near(tmp_path, plan, job, kind):
    for i in range(30):
        many = rows(60 + i, words=5 + i % 4)
        if kind == "jsonl":
            write_jsonl(tmp_path / "in" / f"{i:02}.jsonl", many)
        else:
            write_parquet(tmp_path / "in" / f"{i:02}.parquet", pa.Table.from_pylist(many))
    made = plan(PlanFlags(sample_rows=300, tokens_per_s=1000.0))
    report, _ = job()
    assert made.sample_rows == 300
    assert made.rows_error == 0 if kind == "parquet" else 0 < made.rows_error < 0.2
    assert 0 < made.tokens_error < 0.2
    for said, true, error in (
        (made.rows, report.n_rows, made.rows_error),
        (made.tokens, report.n_tokens, made.tokens_error),
    ):
        assert abs(said / true - 1) <= 2 * error


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_units_of_few_long_texts_and_of_many_short_ones(tmp_path, plan, kind):
    """Once the same number of rows from each was taken for the corpus: 43 times its tokens."""
    for i in range(10):
        for name, many in (
            ("short", [{"text": f"Ada {j} in Rome"} for j in range(1000)]),
            ("long", [{"text": f"Ada {j} in Rome " * 100} for j in range(10)]),
        ):
            path = tmp_path / "in" / f"{i}{name}.{kind}"
            if kind == "jsonl":
                write_jsonl(path, many)
            else:
                write_parquet(path, pa.Table.from_pylist(many))
    true = plan(PlanFlags(read_all=True, tokens_per_s=1000.0))
    made = plan(PlanFlags(sample_rows=200, tokens_per_s=1000.0))
    assert made.sample_rows == 200
    for name in ("rows", "tokens", "windows"):
        assert getattr(made, name) == pytest.approx(getattr(true, name), rel=0.1)
    short = [item["rows"] for item in made.lengths if item["to"] < 100]
    assert sum(short) == pytest.approx(10_000, rel=0.1), "also in the picture of the lengths"


def test_broken_lines_are_as_many_as_in_the_corpus(tmp_path, plan):
    path = tmp_path / "in" / "a.jsonl"
    path.parent.mkdir()
    path.write_text("".join('{"text": "Ada"}\n' if i % 10 else "{broken\n" for i in range(2000)))
    made = plan(PlanFlags(sample_rows=500, tokens_per_s=1000.0))
    assert made.sample_rows == 500
    assert 25 < made.dead_letters["read: RecordError"] < 85


def test_a_corpus_that_cannot_be_tagged(tmp_path, plan, job):
    """Nothing tells the speed; the report of the run says so."""
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": None}] * 3)
    assert plan(PlanFlags()).seconds is None
    report, _ = job(max_dead_letters="100%")
    assert report.exit_code == 0
    folder = tmp_path / "out" / "_run"
    assert "<h2>Forecast</h2>" in (folder / "report.html").read_text()


def test_the_device_is_that_of_the_run(tmp_path, plan, monkeypatch):
    devices = []
    real = Predictor.load

    def load(config):
        devices.append(config.device)
        return real(replace(config, device="cpu"))

    monkeypatch.setattr(Predictor, "load", load)
    write_jsonl(tmp_path / "in" / "a.jsonl", rows(5))
    plan()
    plan(num_gpus_per_actor=1)
    assert devices == ["cpu", None], "None: a GPU, if there is one here"


def test_nothing_is_done(tmp_path, plan):
    write_jsonl(tmp_path / "in" / "a.jsonl", rows(5))
    plan()
    there = sorted(p.relative_to(tmp_path / "out").as_posix() for p in snapshot(tmp_path / "out"))
    assert there == ["_run/forecast.json"]


def test_what_is_done_does_not_count(tmp_path, plan, job):
    write_jsonl(tmp_path / "in" / "a.jsonl", rows(50))
    job()
    before = snapshot(tmp_path / "out")
    made = plan()
    assert (made.units, made.units_done, made.rows, made.tokens) == (0, 1, 0, 0)
    assert "nothing is left to do" in made.warnings[0]
    write_jsonl(tmp_path / "in" / "b.jsonl", rows(8))
    made = plan()
    assert (made.units, made.units_done, made.rows) == (1, 1, 8)
    after = snapshot(tmp_path / "out")
    forecast_file = tmp_path / "out" / "_run" / "forecast.json"
    assert {p: t for p, t in after.items() if p != forecast_file} == before


def test_a_forecast_of_other_settings_is_not_compared(tmp_path, plan, job):
    write_jsonl(tmp_path / "in" / "a.jsonl", rows(5))
    plan(min_score=0.2)
    job(min_score=0.3)
    assert RunFolder(str(tmp_path / "out")).read_report()["forecast"] == []


def test_time_and_cost(tmp_path, plan):
    for i in range(8):
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", rows(20))
    size = (tmp_path / "in" / "0.jsonl").stat().st_size
    flags = PlanFlags(read_all=True, tokens_per_s=10.0, price_per_hour=3.6)
    made = plan(flags, actors="1:4", num_cpus_per_actor=1, unit_bytes=size)
    assert made.actors == 4
    assert made.seconds == pytest.approx(made.start_seconds + made.tokens / 40, abs=0.1)
    assert made.cost == pytest.approx(made.seconds * 4 * 0.001, abs=0.01)
    many = plan(flags, actors="9:9", num_cpus_per_actor=1, unit_bytes=size)
    assert many.actors == 8, "there are 8 units"
    assert "only 8 units for 9 actors: lower --unit-bytes" in many.warnings
    assert plan(flags, actors="9:9", num_cpus_per_actor=1).actors == 1, "they travel together"
    measured = plan(PlanFlags())
    assert measured.tokens_per_s > 0


def test_what_a_corpus_is_like(tmp_path, plan):
    texts = ["Ada", "北京は大きい", "Москва", "x " * 200, None, 7]
    many = [{"text": text, "lang": "de"} for text in texts]
    write_jsonl(tmp_path / "in" / "a.jsonl", many)
    made = plan(fields={"language": "lang"}, unit_bytes=1 << 20)
    assert made.dead_letters == {"encode: RecordError": 2}
    assert made.languages == {"de": 1.0}
    assert set(made.scripts) >= {"Latin", "Cyrillic", "Cjk", "Hiragana"}
    assert sum(item["rows"] for item in made.lengths) == 4
    words = " ".join(made.warnings)
    for warning in ("33.3% of the rows read would become dead letters", "25% of the texts are"):
        assert warning in words
    assert "x x" not in made.as_line()


def test_unknown_tokens_and_nameless_labels(tmp_path, plan, tokenizer):
    from fakes import save_tiny_model

    labels = ["LABEL_0", "LABEL_1"]
    model = save_tiny_model(
        tmp_path / "model", tokenizer, "ErnieMForSequenceClassification", labels
    )
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": "𒀀𒁀𒂀 𓀀𓁀𓂀"}] * 5)
    from erniem_batch.options import ClassifyOptions

    config = JobConfig(
        input=[str(tmp_path / "in")], output=str(tmp_path / "o2"), model=str(model),
        options=ClassifyOptions(),
    )  # fmt: skip
    words = " ".join(forecast(config, PlanFlags(tokens_per_s=1.0)).warnings)
    assert "are not in the vocabulary" in words
    assert "the model's labels have no names" in words


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"text_column": "body"}, ConfigError, "no column 'body'"),
        ({"input": ["nowhere"]}, ConfigError, "no file matches"),
        ({"model": "qa"}, ConfigError, "is it fine-tuned for named entities"),
        ({"window_tokens": 600}, ConfigError, "window_tokens=600 is more than the model holds"),
    ],
)
def test_mistakes_are_those_of_the_run(tmp_path, plan, tokenizer, options, error, words):
    write_jsonl(tmp_path / "in" / "a.jsonl", rows(3))
    if options.get("model") == "qa":
        from fakes import save_tiny_model

        options = {
            "model": str(save_tiny_model(tmp_path / "qa", tokenizer, "ErnieMForQuestionAnswering"))
        }
    with pytest.raises(error, match=words):
        plan(**options)
    assert storage.read(str(tmp_path / "out" / "_run" / "forecast.json")) is None


def test_ratio_of_pieces():
    mean, error = ratio([(10, 5), (20, 10), (30, 15)])
    assert (mean, error) == (2.0, 0.0)
    # By hand: residuals -1 and 1, s = sqrt(2), half of the interval 1.96 * sqrt(2 / 2) / 2 / 1.
    assert ratio([(1, 2), (3, 2)]) == (1.0, pytest.approx(0.98))
    assert ratio([(3, 2)]) == (1.5, 1.0), "one piece tells nothing of others"
    assert ratio([]) == (0.0, 0.0)


def test_scripts():
    assert list(scripts_of("aБ 1中")) == ["Latin", "Cyrillic", "Cjk"]
    assert list(scripts_of(None)) == []


@pytest.mark.parametrize("flag", ["--sample-rows", "--tokens-per-s", "--price-per-hour"])
def test_flags(flag, capsys):
    assert main(["plan", "ner", flag, "0"]) == 2
    assert f"{flag} must be more than 0" in " ".join(capsys.readouterr().err.split())


def test_the_command(tmp_path, capsys, ner_model_dir):
    write_jsonl(tmp_path / "in" / "a.jsonl", rows(5))
    arguments = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert main(["plan", "ner", "--model", str(ner_model_dir), *arguments]) == 0
    out, error = capsys.readouterr()
    assert json.loads(out)["rows"] == 5
    for words in ("5 (exact)", "tokens of a text", "Latin", "no padding"):
        assert words in error


def test_of_a_corpus_that_is_read_as_a_whole_little_is_kept(tmp_path, plan, monkeypatch):
    monkeypatch.setattr(module, "MOST_RECORDS", 10)
    monkeypatch.setattr(module, "MOST_HASHED", 20)
    samples = []
    real = module.read_sample
    monkeypatch.setattr(module, "read_sample", lambda *a: samples.append(real(*a)) or samples[0])
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": f"Ada {i // 2}"} for i in range(200)])
    made = plan(PlanFlags(read_all=True))
    (sample,) = samples
    assert (made.rows, made.windows, made.distinct_share) == (200, 200, 0.5)
    assert (len(sample.records), sample.tagged, len(sample.distinct)) == (10, 200, 10)
    assert (
        len({record.text for record, _, _ in sample.records} - {f"Ada {i}" for i in range(5)}) > 4
    )
