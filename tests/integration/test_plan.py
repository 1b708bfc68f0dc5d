"""`plan` against the run that follows it, on this machine."""

import json
from itertools import count
from pathlib import Path

import pytest
from fakes import write_jsonl
from fault.runs import answer

from erniem_batch.options import DEMO_FOLDER

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

LEAST_S = 180
TOLERANCE = 0.15
ROWS_A_FILE = 140


def sample_texts() -> list[str]:
    """Of the demo model, in many languages."""
    files = [*sorted((DEMO_FOLDER / "data").glob("*.jsonl")), DEMO_FOLDER / "annotated/train.jsonl"]
    rows = [json.loads(line) for path in files for line in path.read_text("utf-8").splitlines()]
    return [row["text"] for row in rows if str(row.get("text") or "").strip()]


def test_the_time_of_a_run_is_foretold(tmp_path: Path) -> None:
    """A corpus that takes three minutes and more; each row is another one, so all are computed."""
    texts = sample_texts()
    where = ["--input", tmp_path / "in", "--output", tmp_path / "out"]
    made = {"seconds": 0.0}
    for number in count():
        rows = [
            {"id": f"{number}-{i}", "text": f"{texts[(7 * i + number) % len(texts)]} {number} {i}"}
            for i in range(ROWS_A_FILE)
        ]
        write_jsonl(tmp_path / "in" / f"{number:04}.jsonl", rows)
        if number % 40 == 0:
            made = answer("plan", "ner", *where, "--read-all")
            if made["seconds"] > LEAST_S * 1.2:
                break
    report = answer("ner", *where)
    written = json.loads((tmp_path / "out" / "_run" / "report.json").read_text())
    print(json.dumps(written["forecast"]))
    assert (made["rows"], made["tokens"]) == (report["n_rows"], report["n_tokens"])
    assert report["seconds"] > LEAST_S
    assert abs(made["seconds"] / report["seconds"] - 1) <= TOLERANCE
