"""Runs without Ray, and the real service over the same tiny models, compared by the command."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import save_tiny_ner_model, tag_here, write_jsonl
from serving import served_model
from task_rows import JOBS, SENTENCES, rows_of, write_rows

from erniem_batch import ErnieMTokenizer, cli
from erniem_batch.job.manifest import Entry, result_files
from erniem_batch.options import TASKS
from erniem_batch.serve.parity import _places, difference, tree_of, vector_difference
from erniem_batch.serve.tokens import new_token

N_ROWS = 100  # with dead letters of every task among them
SIZES = {"window_tokens": 64, "overlap_tokens": 16}
FLAGS = ["--window-tokens", "64", "--overlap-tokens", "16"]
Outcome = tuple[int, dict[str, Any], str]


@pytest.fixture(scope="module")
def service(service_dir: Path) -> Iterator[str]:
    with served_model(service_dir, **SIZES) as url:
        yield url


@pytest.fixture
def tag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Path]:
    """Runs a task's command over its rows, without Ray, and gives the output folder."""

    tag_here(monkeypatch)

    def call(task: str, model: Path, *flags: str, rows: Any = None, kind: str = "parquet") -> Path:
        rows = rows_of(task, N_ROWS) if rows is None else rows
        source = write_rows(tmp_path / "in", task, rows, kind, 60)
        output = tmp_path / "out"
        where = ["--input", str(source), "--output", str(output), "--model", str(model)]
        sizes = FLAGS if "--window-tokens" not in flags else []
        code = cli.main([task, *where, "--max-dead-letters", "100%", *sizes, *flags])
        assert code == 0, capsys.readouterr().err
        capsys.readouterr()
        return output

    return call


@pytest.fixture
def compare(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Exit code, figures and what people see of `erniem-batch parity`; no text in either."""
    monkeypatch.setenv("COLUMNS", "400")

    def call(output: Path, url: str, *flags: str) -> Outcome:
        code = cli.main(["parity", str(output), "--endpoint", url, *flags])
        captured = capsys.readouterr()
        for word in ("Lovelace", "Kinder", "北京", "Москве", "choice 0"):
            assert word not in captured.out + captured.err
        return code, json.loads(captured.out or "{}"), captured.err

    return call


def model_of(service_dir: Path, task: str) -> Path:
    return service_dir / ("encoder" if task == "embed" else task)


# ---- equal --------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_run_and_service_are_equal(
    tag: Any, compare: Any, service: str, service_dir: Path, task: str
) -> None:
    """With the options and columns of the run; JSONL for some, so that both forms are read."""
    kind = "jsonl" if task in ("choose", "extract") else "parquet"
    flags = ["--output-format", kind] if task != "choose" else []
    output = tag(task, model_of(service_dir, task), *JOBS[task].flags, *flags, kind=kind)
    code, figures, said = compare(output, service, "--rows", "60")
    assert (code, figures["findings"], figures["first_different"]) == (0, [], []), said
    assert (figures["task"], figures["model"], figures["rows"]) == (task, "tiny", 60)
    assert (figures["equal"], figures["different"]) == (60, 0)
    assert figures["largest_difference"] <= figures["tolerance"] == 1e-5
    assert figures["dead_letters_answered"] == 0
    assert figures["dead_letters"] > 0
    assert "60 of 60 rows" in said


@pytest.mark.parametrize(
    ("task", "flags"),
    [
        ("ner", ["--min-score", "0.9", "--offset-unit", "utf16"]),
        ("classify", ["--candidate-labels", "sports, politics", "--multi-label"]),
        ("embed", ["--output-dtype", "float16", "--prefix", "query: "]),
        ("embed", ["--output-dtype", "int8", "--dimensions", "8"]),
    ],
)
def test_options_of_the_run_are_asked_for(
    tag: Any, compare: Any, service: str, service_dir: Path, task: str, flags: list[str]
) -> None:
    rows = rows_of(task, 20)
    if "--candidate-labels" not in flags:
        output = tag(task, model_of(service_dir, task), *flags, rows=rows)
        code, figures, said = compare(output, service)
    else:
        model = service_dir / "classify-entailment"
        with served_model(model, **SIZES) as url:
            output = tag(task, model, *flags, rows=rows)
            code, figures, said = compare(output, url)
    assert (code, figures["different"]) == (0, 0), said
    assert figures["rows"] == figures["equal"] == 19  # one has no text


def test_nested_columns_and_files_of_several_groups(
    tmp_path: Path, tag: Any, compare: Any, service: str, service_dir: Path
) -> None:
    rows = [{"doc": {"body": SENTENCES[i % 7].format(i=i)}, "lang": "de"} for i in range(30)]
    write_jsonl(tmp_path / "in" / "x.jsonl", rows)
    flags = ["--text-column", "doc.body", "--language-column", "lang", "--columns", "doc,lang"]
    output = tag("ner", service_dir / "ner", *flags, rows=[])
    path = output / "x.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=7)
    code, figures, said = compare(output, service, "--rows", "1000")
    assert (code, figures["equal"]) == (0, 30), said


# ---- different ----------------------------------------------------------------------------------


def _other_label(row: dict[str, Any]) -> None:
    row["entities"][0]["label"] += "x"


def _other_score(row: dict[str, Any]) -> None:
    row["entities"][-1]["score"] += -1e-3 if row["entities"][-1]["score"] > 0.5 else 1e-3


def _one_less(row: dict[str, Any]) -> None:
    row["entities"].pop()


def _other_end(row: dict[str, Any]) -> None:
    row["entities"][0]["end"] += 1


def _more_tokens(row: dict[str, Any]) -> None:
    row["n_tokens"] += 1


def _cut(row: dict[str, Any]) -> None:
    row["truncated"] = True


@pytest.fixture(params=["parquet", "jsonl"])
def ner_run(request: Any, tag: Any, service_dir: Path) -> Path:
    output: Path = tag(
        "ner", service_dir / "ner", "--output-format", request.param, rows=rows_of("ner", 70)
    )
    return output


def _changed(path: Path, change: Callable[[dict[str, Any]], None]) -> int:
    """Changes the last row with entities; gives its number."""
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        table = pq.read_table(path)
        rows = table.to_pylist()
    number = max(i for i, row in enumerate(rows) if row["entities"])
    change(rows[number])
    if path.suffix == ".jsonl":
        write_jsonl(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    return number


def test_one_changed_row_is_found(ner_run: Path, compare: Any, service: str) -> None:
    path = Path(result_files(str(ner_run))[0])
    before = path.read_bytes()
    for change in (_other_label, _other_score, _one_less, _other_end, _more_tokens, _cut):
        number = _changed(path, change)
        code, figures, said = compare(ner_run, service)
        column = {_more_tokens: "n_tokens", _cut: "truncated"}.get(change, "entities")
        (found,) = figures["first_different"]
        place = {"file": path.name, "row": number, "id": found["id"]}
        assert (code, found) == (1, place | {"columns": [column]}), change
        assert (figures["different"], figures["equal"]) == (1, figures["rows"] - 1)
        assert f"{path.name}:{number} (id {found['id']})  {column}" in said
        path.write_bytes(before)
    assert figures["largest_difference"] < 1e-5
    assert compare(ner_run, service)[0] == 0


def test_the_tolerance_is_a_choice(ner_run: Path, compare: Any, service: str) -> None:
    _changed(Path(result_files(str(ner_run))[0]), _other_score)
    code, figures, _ = compare(ner_run, service)
    assert code == 1
    assert figures["largest_difference"] == pytest.approx(1e-3, rel=0.01)
    assert compare(ner_run, service, "--tolerance", "2e-3")[0] == 0


def test_another_model_is_a_finding(
    tmp_path: Path, tokenizer: ErnieMTokenizer, tag: Any, compare: Any, service: str
) -> None:
    other = save_tiny_ner_model(tmp_path / "model", tokenizer, layer_norm_eps=1e-3)
    output = tag(
        "ner", other, "--window-tokens", "48", "--overlap-tokens", "16", rows=rows_of("ner", 20)
    )
    code, figures, said = compare(output, service)
    model, windows = figures["findings"]
    assert code == 1
    assert model.startswith("another model: the run had ")
    assert windows == "another --window-tokens: the run had 48, tiny 64"
    assert model in said
    assert figures["different"] > 0


def test_a_row_that_the_service_refuses(
    tmp_path: Path, tag: Any, compare: Any, service: str, service_dir: Path
) -> None:
    """It is different, and the others of its request are compared all the same."""
    rows = [{"text": "Ada", "lang": "de" * (20 if i == 3 else 1)} for i in range(5)]
    write_jsonl(tmp_path / "in" / "x.jsonl", rows)
    output = tag("ner", service_dir / "ner", "--language-column", "lang", rows=[])
    code, figures, said = compare(output, service)
    assert (code, figures["equal"]) == (1, 4)
    refused = {"file": "x.parquet", "row": 3, "error": "invalid_request"}
    assert figures["first_different"] == [refused]
    assert "x.parquet:3  refused: invalid_request" in said


def test_a_dead_letter_that_the_service_answers(
    tag: Any, compare: Any, service: str, service_dir: Path
) -> None:
    output = tag("ner", service_dir / "ner", rows=rows_of("ner", 20))
    (path,) = (output / "_dead_letters").glob("*.parquet")
    letters = pq.read_table(path)
    rows = letters.to_pylist()
    rows[0]["row"]["text"] = "Ada Lovelace"
    pq.write_table(pa.Table.from_pylist(rows, letters.schema), path)
    code, figures, said = compare(output, service)
    assert (code, figures["different"], figures["dead_letters_answered"]) == (1, 0, 1)
    assert "answered by the service" in said


# ---- what cannot be compared --------------------------------------------------------------------


def test_rows_without_their_text_cannot_be_asked(
    tag: Any, compare: Any, service: str, service_dir: Path
) -> None:
    output = tag("ner", service_dir / "ner", "--columns", "id", rows=rows_of("ner", 5))
    code, figures, said = compare(output, service)
    assert (code, figures) == (2, {})
    assert "rows cannot be asked again without text" in said


def test_what_no_service_offers(tag: Any, compare: Any, service: str, service_dir: Path) -> None:
    flags = ["--schema", "Person", "--taskflow-compat"]
    output = tag("extract", service_dir / "extract", *flags, rows=rows_of("extract", 3))
    code, _, said = compare(output, service)
    assert code == 2
    assert "--taskflow-compat" in said


def test_tokens_and_addresses(
    monkeypatch: pytest.MonkeyPatch, tag: Any, compare: Any, service_dir: Path
) -> None:
    output = tag("ner", service_dir / "ner", rows=rows_of("ner", 5))
    token, digest = new_token()
    monkeypatch.setenv("PARITY_TOKEN", token)
    monkeypatch.delenv("ABSENT_TOKEN", raising=False)
    with served_model(service_dir / "ner", {"tokens": (digest,)}, **SIZES) as url:
        assert compare(output, url, "--token-env", "PARITY_TOKEN")[0] == 0
        for flags, message in (
            ([], "give a token with --token-env"),
            (["--token-env", "ABSENT_TOKEN"], "there is no such environment variable"),
            (
                ["--token-env", "PARITY_TOKEN", "--model", "x"],
                "no model 'x' for ner; there is tiny",
            ),
            (["--rows", "0"], "--rows must be at least 1"),
            (["--tolerance", "-1"], "--tolerance must be at least 0"),
        ):
            code, _, said = compare(output, url, *flags)
            assert (code, message in said) == (2, True), said
        code, _, said = compare(output, url + "/elsewhere", "--token-env", "PARITY_TOKEN")
        assert (code, "404" in said) == (2, True), said
    assert compare(output, "127.0.0.1:1")[0] == 2
    monkeypatch.setattr("erniem_batch.client.FIRST_WAIT_S", 0.01)
    code, _, said = compare(output, url)
    assert (code, "unreachable" in said) == (3, True), said


def test_folders_that_are_no_finished_run(
    tmp_path: Path, tag: Any, compare: Any, service_dir: Path
) -> None:
    url = "http://127.0.0.1:1"
    assert "no finished batch run" in compare(tmp_path, url)[2]
    output = tag("ner", service_dir / "ner", rows=rows_of("ner", 5))
    info = output / "_run" / "run.json"
    before = info.read_text(encoding="utf-8")
    info.write_text(json.dumps(json.loads(before) | {"fingerprint": "f"}), encoding="utf-8")
    code, _, said = compare(output, url)
    assert (code, "other settings" in said) == (2, True)


@pytest.mark.parametrize("damage", ["gone", "cut", "shorter"])
def test_damaged_outputs(
    tag: Any, compare: Any, service: str, service_dir: Path, damage: str
) -> None:
    output = tag("ner", service_dir / "ner", rows=rows_of("ner", 10))
    (path,) = map(Path, result_files(str(output)))
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        pq.write_table(pq.read_table(path).slice(0, 4), path)
    code, _, said = compare(output, service)
    what = "has fewer rows" if damage == "shorter" else "cannot be read"
    assert (code, what in said, path.name in said) == (2, True, True), said


# ---- figures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (None, None, 0.0),
        ("a", "a", 0.0),
        (0.25, 0.5, 0.25),
        (4.0, 8.0, 0.5),
        ([{"a": 1, "b": 0.5}], [{"b": 0.75, "a": 1}], 0.25),
        ([], [], 0.0),
        (None, "a", math.inf),
        (None, 0.0, math.inf),
        (1, 2, math.inf),
        (True, 1, math.inf),
        (0.5, math.nan, math.inf),
        ([0.5], [0.5, 0.5], math.inf),
        ([{"a": 1}], [{"b": 1}], math.inf),
        ([{"a": [0.5, None]}], [{"a": [0.5, 0.0]}], math.inf),
    ],
)
def test_differences(ours: Any, theirs: Any, expected: float) -> None:
    assert difference(ours, theirs) == difference(theirs, ours) == expected


def test_trees_are_equal_whatever_comes_first() -> None:
    def item(ident: int, parent: int | None, name: str, text: str) -> dict[str, Any]:
        return {"id": ident, "parent": parent, "name": name, "text": text}

    one = [item(0, None, "A", "x"), item(1, 0, "B", "y"), item(2, None, "C", "z")]
    same = [item(0, None, "C", "z"), item(1, None, "A", "x"), item(2, 1, "B", "y")]
    assert difference(tree_of(one), tree_of(same)) == 0.0
    for other in (
        [item(0, None, "A", "x"), item(1, None, "B", "y"), item(2, None, "C", "z")],
        [item(0, None, "C", "z"), item(1, None, "A", "x"), item(2, 0, "B", "y")],
        [item(0, None, "A", "x"), item(1, 0, "B", "w"), item(2, None, "C", "z")],
        one[:2],
    ):
        assert difference(tree_of(one), tree_of(other)) == math.inf
    with pytest.raises(KeyError):
        tree_of(one[1:])


def test_vectors_may_be_rounded_to_their_type() -> None:
    one = np.array([0.5, -0.03, 0.0], np.float16)
    next_to_it = np.nextafter(one, np.float16(1)).tolist()
    assert vector_difference(one.tolist(), next_to_it, "float16") == 0.0
    assert vector_difference(one.tolist(), next_to_it, "float32") > 1e-5
    assert vector_difference([0.03, 0.5], [0.0301, 0.5], "float16") > 5e-5
    assert vector_difference([1, -5], [2, -5], "int8") == 0.0
    assert vector_difference([1, -5], [3, -5], "int8") == pytest.approx(1 / 127)
    for other in ([1.0], None, [1.0, math.nan]):
        assert vector_difference([1.0, 2.0], other, "float32") == math.inf


def test_every_row_is_as_likely() -> None:
    entries = [Entry("a", 5), Entry("none", 0), Entry("b", 95)]
    counts = np.zeros(100)
    for seed in range(2000):
        drawn = [(e.name, n) for e, numbers in _places(entries, 10, seed) for n in numbers]
        assert len(drawn) == len(set(drawn)) == 10
        counts[[n if name == "a" else 5 + n for name, n in drawn]] += 1
    assert counts.sum() == 20_000
    assert counts.min() > 140  # of 200; five standard deviations are 67
    assert counts.max() < 270
    assert list(_places(entries, 1000, 1)) == [
        (entries[0], list(range(5))),
        (entries[2], list(range(95))),
    ]
    assert list(_places(entries, 10, 3)) == list(_places(entries, 10, 3))
    assert list(_places([], 10, 3)) == []
