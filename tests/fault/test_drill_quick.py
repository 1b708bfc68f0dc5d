"""One kill -9 at about half, as the drill does it many times."""

import json
import signal
from pathlib import Path

import pytest

from .corpus import make_corpus, save_model
from .results import compare, is_data, names_in, read_result
from .runs import Run, wait_until

# tests/unit/test_run.py has shorter ones of the same.
pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]


def test_a_killed_run_is_finished_by_the_next(tmp_path: Path) -> None:
    """The second run reads only what the first had not done, and nothing can be told apart."""
    corpus = make_corpus(tmp_path / "corpus", seed=5, n_shards=8, rows_per_shard=90)
    arguments = ["--input", str(corpus.folder), "--model", str(save_model(tmp_path / "model"))]
    arguments += ["--unit-bytes", "3000", "--actors", "1", "--num-cpus-per-actor", "1"]
    arguments += ["--max-dead-letters", "20%"]

    def start(output: Path) -> Run:
        log = tmp_path / f"{output.name}.log"
        return Run(["ner", *arguments, "--output", str(output)], log)

    whole, output = tmp_path / "whole", tmp_path / "output"
    run = start(whole)
    assert run.wait() == 0, run.report()
    reference = read_result(str(whole))
    n_files = len(reference.digests)

    def about_half_done() -> bool:
        return sum(map(is_data, names_in(str(output)))) > n_files / 2

    run = start(output)
    assert wait_until(lambda: about_half_done() or not run.is_on, 120)
    run.send(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert sum(map(is_data, names_in(str(output)))) < n_files
    left = run.end()
    assert not [process for process in left if "ray::MapWorker" in process.command]

    run = start(output)
    assert run.wait() == 0, run.report()
    found = compare(read_result(str(output)), reference, loose=set())
    assert (found.lost, found.repeated, found.files, found.problems) == (0, 0, 0, [])
    assert reference.ids.keys() == corpus.good | corpus.bad
    n_read, n_all = (
        json.loads((folder / "_run/report.json").read_text())["n_bytes_read"]
        for folder in (output, whole)
    )
    assert 0 < n_read < 0.55 * n_all
