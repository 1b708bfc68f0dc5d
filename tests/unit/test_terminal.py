"""Nothing that others have named reaches a terminal or a log as it is."""

import io
import json
import logging

import pytest
from rich.console import Console

from erniem_batch import cli
from erniem_batch.errors import ConfigError
from erniem_batch.evaluate.report import Evaluation
from erniem_batch.evaluate.report import show as show_evaluation
from erniem_batch.job.report import RunReport
from erniem_batch.job.status import Status
from erniem_batch.job.verify import Damage, Verification
from erniem_batch.job.view import highlight, show_labels, show_status, show_verification
from erniem_batch.terminal import (
    UNSAFE,
    PrintableFilter,
    printable,
    printable_json,
    safe_markup,
)

# Clears the screen, forges a line of the log, turns the direction of writing, is markup of rich.
EVIL = "a\x1b[2J\n2026-01-01 00:00:00 INFO forged\u202egnp\x9b31m[red]\x07b"


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200, force_terminal=False)


def written(console):
    return console.file.getvalue()


def harmless(text):
    lines = text.split("\n")
    assert not any(UNSAFE.search(line) for line in lines), text
    assert not any(line.startswith("2026-01-01") for line in lines), text
    return text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain é 漢字 😀 [x]", "plain é 漢字 😀 [x]"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x9b31m\x7f", r"\x9b31m\x7f"),
        ("\u202etxt.exe", r"\u202etxt.exe"),
        ("\u2066x\u2069\u2028", r"\u2066x\u2069\u2028"),
        ("\udce9", r"\udce9"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_printable(text, expected):
    assert printable(text) == expected


@pytest.mark.parametrize("text", [EVIL, "\U000e0041", "é", "\x7f"])
def test_json_stays_equal(text):
    line = json.dumps({"a": text}, ensure_ascii=False)
    made = printable_json(line)
    assert json.loads(made) == {"a": text}
    assert not UNSAFE.search(made)


def test_markup_is_text(console):
    console.print(safe_markup(EVIL), highlight=False, soft_wrap=True)
    assert "[red]" in harmless(written(console))


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_log(log_format):
    package = logging.getLogger("erniem_batch")
    before = package.handlers[:], package.level, package.propagate
    cli.configure_logging(log_format)
    try:
        stream = io.StringIO()
        package.handlers[0].setStream(stream)
        logging.getLogger("erniem_batch.job").warning("file=%s", EVIL)
        try:
            raise ValueError(EVIL)
        except ValueError:
            logging.getLogger("erniem_batch.job").exception("unit=%s", EVIL)
    finally:
        package.handlers[:], package.level, package.propagate = before
    lines = harmless(stream.getvalue()).splitlines()
    if log_format == "json":
        assert [json.loads(line)["message"] for line in lines] == [f"file={EVIL}", f"unit={EVIL}"]
    else:
        assert lines[0].endswith(printable(EVIL))
        assert sum(not line.startswith("  ") for line in lines) == 2


def test_records_in_the_log_of_others():
    record = logging.LogRecord("erniem_batch.serve", 30, "f", 1, "%s", (EVIL,), None)
    assert PrintableFilter().filter(record)
    assert record.getMessage() == printable(EVIL)
    other = logging.LogRecord("ray", 30, "f", 1, "%s", (EVIL,), None)
    assert PrintableFilter().filter(other)
    assert other.getMessage() == EVIL


def test_an_error(capsys):
    cli._say(ConfigError(f"--text-column {EVIL}: no such column"))
    assert "error:" in harmless(capsys.readouterr().err)


def test_an_error_by_the_command_line(capsys, tmp_path):
    """A column name that a stranger has chosen comes back in the error."""
    (tmp_path / "a.jsonl").write_text(json.dumps({EVIL: "x"}) + "\n")
    code = cli.main(
        ["ner", "--input", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out")]
    )
    assert code == 2
    harmless(capsys.readouterr().err)


def test_the_summary(console):
    report = RunReport(
        output=EVIL, n_units=1, n_units_now=1, n_dead=1, most_dead=EVIL, drifted=(EVIL,), noun="x"
    )
    cli.print_summary(report, console)
    harmless(written(console))


def test_status(console):
    found = Status(
        output=EVIL, task=EVIL, state=EVIL, success=False, host=EVIL, pid=1, units=1, units_done=0,
        done_share=0.0, rows=0, n_ok=0, n_dead=0, n_tokens=0, n_repeated=0, tokens_per_s=None,
        eta_seconds=None, exit_code=None,
    )  # fmt: skip
    show_status(found, console)
    harmless(written(console))


def test_verification(console):
    found = Verification(
        output=EVIL, files=1, dead_letter_files=0, damaged=[Damage(EVIL, EVIL, EVIL)],
        unnamed=[EVIL],
    )  # fmt: skip
    show_verification(found, console)
    harmless(written(console))


def test_an_evaluation(console):
    figures = {"f1": 0.5, "n_gold": 2}
    found = Evaluation(
        task="ner", source=EVIL, headline="f1", label_noun=EVIL, columns=["f1"], n_rows=2,
        n_missing=0, figures=figures, languages={EVIL: figures, "b": figures},
        labels={EVIL: figures}, intervals={}, language_intervals={}, below=[(EVIL, 0.1, 0.2)],
    )  # fmt: skip
    show_evaluation(found, console)
    harmless(written(console))


def test_results_of_the_demo(console):
    entity = {"start": 0, "end": len(EVIL), "text": EVIL, "label": EVIL, "score": 1.0}
    console.print(highlight(EVIL + " text", [entity], EVIL))
    row = {"lang": EVIL, "predicted_label": EVIL, "predicted_score": 0.5}
    console.print(show_labels(row, EVIL))
    harmless(written(console))
