"""The report as a page: charts, samples, and what may never be in it."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise

import pyarrow as pa
import pytest
from fakes import LABELS, save_tiny_ner_model, write_jsonl, write_parquet

from erniem_batch.job import JobConfig, charts
from erniem_batch.job.counter import ProgressCounter
from erniem_batch.job.page import by_language, page
from erniem_batch.job.progress import Timeline
from erniem_batch.job.rundir import RunFolder
from erniem_batch.job.samples import marked, sample_of
from erniem_batch.options import ChooseOptions

SECRET = "Krokodilskaja-71"


def corpus(tmp_path):
    for i in range(3):
        rows = [
            {"text": f"{SECRET} lived in <b>London</b> {j}", "lang": ["de", "fr"][j % 2]}
            for j in range(30)
        ]
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", [*rows, {"text": None, "lang": SECRET * 9}])


def reported(tmp_path):
    folder = RunFolder(str(tmp_path / "out"))
    html = (tmp_path / "out" / "_run" / "report.html").read_text(encoding="utf-8")
    return folder.read_report(), html


class Balanced(HTMLParser):
    """Fails where a tag is closed that is not open."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_that_needs_nothing_else(tmp_path, job):
    corpus(tmp_path)
    job(fields={"language": "lang"}, max_dead_letters="50%")
    values, html = reported(tmp_path)
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    tags = {tag for tag, _ in parser.seen}
    assert not tags & {"script", "link", "img", "iframe"}
    assert not any(name in attrs for _, attrs in parser.seen for name in ("src", "onclick"))
    assert not re.search(r"url\((?!#)", html), "nothing is fetched"
    ids = [attrs["id"] for _, attrs in parser.seen if "id" in attrs]
    for words in ("Labels by language", "Lengths of texts", "encode: RecordError", ">93<"):
        assert words in html
    assert len(ids) > 20
    assert values["task"] == "ner"


def test_no_text_unless_it_is_asked_for(tmp_path, job):
    corpus(tmp_path)
    job(fields={"language": "lang"}, max_dead_letters="50%")
    for path in (tmp_path / "out" / "_run").rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path
    job(fields={"language": "lang"}, max_dead_letters="50%", report_samples=4)
    _, html = reported(tmp_path)
    assert html.count('class="sample"') == 4
    shown = re.sub(r"<mark>(.*?)<small>.*?</small></mark>", r"\1", html)
    assert f"{SECRET} lived in &lt;b&gt;London&lt;/b&gt; 0" in shown


def test_labels_of_the_model_are_text_too(tmp_path, job, tokenizer):
    labels = [n if n == "O" else f"{n}$x^2$<script>alert(1)</script>" for n in LABELS]
    model = save_tiny_ner_model(tmp_path / "m", tokenizer, labels=labels)
    corpus(tmp_path)
    job(model=str(model), max_dead_letters="50%")
    values, html = reported(tmp_path)
    assert "<script>alert" not in html
    assert any("script" in item["label"] for item in values["labels"])
    assert "$x^2$" in re.sub(r"<!--.*?-->", "", html)


def test_names_in_any_script(tmp_path, job, tokenizer):
    """matplotlib's own font has no glyphs for them, and says so; the browser's have."""
    labels = [name if name == "O" else f"{name[:2]}人名{name[2:]}" for name in LABELS]
    model = save_tiny_ner_model(tmp_path / "m", tokenizer, labels=labels)
    corpus(tmp_path)
    job(model=str(model), max_dead_letters="50%")
    assert "人名" in reported(tmp_path)[1]


def test_samples_of_columns_that_python_cannot_show(tmp_path, job):
    table = pa.table({"text": ["Ada in London"], "day": pa.array([2**30], pa.date32())})
    write_parquet(tmp_path / "in" / "a.parquet", table)
    job(report_samples=1)
    assert 'class="sample"' in reported(tmp_path)[1]


def test_a_fault_of_the_page_costs_no_run(tmp_path, job, monkeypatch):
    def fault(*_):
        raise ValueError(SECRET)

    monkeypatch.setattr(charts, "lengths", fault)
    corpus(tmp_path)
    report, _ = job(max_dead_letters="50%")
    assert report.exit_code == 0
    assert (tmp_path / "out" / "_SUCCESS").exists()
    values, html = reported(tmp_path)
    assert "report.json" in html
    assert SECRET not in html
    assert values["exit_code"] == 0


def test_columns_of_samples_are_those_of_the_flags():
    options = ChooseOptions()
    config = JobConfig(options=options, text_column="p", fields={"choices": "doc.c"})
    row = {
        "p": "It rained.", "doc": {"c": ["wet", "dry"]}, "choices": [], "predicted_choice": 1,
        "choice_scores": [0.2, 0.8],
    }  # fmt: skip
    assert sample_of(config, row).title == "dry 0.80"


REPORT = {
    "timeline": [],
    "stage_seconds": dict.fromkeys(("read", "tokenize", "forward"), 0.0),
    "labels": [],
    "lengths": [],
    "languages": [],
    "before": None,
}


def test_charts_of_nothing():
    for chart in (charts.timeline, charts.stages, charts.labels, charts.scores, charts.lengths):
        assert chart(REPORT) is None
    assert by_language(REPORT) == {"labels": [], "rows": []}


def label(name, n, scores=None, languages=None):
    scores = scores or [0] * 19 + [n]
    return {
        "label": name, "n": n, "scores": scores, "languages": languages or {"de": n},
        "mean_scores": {"de": 0.9},
    }  # fmt: skip


FULL = {
    "timeline": [[i * 2.0, i * i * 10, 1 + i // 20] for i in range(60)],
    "stage_seconds": {"read": 1.0, "tokenize": 2.0, "forward": 40.0, "decode": 0.0, "write": 0.1},
    "labels": [label(f"L{i}", 50 - i) for i in range(25)] + [label("", 3, [0] * 20)],
    "lengths": [{"from": 0, "to": 0, "rows": 3}, {"from": 1, "to": 1, "rows": 9}],
    "languages": [{"language": "de", "rows": 12}],
    "before": {
        "labels": [label("L0", 7), label("gone", 9)],
        "lengths": [{"from": 0, "to": 0, "rows": 1}] * 4,
    },
}


@pytest.mark.parametrize("name", ["timeline", "stages", "labels", "scores", "lengths"])
@pytest.mark.parametrize("before", [True, False])
def test_charts_take_their_colours_from_the_page(name, before):
    report = FULL if before else {**FULL, "before": None}
    svg = getattr(charts, name)(report)
    ET.fromstring(svg)
    assert set(re.findall(r"(?:fill|stroke): (#[0-9a-f]+)", svg)) <= {"#000000", "#ffffff"}
    assert "var(--now)" in svg
    assert ("var(--before)" in svg) == (before and name in ("labels", "scores", "lengths"))
    assert svg == getattr(charts, name)(report), "the same each time"


def test_speeds_are_of_stretches():
    ends, rates = charts.speeds([[0, 0, 0], [1, 0, 1], [2, 300, 1], [7, 300, 1], [10, 900, 1]])
    assert ends == [0, 7, 10]
    assert rates == [0, pytest.approx(300 / 7), 200]


def test_shares_by_language():
    report = {
        "labels": [
            label("PER", 5, languages={"de": 3, "fr": 2}),
            label("", 2, languages={"de": 1, "": 1}),
        ],
        "languages": [{"language": "de", "rows": 4}, {"language": "", "rows": 9},
                      {"language": "it", "rows": 1}],
    }  # fmt: skip
    assert by_language(report) == {
        "labels": ["PER"],
        "rows": [{"language": "de", "n": 4, "cells": [(0.75, 0.9)]}],
    }


TEXT = "a😀bé—x"


@pytest.mark.parametrize(
    ("unit", "start", "end"), [("codepoint", 2, 4), ("utf16", 3, 5), ("byte", 5, 8)]
)
def test_marks_in_any_unit(unit, start, end):
    parts = list(marked(TEXT, [(start, end, "L")], unit))
    assert parts == [("a😀", ""), ("bé", "L"), ("—x", "")]


def test_marks_that_overlap_or_lie_far_behind():
    assert list(marked("abcd", [(1, 3, "x"), (2, 4, "y")])) == [("a", ""), ("bc", "x"), ("d", "")]
    ((text, name),) = marked("x" * 5000, [(4000, 4001, "z")])
    assert name == ""
    assert text.endswith("x …")
    assert "".join(text for text, _ in marked("ab", [(0, 2, "x")])) == "ab"


def test_every_task_has_a_page(tmp_path):
    values = {
        **FULL, "task": "qa", "output": "out", "exit_code": 3, "n_missing": 2, "n_rows": 1,
        "n_ok": 1, "n_dead": 0, "noun": "answers", "n_found": 1, "n_tokens": 1, "n_windows": 1,
        "n_units": 3, "n_units_now": 1, "padding_share": 0.0, "n_bytes_read": 1, "seconds": 1.0,
        "tokens_per_s": 1.0, "n_truncated": 0, "repeated_windows": 0, "oom_halvings": 1,
        "ended": "now", "model": "m", "model_digest": "d" * 64, "settings": {"a": None, "b": 1},
        "versions": {}, "forecast": [], "drift": None, "dead_letters": [], "slowest_units": [],
        "failed": [{"output": "x.parquet", "error": "why"}], "drift_threshold": 0.1,
        "compared_with": None,
    }  # fmt: skip
    html = page(values)
    assert "incomplete: 2 units are missing" in html
    assert "batches halved" in html
    assert "x.parquet" in html


# ---- what the driver counts -------------------------------------------------------------------


def test_a_timeline_has_few_points():
    timeline = Timeline()
    for i in range(20_000):
        timeline.add(i * 0.5, i, 1)
    assert Timeline.MOST_POINTS / 3 < len(timeline.points) <= Timeline.MOST_POINTS
    seconds = [point[0] for point in timeline.points]
    gaps = {round(b - a, 1) for a, b in pairwise(seconds)}
    assert max(gaps) <= 2 * min(gaps)
    assert seconds[-1] > 9_900


def test_actors_at_work():
    counter = ProgressCounter()
    counter.add("a", "u1", 0, 0, 0, False)
    counter.add("a", "u2", 0, 0, 0, False)
    counter.add("b", "u3", 5, 50, 500, False)
    assert counter.sums() == (5, 50, 500, 2)
    counter.add("b", "u3", 9, 90, 900, True)
    assert counter.sums() == (9, 90, 900, 1)
    counter.add("c", "u1", 0, 0, 0, False)  # a died; its other unit comes later
    assert counter.sums() == (9, 90, 900, 2)
    counter.add("c", "u3", 1, 10, 100, False)  # done, but its file got lost: once more
    assert counter.sums() == (1, 10, 100, 2)
    counter.report("a", {"windows": 2, "read_seconds": 0.5})
    counter.report("a", {"windows": 3, "read_seconds": 0.75})
    counter.report("b", {"windows": 1})
    assert counter.figures() == {"windows": 4, "read_seconds": 0.75}
