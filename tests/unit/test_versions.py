"""What makes a file another one: size, time of modification and time of change."""

import os
import time

import pyarrow as pa
import pytest
from fakes import Killed, quick_jobs, write_jsonl

from erniem_batch import storage
from erniem_batch.job.rundir import changed_files
from erniem_batch.job.units import FILE_SCHEMA, UNIT_SCHEMA


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quick_jobs(monkeypatch)


def older(version):
    """As releases before this one have written it down."""
    return version.rpartition("-c")[0]


def test_a_change_that_keeps_size_and_time_of_modification(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    before = storage.stat(str(path))
    state = path.stat()
    time.sleep(0.02)  # the clock of the file system steps by milliseconds
    path.write_bytes(path.read_bytes().replace(b"a", b"b"))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    after = storage.stat(str(path))
    assert older(before.version) == older(after.version) == f"{state.st_mtime_ns}-{state.st_size}"
    assert not storage.same_version(before.version, after.version)


@pytest.mark.parametrize(
    ("planned", "now", "same"),
    [
        ("5-7-c9", "5-7-c9", True),
        ("5-7", "5-7-c9", True),
        ("-5-7", "-5-7-c-9", True),
        ("5-7-c8", "5-7-c9", False),
        ("5-8", "5-7-c9", False),
        ("5", "5-7-c9", False),
        ("0123abcd-5", "0123abcd-5", True),
        ("0123abcd", "0123abcd-5", False),
        ("179", "180", False),
    ],
)
def test_versions_of_older_releases_still_match(planned, now, same):
    assert storage.same_version(planned, now) is same
    file = {"path": "p", "name": "n", "format": "jsonl", "size": 7, "version": now}
    files = pa.Table.from_pylist([file], FILE_SCHEMA)
    units = pa.Table.from_pylist([{"path": "p", "version": planned}], UNIT_SCHEMA)
    assert len(changed_files(files, units)) == (not same)


def test_an_old_night_goes_on(tmp_path, job, monkeypatch):
    """After an upgrade nothing looks changed, neither to the plan nor to who reads a unit."""
    for name in "abc":
        write_jsonl(tmp_path / "in" / f"{name}.jsonl", [{"text": f"Ada {name}"}])
    with monkeypatch.context() as patch:
        patch.setattr(storage, "_local_version", lambda s: f"{s.st_mtime_ns}-{s.st_size}")
        job(output=str(tmp_path / "whole"))
        with pytest.raises(Killed):
            job(units=1)
    report, done = job(output=str(tmp_path / "whole"))
    assert (report.exit_code, done) == (0, [])
    report, done = job()
    assert (report.exit_code, [r.output for r in done]) == (0, ["b.parquet", "c.parquet"])
