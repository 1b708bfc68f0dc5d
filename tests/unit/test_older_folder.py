"""A folder that an older release has written is read, resumed and extended.

`tests/data/older_run` was written by commit 9b8135c with the demo model: leases without
generations, a manifest and a ledger without checksums, dead letters named after their unit alone,
local files known by size and time of modification. Only the path of the corpus was changed in the
plan.
"""

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import ner_config, quick_jobs, tag_here, write_jsonl

from erniem_batch import cli
from erniem_batch.job import JobConfig, replay_job, result_files, run_job
from erniem_batch.job.manifest import read_manifest

OLDER = Path(__file__).parents[1] / "data" / "older_run"


@pytest.fixture(params=["parquet", "jsonl"])
def output(request, tmp_path):
    """A copy whose corpus lies in tmp_path/in, as old as it was."""
    folder = tmp_path / "out"
    shutil.copytree(OLDER / request.param, folder)
    shutil.copytree(OLDER / "in", tmp_path / "in")
    plan = folder / "_run" / "plan" / "001-00001.parquet"
    table = pq.read_table(plan)
    for path, version in zip(
        *(table[name].to_pylist() for name in ("path", "version")), strict=True
    ):
        modified = int(version.partition("-")[0])
        os.utime(tmp_path / "in" / Path(path).name, ns=(modified, modified))
    at = table.schema.names.index("path")
    paths = [str(tmp_path / "in" / Path(path).name) for path in table["path"].to_pylist()]
    pq.write_table(table.set_column(at, "path", pa.array(paths)), plan)
    return folder


def rows_of(output):
    found = {}
    for path in result_files(str(output)):
        if path.endswith(".jsonl"):
            rows = [
                json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()
            ]
        else:
            rows = pq.read_table(path).to_pylist()
        found |= {row["id"]: row for row in rows}
    return found


def run_again(tmp_path, output, **options):
    config = ner_config(
        JobConfig,
        input=[str(tmp_path / "in")],
        output=str(output),
        model="demo",
        max_dead_letters="5",
        output_format="jsonl" if (output / "a.jsonl").exists() else "parquet",
        **options,
    )
    return run_job(config)


def test_it_is_read(output, capsys):
    rows = rows_of(output)
    assert sorted(rows) == ["a0", "a1", "a3", "b0", "b1", "b2", "c0", "c2"]
    assert [entity["text"] for entity in rows["a0"]["entities"]] == ["Ada Lovelace", "London"]
    assert cli.main(["status", str(output)]) == 0
    assert cli.main(["verify", str(output)]) == 0
    capsys.readouterr()


def test_it_is_resumed_and_extended(tmp_path, output, monkeypatch):
    quick_jobs(monkeypatch)
    done = tag_here(monkeypatch)
    before, names = rows_of(output), {entry.name for entry in read_manifest(str(output)).files}
    report = run_again(tmp_path, output)
    assert (report.exit_code, len(done), report.n_rows) == (0, 0, 10), "nothing is new"
    assert rows_of(output) == before

    new = [{"id": "d0", "lang": "xx", "text": "Ada Lovelace lived in London."}]
    write_jsonl(tmp_path / "in" / "d.jsonl", new)
    write_jsonl(tmp_path / "in" / "c.jsonl", [{**new[0], "id": "c9"}])  # changed
    report = run_again(tmp_path, output)
    assert (report.exit_code, len(done)) == (0, 2)
    after = rows_of(output)
    kept = {key: row for key, row in before.items() if not key.startswith("c")}
    same = {key: {**before["a0"], "id": key} for key in ("c9", "d0")}
    assert after == kept | same
    suffix = "jsonl" if "a.jsonl" in names else "parquet"
    assert {entry.name for entry in read_manifest(str(output)).files} == {
        f"a.{suffix}", f"b.{suffix}", f"c.2.{suffix}", f"d.{suffix}",
    }  # fmt: skip
    assert cli.main(["verify", str(output)]) == 0


def test_its_dead_letters_are_replayed(output, monkeypatch):
    quick_jobs(monkeypatch)
    done = tag_here(monkeypatch)
    report = replay_job(str(output), {"max_dead_letters": "5"})
    assert (report.exit_code, len(done), report.n_dead) == (0, 2, 2), "they are still bad"
    assert len(rows_of(output)) == 8
    assert cli.main(["verify", str(output)]) == 0
