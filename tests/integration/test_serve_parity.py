"""What a batch run writes and what the service answers (slow): 500 rows of each task, the demo."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault.runs import free_port
from starting import start
from task_rows import JOBS, rows_of, write_rows

from erniem_batch import cli

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(3600)]

N_ROWS = 560  # of which some are dead letters
COMPARED = 500
ODD = [
    "😀👩‍👧 Ada 🇩🇪 in Paris",
    "\u200bZero\u200bwidth \ufeffmark",
    "نجيب محفوظ ولد في القاهرة ABC 123",
    "עברית and English, ﬁligature Ünïcode é",
    "北京" * 300,
    "word " * 2000,
    "\x00\x07 controls \u2028 lines\r\n\ttabs",
    "ａｂｃ　ＦＵＬＬ ｗｉｄｔｈ １２３",
]
TEXTS = {"choose": "premise", "qa": "context"}


@pytest.fixture(scope="module")
def url(local_ray: None) -> Iterator[str]:
    """The demo model with all tasks behind Ray Serve."""
    from ray import serve

    from erniem_batch.serve import app
    from erniem_batch.serve.config import AppConfig

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 600})
    start(app(AppConfig(num_cpus=1, request_timeout_s=590)), "demo")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def odd_rows(task: str) -> list[dict[str, Any]]:
    rows = rows_of(task, N_ROWS)
    for i in range(0, N_ROWS, 20):
        rows[i][TEXTS.get(task, "text")] = ODD[i // 20 % len(ODD)] + f" {i}"
    return rows


@pytest.mark.parametrize("task", JOBS)
def test_online_equals_batch(tmp_path: Path, url: str, capsys: Any, task: str) -> None:
    source = write_rows(tmp_path / "in", task, odd_rows(task), "parquet", 200)
    output = tmp_path / "out"
    flags = ["--input", str(source), "--output", str(output), "--max-dead-letters", "100%"]
    flags += ["--actors", "1:1", "--num-cpus-per-actor", "1"]
    assert cli.main([task, *JOBS[task].flags, *flags]) == 0
    capsys.readouterr()
    code = cli.main(["parity", str(output), "--endpoint", url, "--rows", str(COMPARED)])
    figures = json.loads(capsys.readouterr().out)
    print(f"\nparity {task:>8}: {json.dumps(figures)[:400]}")
    assert code == 0, figures
    assert figures["rows"] == COMPARED
    assert figures["different"] == 0
