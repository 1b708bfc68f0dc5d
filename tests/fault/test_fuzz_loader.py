"""Some hundred damaged model folders, as the fuzzer makes them; `python -m tests.fault.fuzz_loader`
goes on for as long as one likes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _fuzz(keep: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fault.fuzz_loader", "--keep", str(keep), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory as Linux has them")
def test_damaged_folders_end_in_errors_of_ours(tmp_path: Path) -> None:
    told = _fuzz(tmp_path, "--cases", "100", "--seed", "7")
    assert "cases=100" in told
    assert told.endswith("faults=0\n")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_minutes(tmp_path: Path) -> None:
    assert _fuzz(tmp_path, "--minutes", "10", "--seed", "11").endswith("faults=0\n")
