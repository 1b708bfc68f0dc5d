"""A few damaged run folders; `python -m tests.fault.damage` has a thousand."""

from pathlib import Path

import pytest

from .damage import damage_runs


def test_damaged_run_folders(tmp_path: Path, tokenizer_dir: Path) -> None:
    outcome = damage_runs(tmp_path, tokenizer_dir, runs=6, seed=24)
    assert outcome.faults == []
    assert outcome.ends["resume 0"] > 1
    assert outcome.ends["verify 1"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_damaged_run_folders(tmp_path: Path, tokenizer_dir: Path) -> None:
    outcome = damage_runs(tmp_path, tokenizer_dir, runs=1000, seed=7)
    assert outcome.faults == []
