"""What others read: the output of a run, and its compaction, by the tools that people have."""

import subprocess
import venv
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from fakes import write_jsonl

from erniem_batch.job import result_files
from erniem_batch.job.compact import compact

DATASETS = "datasets==5.2.0"


@pytest.fixture
def output(tmp_path: Path, job) -> Path:
    """Of two files, one with dead letters, compacted by language."""
    for i in range(2):
        rows = [
            {"id": f"{i:02}-{j:03}", "text": f"Ada {i} {j} in London", "lang": ["de", "fr"][j % 2]}
            for j in range(20)
        ]
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", [*rows, {"id": "bad", "text": None}])
    job(max_dead_letters="50%", unit_bytes=400)
    compact(str(tmp_path / "out"), str(tmp_path / "big"), ["lang"])
    return tmp_path


Row = tuple[str, str | None, int]


def row_of(name: str, entities: Any) -> Row:
    """Id, first entity and number of entities."""
    return name, entities[0]["text"] if len(entities) else None, len(entities)


def expected(output: Path) -> set[Row]:
    """All rows, from the files one by one."""
    found = {
        row_of(row["id"], row["entities"])
        for path in result_files(str(output / "out"))
        for row in pq.read_table(path).to_pylist()
    }
    assert len(found) == 40
    assert sum(n for _, _, n in found) > 40
    return found


def test_pyarrow_reads_the_folder(output):
    table = ds.dataset(output / "out").to_table(columns=["id", "entities"])
    assert {row_of(r["id"], r["entities"]) for r in table.to_pylist()} == expected(output)
    hive = ds.dataset(output / "big", partitioning="hive")
    assert hive.count_rows(filter=ds.field("lang") == "de") == 20


def test_pandas_reads_the_folder(output):
    frame = pd.read_parquet(output / "out")
    assert {row_of(r.id, r.entities) for r in frame.itertuples()} == expected(output)
    assert len(pd.read_parquet(output / "big", filters=[("lang", "=", "fr")])) == 20


def test_duckdb(output):
    duckdb = pytest.importorskip("duckdb")
    rows = duckdb.sql(
        f"SELECT id, entities[1].text, len(entities) FROM '{output}/out/*.parquet'"
    ).fetchall()
    assert set(rows) == expected(output)
    flat = duckdb.sql(
        f"SELECT count(*) FROM (SELECT unnest(entities) FROM '{output}/out/*.parquet')"
    ).fetchall()
    assert flat[0][0] == sum(n for _, _, n in expected(output))
    by_language = duckdb.sql(
        f"SELECT lang, count(*) FROM read_parquet('{output}/big/*/*.parquet', "
        "hive_partitioning = true) GROUP BY lang ORDER BY lang"
    ).fetchall()
    assert by_language == [("de", 20), ("fr", 20)]


def test_polars(output):
    pl = pytest.importorskip("polars")
    frame = pl.scan_parquet(f"{output}/out/*.parquet").select(
        "id",
        first=pl.col("entities").list.first().struct.field("text"),
        n=pl.col("entities").list.len(),
    )
    assert set(frame.collect().rows()) == expected(output)
    hive = pl.scan_parquet(f"{output}/big/*/*.parquet", hive_partitioning=True)
    assert hive.filter(pl.col("lang") == "de").select(pl.len()).collect().item() == 20


READ = """
import sys
from pathlib import Path
from typing import Any
from datasets import load_dataset
out, big, cache, *files = sys.argv[1:]
rows = load_dataset("parquet", data_files=files, cache_dir=cache)["train"]
print(sorted((r["id"], len(r["entities"])) for r in rows))
print(len(load_dataset("parquet", data_files=f"{out}/*.parquet", cache_dir=cache)["train"]))
print(len(load_dataset("parquet", data_dir=big, cache_dir=cache)["train"]))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_hugging_face_datasets(output, tmp_path):
    """In an environment of its own: it does not go with the transformers that runs ErnieM."""
    python = tmp_path / "venv" / "bin" / "python"
    venv.create(tmp_path / "venv", with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "-q", DATASETS], check=True)
    files = result_files(str(output / "out"))
    where = [output / "out", output / "big", tmp_path / "cache"]
    done = subprocess.run(
        [python, "-c", READ, *where, *files], check=True, capture_output=True, text=True
    )
    first, second, third = done.stdout.splitlines()
    assert first == str(sorted((name, n) for name, _, n in expected(output)))
    assert (second, third) == ("40", "40")
