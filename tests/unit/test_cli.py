import io
import json
import re
import shutil
import subprocess
from dataclasses import fields

import pytest
from fakes import ner_config, write_jsonl
from rich.console import Console

from erniem_batch import cli
from erniem_batch.cli import TextColumn, main
from erniem_batch.errors import JobError, StorageError
from erniem_batch.job import JobConfig, RunReport, Stopped, view
from erniem_batch.job.actor import Receipt
from erniem_batch.options import (
    ChooseOptions,
    ClassifyOptions,
    EmbedOptions,
    ExtractOptions,
    NerOptions,
    QaOptions,
)


@pytest.fixture
def run(capsys, monkeypatch):
    """Exit code, stdout and stderr of a command line. None of these gets as far as Ray."""
    monkeypatch.setenv("COLUMNS", "400")
    for name in ("RAY_ADDRESS", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def _report(**changes):
    values = dict.fromkeys((f.name for f in fields(RunReport)), 0)
    values |= {"output": "out", "fingerprint": "f", "failed_units": (), "versions": {}}
    values |= {"drifted": (), "most_dead": "encode: RecordError"}
    return RunReport(**{**values, **changes})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ner", "--limit", "0"), "--limit must be at least 1, got 0"),
        (("ner", "--limit", "many"), "many"),
        (("ner", "--text-colum", "body"), "--text-column"),
        (("ner", "--actor", "2:2"), "--actors"),
        (("ner", "--dtype", "int4"), "float32"),
        (("ner", "--input", "absent"), "--output is needed with --input"),
        (("ner", "--input", "absent", "--output", "out"), "--input absent: no file matches"),
        (("ner", "--window-tokens", "600", "--overlap-tokens", "600"), "lower it or raise"),
        (("ner", "surplus"), "surplus"),
        (("net",), "ner"),
    ],
)
def test_wrong_usage(run, arguments, message):
    code, out, err = run(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in out + err


def test_a_usage_error_is_one_line(run):
    code, out, err = run("ner", "--input", "absent", "--output", "out")
    assert (code, out) == (2, "")
    assert err.strip().count("\n") == 0
    assert err.startswith("error: ")


def test_square_brackets_in_a_message_are_shown(run, tmp_path):
    """Once, they were read as colours: left out, or an error of their own."""
    for name in ("[ab]*.jsonl", "x[/bold]", "[red]"):
        code, _, err = run("ner", "--input", tmp_path / name, "--output", tmp_path / "out")
        assert code == 2
        assert name in err


def test_a_model_that_cannot_be_used_is_wrong_usage(run, tmp_path):
    """Once, exit code 3 (incomplete), which says that to run it again may help."""
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "model").mkdir()
    options = ("--input", source, "--output", tmp_path / "out")
    for model in ("model", "absent"):
        code, out, err = run("ner", *options, "--model", tmp_path / model)
        assert (code, out) == (2, "")
        assert str(tmp_path / model) in err


def test_files_of_somebody_else_in_the_output(run, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    foreign = write_jsonl(tmp_path / "out" / "a.parquet", [])
    code, _, err = run("ner", "--input", source, "--output", tmp_path / "out")
    assert code == 2
    assert "that are not of this run but have its names (a.parquet)" in err
    assert foreign.read_bytes() == b""


def test_an_output_that_cannot_be_written(run, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "file").touch()
    code, _, err = run("ner", "--input", source, "--output", tmp_path / "file" / "out")
    assert code == 2
    assert "writing failed" in err


def test_help_shows_every_setting(run):
    code, out, _ = run("ner", "--help")
    assert code == 0
    hidden = {"options", "fields"}  # filled from flags of the task
    shown = [*fields(JobConfig), *fields(NerOptions), *fields(TextColumn)]
    for field in (field for field in shown if field.name not in hidden):
        assert re.search(rf"--{field.name.replace('_', '-')}\b", out), field.name
    assert not re.search(r"--(options|fields)\b", out)
    assert "Exit codes" in out


def test_help_of_replay(run):
    code, out, _ = run("replay", "--help")
    assert code == 0
    for flag in ("--output", "--actors", "--address", "--max-dead-letters", "--unit-timeout"):
        assert flag in out


def test_replay_without_a_complete_run(run, tmp_path):
    for output in (tmp_path / "absent", tmp_path):
        code, out, err = run("replay", output)
        assert (code, out) == (2, "")
        assert f"{output} holds no complete run" in err
    assert list(tmp_path.iterdir()) == []


def test_replay_changes_only_what_it_is_told(run, monkeypatch):
    seen = []

    def fake_replay(output, changes):
        seen.append((output, changes))
        return _report(n_rows=5)

    monkeypatch.setattr(cli, "replay_job", fake_replay)
    assert run("replay", "out")[0] == 0
    assert run("replay", "out", "--actors", "2", "--unit-timeout", "60")[0] == 0
    assert seen == [
        ("out", {"address": None}),
        ("out", {"address": None, "actors": "2", "unit_timeout": 60.0}),
    ]


def test_help_and_version(run):
    code, out, _ = run("--help")
    assert code == 0
    assert "ner" in out
    code, out, _ = run("--version")
    assert code == 0
    assert re.match(r"\d+\.\d+\.\d+", out)


def test_flags_become_the_configuration(run, monkeypatch):
    seen = []

    def fake_run(config, on_receipt=None):
        seen.append((config, on_receipt))
        return _report(n_rows=5, n_ok=5, padding_share=0.0)

    monkeypatch.setattr(cli, "run_job", fake_run)
    code, out, _ = run(
        *("ner", "--input", "a", "--input", "b", "--output", "o", "--min-score", "0.5"),
        *("--columns", "id,text", "--actors", "2:2", "--num-gpus-per-actor", "0.5"),
        *("--aggregation-strategy", "max", "--output-format", "jsonl"),
    )
    assert code == 0
    (config, on_receipt) = seen[0]
    assert config == ner_config(
        JobConfig,
        input=["a", "b"],
        output="o",
        min_score=0.5,
        columns="id,text",
        actors="2:2",
        num_gpus_per_actor=0.5,
        aggregation_strategy="max",
        output_format="jsonl",
    )
    assert on_receipt is None
    assert json.loads(out)["n_rows"] == 5
    run("ner")
    assert seen[1][0].output.startswith("out/ner-")
    assert seen[1][0] == JobConfig(output=seen[1][0].output)
    assert seen[1][1] is not None  # the demo shows what it found


@pytest.mark.parametrize(
    ("arguments", "options", "text_column", "columns"),
    [
        (("ner",), NerOptions(), "text", {}),
        (
            ("classify", "--text-column", "a", "--text-pair-column", "b", "--all-scores"),
            ClassifyOptions(all_scores=True),
            "a",
            {"text_pair": "b"},
        ),
        (
            ("classify", "--candidate-labels", "a, b", "--multi-label", "--min-score", "0.25"),
            ClassifyOptions(candidate_labels="a, b", multi_label=True, min_score=0.25),
            "text",
            {},
        ),
        (
            ("choose", "--question-column", "q", "--question-template", "why={premise} Why?"),
            ChooseOptions(question_template=("why={premise} Why?",)),
            "premise",
            {"choices": "choices", "question": "q"},
        ),
        (
            ("qa", "--context-column", "doc.body", "--top-k", "3", "--null-threshold=-0.5"),
            QaOptions(top_k=3, null_threshold=-0.5),
            "doc.body",
            {"question": "question"},
        ),
        (
            ("embed", "--no-normalize", "--dimensions", "8", "--prefix", "query: "),
            EmbedOptions(normalize=False, dimensions=8, prefix="query: "),
            "text",
            {},
        ),
        (
            ("extract", "--schema", "a, b[c,d]", "--schema-lang", "en", "--min-score", "x.json"),
            ExtractOptions(schema="a, b[c,d]", schema_lang="en", min_score="x.json"),
            "text",
            {},
        ),
        (
            ("extract", "--schema-column", "s", "--language-column", "lang"),
            ExtractOptions(),
            "text",
            {"schema": "s", "language": "lang"},
        ),
    ],
)
def test_every_task_has_its_flags(run, monkeypatch, arguments, options, text_column, columns):
    seen = []
    monkeypatch.setattr(cli, "run_job", lambda config, on_receipt=None: seen.append(config))
    monkeypatch.setattr(cli, "_finished", lambda *_, **__: 0)
    assert run(*arguments, "--input", "a", "--output", "o")[0] == 0
    expected = {"options": options, "text_column": text_column, "fields": columns}
    assert seen == [JobConfig(input=["a"], output="o", **expected)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("extract", "--input", "a", "--output", "o"), "--schema is needed, or --schema-column"),
        (("classify", "--candidate-labels", "a"), "no demo model for zero-shot classification"),
        (("classify", "--multi-label"), "multi_label goes with candidate_labels"),
        (("embed", "--pooling", "none"), "for pipeline('feature-extraction') alone"),
        (("qa", "--min-score", "absent.json"), "--min-score: there is no file absent.json"),
        (("extract", "--schema", "absent.yaml"), "--schema: there is no file absent.yaml"),
        (("extract", "--schema", "[a, {b"), "the schema is no JSON or YAML"),
        (("convert", "absent", "new"), "absent"),
    ],
)
def test_wrong_usage_of_a_task(run, arguments, message):
    code, out, err = run(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in out + err


def test_convert(run, tmp_path, ner_model_dir):
    code, out, _ = run("convert", ner_model_dir, tmp_path / "new", "--layout", "hf")
    assert code == 0
    report = json.loads(out)
    assert (report["target_layout"], report["max_difference"]) == ("hf", 0.0)
    assert (tmp_path / "new" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({}, 0, "done"),
        ({"n_dead": 1}, 4, "dead letters in"),
        ({"n_dead": 1}, 4, "most of them  encode: RecordError"),
        ({"n_dead": 1}, 4, "not published  1 dead letters, 0 allowed"),
        ({"drifted": ("labels: 1 -> 2",)}, 0, "drifted  labels: 1 -> 2"),
        ({"drifted": ("labels",), "fail_on_drift": True}, 5, "without --fail-on-drift"),
        ({"n_dead": 1, "n_dead_allowed": 1}, 0, "dead letters in"),
        ({"n_missing": 1, "n_dead": 1}, 3, "run the same command again"),
        ({"n_missing": 1, "failed_units": (Receipt("u", "a", error="gone [x]"),)}, 3, "gone [x]"),
        ({"n_removed_inputs": 2}, 0, "inputs gone  2 (their results stay)"),
    ],
)
def test_exit_codes(run, monkeypatch, changes, code, words):
    monkeypatch.setattr(cli, "run_job", lambda config, on_receipt=None: _report(**changes))
    found, out, err = run("ner")
    assert found == code
    summary = json.loads(out)
    assert summary["exit_code"] == code
    assert summary["failed_units"] == len(changes.get("failed_units", ()))
    assert words in err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (Stopped(), 143, "stopped; run the same command again"),
        (StorageError("s3://b/x: reading failed"), 3, "s3://b/x: reading failed"),
    ],
)
def test_exit_codes_of_what_ends_a_run(run, monkeypatch, error, code, words):
    def end(config, on_receipt=None):
        raise error

    monkeypatch.setattr(cli, "run_job", end)
    found, out, err = run("ner")
    assert (found, out) == (code, "")
    assert words in err


def test_a_job_that_breaks_off(run, monkeypatch):
    def broken(config, on_receipt=None):
        raise JobError("the actors failed [/x]: MemoryError")

    monkeypatch.setattr(cli, "run_job", broken)
    code, _, err = run("ner")
    assert code == 3
    assert "the actors failed [/x]: MemoryError" in err


def test_highlight_marks_entities_and_cuts_long_texts():
    text = "Ada\nin London " + "x" * 300
    entities = [
        {"start": 0, "end": 3, "label": "PER", "text": "Ada"},
        {"start": 7, "end": 13, "label": "LOC", "text": "London"},
        {"start": 250, "end": 252, "label": "LOC", "text": "xx"},
    ]
    line = view.highlight(text, entities, "en").plain
    assert line.startswith("      en  Ada PER in London LOC xxx")
    assert line.endswith(" …")


def test_entity_view_shows_a_finished_file(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    entity = {"start": 0, "end": 3, "label": "PER", "text": "Ada"}
    rows = [{"text": "Ada!", "lang": "en", "entities": [entity]}, {"text": "b", "entities": []}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    shown = io.StringIO()
    show = view.ResultView(Console(file=shown, width=80), str(tmp_path), JobConfig())
    show(Receipt("1", "a.parquet"))
    show(Receipt("2", "absent.parquet", error="gone"))
    assert shown.getvalue().split() == ["en", "Ada", "PER!"]


COMPLETED = """
eval "$(cat)"
complete -p erniem-batch > /dev/null
COMP_WORDS=(erniem-batch {words}) COMP_CWORD={place} COMP_LINE="erniem-batch {line}"
COMP_POINT=${{#COMP_LINE}}
"$(complete -p erniem-batch | sed -E 's/.*-F ([^ ]+).*/\\1/')" erniem-batch "{word}" ""
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("line", "expected"), [("sta", "status"), ("ner --outp", "--output"), ("plan ext", "extract")]
)
def test_bash_completes(run, line, expected):
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    code, script, _ = run("completion", "bash")
    assert code == 0
    words = line.split(" ")
    asked = COMPLETED.format(words=line, place=len(words), line=line, word=words[-1])
    done = subprocess.run(
        ["bash", "-c", asked], input=script, capture_output=True, text=True, check=False
    )
    assert expected in [word.strip() for word in done.stdout.splitlines()], done.stderr


def test_every_command_is_there(run):
    _, out, _ = run("--help")
    commands = (
        "ner classify choose qa extract embed serve plan status replay compact convert parity "
        "finetune evaluate completion config-schema token"
    )
    assert set(commands.split()) <= set(out.replace("│", " ").split())
