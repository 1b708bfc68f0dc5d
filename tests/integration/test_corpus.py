"""60,000 lines in 97 languages through two actors, from JSONL and from Parquet (slow)."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from erniem_batch.job import JobConfig, RunReport, run_job

N_FILES = 8

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def rows(shared_dir: Path) -> list[dict]:
    with gzip.open(shared_dir / "data" / "corpus" / "sample.jsonl.gz") as lines:
        return [{"id": f"{i:06d}", **json.loads(line)} for i, line in enumerate(lines)]


def run(folder: Path, name: str, **options: object) -> tuple[RunReport, dict[str, list[dict]]]:
    output = folder / f"out-{name}"
    report = run_job(
        JobConfig(
            input=[str(folder / name)],
            output=str(output),
            actors="2:2",
            num_cpus_per_actor=1,
            unit_bytes=200_000,
            **options,
        )
    )
    return report, {path.stem: pq.read_table(path).to_pylist() for path in output.glob("*.parquet")}


def test_corpus_from_jsonl_and_parquet(tmp_path: Path, rows: list[dict]) -> None:
    """Rows in == rows out, no file with rows of two units, order kept, both formats equal."""
    per_file = -(-len(rows) // N_FILES)
    for name in ("jsonl", "parquet"):
        (tmp_path / name).mkdir()
    for i in range(N_FILES):
        part = rows[i * per_file : (i + 1) * per_file]
        with (tmp_path / "jsonl" / f"part-{i:05d}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        path = tmp_path / "parquet" / f"part-{i:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(part), path, row_group_size=2_000)

    by_id = {}
    for name in ("jsonl", "parquet"):
        report, files = run(tmp_path, name)
        print(name, report.as_line())
        assert report.exit_code == 0
        assert report.n_rows == len(rows) == report.n_ok + report.n_dead
        assert len(files) == report.n_units
        found = []
        for stem in sorted(files):
            source = int(stem.split("-")[1])
            ids = [row["id"] for row in files[stem]]
            assert all(int(row_id) // per_file == source for row_id in ids)
            assert ids == sorted(ids)
            found += files[stem]
        assert [row["id"] for row in found] == [row["id"] for row in rows]
        assert [row["text"] for row in found] == [row["text"] for row in rows]
        for row in found:
            for entity in row["entities"]:
                assert row["text"][entity["start"] : entity["end"]] == entity["text"]
        by_id[name] = found

    different = 0
    for a, b in zip(by_id["jsonl"], by_id["parquet"], strict=True):
        spans = [[(e["start"], e["end"], e["label"]) for e in row["entities"]] for row in (a, b)]
        # Units hold other neighbours, so that batches differ, and sums round differently.
        scores = [[e["score"] for e in row["entities"]] for row in (a, b)]
        different += spans[0] != spans[1]
        if spans[0] == spans[1]:
            assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert different == 0
