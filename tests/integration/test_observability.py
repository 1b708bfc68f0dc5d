"""What a running job shows: to Prometheus, to `status`, and on its log."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from fakes import write_jsonl
from fault.runs import ROOT, answer, free_port
from manifests.figures import BATCH_METRICS

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

# A job on a Ray of its own, whose metrics stand at a port that we know.
JOB = """
import sys
from erniem_batch.cli import main
from erniem_batch.job.cluster import connect_to
connect_to(None, 4, metrics_port=int(sys.argv[1]))
raise SystemExit(main(sys.argv[2:]))
"""
# Ray tells of metrics every ten seconds, for which the job would have to last longer.
SOON = {"RAY_metrics_report_interval_ms": "1000"}
N_UNITS = 150
# Those that a run without faults and without padding never tells.
SILENT = {"erniem_batch_padding_tokens", "erniem_batch_dead_letters"}


def names_of(url: str) -> set[str]:
    """Metrics of ours at an address; none if nobody answers."""
    try:
        text = httpx.get(url, timeout=5).text
    except httpx.HTTPError:
        return set()
    found = re.findall(r"^ray_(erniem_batch_\w+?)(?:_total|_bucket|_sum|_count)?\{", text, re.M)
    return set(found)


@pytest.mark.slow
def test_a_running_job_can_be_watched(tmp_path: Path, ner_model_dir: Path) -> None:
    for i in range(N_UNITS):
        rows = [{"text": f"Ada {i} {j} lived in London. " * 40} for j in range(30)]
        write_jsonl(tmp_path / "in" / f"{i:03}.jsonl", rows)
    port, output = free_port(), tmp_path / "out"
    arguments = ["ner", "--model", ner_model_dir, "--input", tmp_path / "in", "--output", output]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-c", JOB, str(port), *map(str, arguments), "--log-format", "json"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | SOON,
    )  # fmt: skip
    try:
        wanted, seen, states = set(BATCH_METRICS) - SILENT, set(), []
        while process.poll() is None:
            seen |= names_of(f"http://127.0.0.1:{port}/metrics")
            if "erniem_batch_units" in seen and not any(s["units_done"] for s in states):
                states.append(answer("status", output))
            time.sleep(0.5)
        last = json.loads(process.communicate()[0].splitlines()[-1])
    finally:
        process.kill()
        log.close()
    lines = (tmp_path / "log").read_text().splitlines()
    assert last["exit_code"] == 0, lines[-5:]
    assert seen >= wanted, f"missing: {wanted - seen}"
    assert {state["state"] for state in states} == {"running"}
    assert 0 < states[-1]["units_done"] < states[-1]["units"] == N_UNITS
    assert answer("status", output)["state"] == "ended"
    messages = [json.loads(line) for line in lines if line.startswith("{")]
    progress = [m["message"] for m in messages if m["message"].startswith("progress ")]
    # Between two units an actor is at work on none: any line may come then, also the last.
    pattern = (
        rf"progress units=\d+/{N_UNITS} rows=\d+ tokens_per_s=\d+ actors=1 done=[\d.]+% eta_s=\d+"
    )
    assert any(re.fullmatch(pattern, message) for message in progress), progress
