"""Plans and resumes a million units: seconds and memory of the driver.

    python tests/benchmarks/million_units.py [--files 1000000] [--units-per-file 1] [--done 0.5]

Listing and ledger are simulated: the input files and the results exist in listings only, and the
ledger holds a receipt for each result. What runs is the job's own code: planning, writing and
reading the plan, comparing it with ledger and listing, naming the manifest's files.
"""

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.compute as pc
from cyclopts import App

from erniem_batch import storage
from erniem_batch.job import rundir, units
from erniem_batch.job.actor import RECEIPT_SCHEMA
from erniem_batch.job.report import manifest_of, verify
from erniem_batch.storage import FileInfo

UNIT_BYTES = 1 << 20


app = App(help=__doc__)


@app.default
def main(*, files: int = 1_000_000, units_per_file: int = 1, done: float = 0.5) -> None:
    """Prints a line for each step; planning and resuming are processes of their own, as in life."""
    with tempfile.TemporaryDirectory() as output:
        for phase in ("plan", "resume"):
            command = [sys.executable, __file__, phase, output, str(files), str(units_per_file)]
            subprocess.run([*command, str(done)], check=True)


@app.command
def plan(output: str, files: int, units_per_file: int, done: float) -> None:
    """The first run, which is killed when a part is done."""
    memory("plan: start")
    folder = rundir.RunFolder(output)
    started = time.perf_counter()
    planned = units.to_table(
        units.plan_units(units.files_of(found(output, files, units_per_file)), UNIT_BYTES, "text")
    )
    units.require_unique(planned)
    folder.add_to_plan(1, 1, planned)
    step("planned", started, len(planned))
    folder.add_to_ledger(1, receipts(planned.slice(0, int(len(planned) * done))))


@app.command
def resume(output: str, files: int, units_per_file: int, done: float) -> None:
    """The second run, up to where it would start Ray; and what it does at its end."""
    memory("resume: start")
    folder = rundir.RunFolder(output)
    info = rundir.RunInfo(
        generation=1, fingerprint="f", settings={"output-format": "parquet"}, schema="", job={}
    )
    results = folder.read_ledger(1)["output"]
    listing = pa.table({"file": results, "size": pa.array([1000] * len(results), pa.int64())})
    started = time.perf_counter()
    planned = rundir.current_units(folder.read_plan(1))
    new = rundir.changed_files(found(output, files, units_per_file), planned)
    state = folder.assess(planned, info, listing)
    assert (len(new), len(state.done)) == (0, len(results))
    assert len(state.done) + len(state.todo) == len(planned)
    step("resumed", started, len(state.done))
    started = time.perf_counter()
    verify(state)
    data = manifest_of(state, info).encode()
    step(f"verified, manifest of {len(data) >> 20} MiB", started, len(state.done))


def found(output: str, files: int, units_per_file: int) -> pa.Table:
    """The input files, from a listing that is made up."""
    with patch.object(storage, "find", lambda path: inputs(files, units_per_file)):
        return units.find_files([f"{output}/in"])


def inputs(n_files: int, units_per_file: int) -> Iterator[FileInfo]:
    size = UNIT_BYTES * units_per_file
    return (
        FileInfo(f"/corpus/in/shard-{i % 1000:04d}/part-{i:07d}.jsonl", size, f"v{i}")
        for i in range(n_files)
    )


def receipts(planned: pa.Table) -> pa.Table:
    n = len(planned)
    names = pc.binary_join_element_wise(planned["output"], pa.scalar("parquet"), ".")
    columns = {"unit_id": planned["id"], "output": names, "error": pa.array([""] * n)}
    for field in RECEIPT_SCHEMA:
        if field.name not in columns:
            one = {"n_rows": 10, "n_ok": 10, "output_bytes": 1000}.get(field.name, 0)
            columns[field.name] = pa.array([one] * n, pa.int64()).cast(field.type)
    return pa.table(columns).select(RECEIPT_SCHEMA.names).cast(RECEIPT_SCHEMA)


def step(name: str, started: float, n: int) -> None:
    print(f"{name:40} {n:10,} units {time.perf_counter() - started:7.1f} s", end="  ")
    memory("")


def memory(name: str) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    status = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]
    print(f"{name} now {int(status) // 1024:,} MiB, peak {peak:,.0f} MiB")


if __name__ == "__main__":
    pa.set_memory_pool(pa.system_memory_pool())  # as the command line does
    app()
