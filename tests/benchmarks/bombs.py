"""Memory of the batch job over inputs that are large, or that stand for much more than their size.

    python -m tests.benchmarks bombs [--gigabytes 5]

Runs `erniem-batch ner` with a tiny model over an ordinary compressed shard and over bombs, and
watches each process of the run: its largest resident memory, as the kernel knows it. The driver is
the command itself; `ray::` processes are the actors.
"""

import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cyclopts import App

MEMBER_BYTES = 64 << 20
BALLAST_BYTES = 100_000
LOOK_EVERY_S = 0.2

app = App(help=__doc__)


@app.default
def main(
    *, gigabytes: float = 5.0, bombs: bool = True, folder: Path | None = None
) -> dict[str, Any]:
    """Prints a line of JSON: megabytes of the largest process of each kind.

    Args:
        gigabytes: Of the ordinary shard, decompressed.
        bombs: Whether there are bombs beside it.
        folder: For the corpus and the results; default: a temporary one.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        work = Path(scratch)
        model = make_model(work / "model")
        write_shard(work / "in" / "ordinary.jsonl.gz", gigabytes)
        if bombs:
            write_bombs(work / "in")
        found = watched_run(work / "in", work / "out", model)
    print(json.dumps(found))
    return found


def make_model(folder: Path) -> Path:
    """A tiny model of random weights."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from fakes import save_tiny_ner_model

    from erniem_batch import ErnieMTokenizer

    data = Path(__file__).parents[1] / "data" / "tiny_tokenizer"
    return save_tiny_ner_model(folder, ErnieMTokenizer.from_pretrained(data))


# ---- inputs -----------------------------------------------------------------------------------


def write_shard(path: Path, gigabytes: float) -> None:
    """Rows of a short text and 100 kB of other columns, in many members of one gzip file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    letters = np.random.default_rng(7).integers(97, 123, BALLAST_BYTES, np.uint8).tobytes().decode()
    rows = (
        {"id": f"{i:04}", "text": f"Ada {i} in London", "ballast": letters[i:] + letters[:i]}
        for i in range(MEMBER_BYTES // BALLAST_BYTES)
    )
    member = gzip.compress("".join(f"{json.dumps(row)}\n" for row in rows).encode(), 1)
    with path.open("wb") as file:
        for _ in range(max(1, round(gigabytes * (1 << 30) / MEMBER_BYTES))):
            file.write(member)


def write_bombs(folder: Path) -> None:
    """Small files that stand for gigabytes, and rows just below and above the limits."""
    _write_lines(folder / "one-line.jsonl.gz", [_line(b"x", 600 << 20)])
    _write_lines(folder / "below.jsonl.gz", [_line(b"x", 60 << 20)] * 4)
    wide = _line(b"x", 60 << 20).replace(b'"x', '"😀x'.encode(), 1)
    _write_lines(folder / "wide.jsonl.gz", [wide] * 4)
    _write_lines(folder / "long-text.jsonl.gz", [_line(b"word ", 60 << 20, b"text")] * 2)
    _write_lines(folder / "text.jsonl.gz", [_line(b"word ", 4_000_000, b"text")] * 2)
    _write_lines(
        folder / "lists.jsonl.gz", [b'{"text": "a", "v": [' + b"[]," * 20_000_000 + b"1]}"]
    )
    many = b'{"text": "a", "v": [' + b"[]," * 450_000 + b"1]}"
    _write_lines(folder / "many.jsonl.gz", [many] * 4)
    _write_lines(
        folder / "bad.jsonl.gz", [b'{"text": null, "v": "' + b"x" * 100_000 + b'"}'] * 10_000
    )
    columns = [b'{"text": "a", "c%d": %d}' % (i, i) for i in range(20_000)]
    _write_lines(folder / "types.jsonl.gz", [_line(b"x", 1 << 20)] * 99 + columns[:300])
    n, large = 1000, "b " * 500_000
    one = pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([large]))
    lists = pa.ListArray.from_arrays(pa.array(range(n + 1), pa.int32()), one)
    small = {"id": [str(i) for i in range(n)], "text": ["Ada."] * n}
    _write(folder / "dictionary.parquet", {**small, "x": one})
    _write(folder / "strings.parquet", {**small, "x": one}, store_schema=False)
    _write(folder / "nested.parquet", {**small, "x": lists}, store_schema=False)
    _write(folder / "dead.parquet", {"text": pa.nulls(n, pa.string()), "x": one})
    fixed = pa.array([large.encode()] * n, pa.binary(len(large)))
    _write(folder / "fixed.parquet", {**small, "x": fixed})
    _write(folder / "page.parquet", {"text": ["x" * (700 << 20)]}, use_dictionary=False)
    _write(folder / "row.parquet", {"text": ["a", "b"], "x": ["x" * (70 << 20), "b"]})
    bits = pa.Array.from_buffers(pa.bool_(), 1 << 29, [None, pa.py_buffer(bytes(1 << 26))])
    runs = pa.ListArray.from_arrays(pa.array([0, 1 << 29], pa.int32()), bits)
    _write(folder / "runs.parquet", {"text": ["a"], "x": runs})
    prefixes = pa.array([f"{large}{i}" for i in range(300)])
    encoding = {"x": "DELTA_BYTE_ARRAY", "text": "PLAIN"}
    values = {"text": ["Ada."] * 300, "x": prefixes}
    _write(folder / "delta.parquet", values, use_dictionary=False, column_encoding=encoding)


def _line(unit: bytes, n_bytes: int, column: bytes = b"ballast") -> bytes:
    values = {b"text": b"Ada in London", column: unit * (n_bytes // len(unit))}
    return b"{" + b", ".join(b'"%s": "%s"' % pair for pair in values.items()) + b"}"


def _write_lines(path: Path, lines: list[bytes]) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        for line in lines:
            file.write(line + b"\n")


def _write(path: Path, columns: dict[str, Any], **options: Any) -> None:
    pq.write_table(pa.table(columns), path, compression="zstd", **options)


# ---- the run ----------------------------------------------------------------------------------


def watched_run(source: Path, output: Path, model: Path) -> dict[str, Any]:
    """Runs the command and watches its processes."""
    command = [sys.executable, "-m", "erniem_batch.cli", "ner", "--input", str(source)]
    command += ["--output", str(output), "--model", str(model), "--actors", "1"]
    command += ["--window-tokens", "64", "--overlap-tokens", "16", "--max-dead-letters", "100%"]
    log = output.with_suffix(".log")
    started = time.monotonic()
    peaks: dict[str, int] = {}
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr, stdout=stderr)
        while process.poll() is None:
            for kind, megabytes in _largest(process.pid):
                peaks[kind] = max(peaks.get(kind, 0), megabytes)
            time.sleep(LOOK_EVERY_S)
    if process.returncode:
        raise RuntimeError(log.read_text(encoding="utf-8")[-4000:])
    report = json.loads((output / "_run" / "report.json").read_text(encoding="utf-8"))
    counts = {name: report[name] for name in ("n_rows", "n_ok", "n_dead")}
    return {"peak_mb": peaks, **counts, "seconds": round(time.monotonic() - started, 1)}


def _largest(driver: int) -> Iterator[tuple[str, int]]:
    """Kind and largest memory of each process of a run, as far as it still is there."""
    for pid in _family(driver):
        try:
            status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
            name = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
        except OSError:
            continue
        peak = next((line for line in status.splitlines() if line.startswith("VmHWM")), "VmHWM: 0")
        kind = "driver" if pid == driver else "actor" if name.startswith("ray::") else "ray"
        yield kind, int(peak.split()[1]) >> 10


def _family(driver: int) -> set[int]:
    """A process and all that descend from it."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text(encoding="utf-8")
            except OSError:
                continue
            parents[int(entry)] = int(stat.rpartition(")")[2].split()[1])
    family = {driver}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family


if __name__ == "__main__":
    app()
