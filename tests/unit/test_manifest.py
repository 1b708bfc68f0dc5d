import hashlib
import json
import threading
from dataclasses import replace

import pytest
from fakes import Alone

from erniem_batch import storage
from erniem_batch.errors import JobError
from erniem_batch.job.manifest import (
    MANIFEST,
    SUCCESS,
    Entry,
    Fence,
    Manifest,
    mark_success,
    publish,
    read_manifest,
    result_files,
    unmark_success,
)

ME = Alone()
NAMES = ["a.parquet", "sub/b-00001.parquet", 'odd "name" é\n.parquet']


def manifest(*names, letters=(), generation=1):
    files = [Entry(name, i, 100 + i) for i, name in enumerate(names)]
    return Manifest(generation, "f1", files, [Entry(name, 1) for name in letters])


@pytest.mark.parametrize(
    "made",
    [manifest(), manifest(*NAMES), manifest("a.parquet", letters=["_dead_letters/a.parquet"])],
)
def test_a_manifest_comes_back(tmp_path, made):
    content = publish(str(tmp_path), made, ME)
    assert content == (tmp_path / MANIFEST).read_bytes()
    assert read_manifest(str(tmp_path)) == replace(made, lease=Fence("me", 1))
    values = json.loads(content)
    assert (values["format"], values["generation"], values["fingerprint"]) == (1, 1, "f1")
    assert values["lease"] == {"owner": "me", "generation": 1}
    assert [entry["name"] for entry in values["files"]] == [e.name for e in made.files]


def test_one_file_a_line():
    """A million of them are read with common tools."""
    lines = manifest(*NAMES).encode().decode().splitlines()
    assert sum('"n_rows"' in line for line in lines) == len(NAMES)


def test_no_manifest(tmp_path):
    assert read_manifest(str(tmp_path)) is None
    with pytest.raises(JobError, match="no run has been completed there yet"):
        result_files(str(tmp_path))


def test_result_files_in_the_order_of_the_input(tmp_path, monkeypatch):
    publish(
        str(tmp_path), manifest("b.parquet", "a.parquet", letters=["_dead_letters/a.parquet"]), ME
    )
    expected = [str(tmp_path / "b.parquet"), str(tmp_path / "a.parquet")]
    assert result_files(str(tmp_path)) == expected
    monkeypatch.chdir(tmp_path.parent)
    assert result_files(tmp_path.name) == expected


def test_the_same_manifest_again_is_not_written(tmp_path):
    first = publish(str(tmp_path), manifest("a.parquet"), ME)
    before = (tmp_path / MANIFEST).stat().st_mtime_ns
    assert publish(str(tmp_path), manifest("a.parquet"), Alone(generation=2)) == first
    assert (tmp_path / MANIFEST).stat().st_mtime_ns == before


def test_the_same_manifest_is_written_against_a_run_that_may_wake_up(tmp_path):
    """Its swap would succeed if the file had not changed."""
    publish(str(tmp_path), manifest("a.parquet"), ME)
    publish(str(tmp_path), manifest("a.parquet"), Alone(generation=3, taken_over=3))
    assert read_manifest(str(tmp_path)).lease == Fence("me", 3)
    publish(str(tmp_path), manifest("a.parquet"), Alone(generation=4, taken_over=3))
    assert read_manifest(str(tmp_path)).lease == Fence("me", 3)


def test_a_manifest_of_an_older_release(tmp_path):
    """It names nobody, and its bytes stay as they are while it names the right files."""
    made = manifest("a.parquet")
    values = json.loads(made.encode())
    del values["lease"]
    old = json.dumps(values).encode()
    (tmp_path / MANIFEST).write_bytes(old)
    assert read_manifest(str(tmp_path)) == made
    assert publish(str(tmp_path), made, ME) == old


def test_a_later_generation_is_never_replaced(tmp_path):
    output = str(tmp_path)
    publish(output, manifest("new.parquet"), Alone(generation=5))
    with pytest.raises(JobError, match="a later run has published"):
        publish(output, manifest("old.parquet"), Alone(generation=4))
    assert result_files(output) == [str(tmp_path / "new.parquet")]


class Lost(Alone):
    """Has lost the lease; finds out at the proof that comes after so many."""

    def __init__(self, proofs):
        super().__init__()
        self.proofs = proofs

    def prove(self):
        self.proofs -= 1
        if self.proofs < 0:
            raise JobError("another run has taken over")


@pytest.mark.parametrize("first", [None, manifest("old.parquet")])
@pytest.mark.parametrize("proofs", [0, 1])
def test_who_publishes_second_is_told(tmp_path, monkeypatch, first, proofs):
    """Both have read the same one before: a run that wakes up must not undo what came after it,
    be it that it slept before the proof of its ownership or after it."""
    output = str(tmp_path)
    if first is not None:
        publish(output, first, ME)
    read_versioned = storage.read_versioned

    def read_and_be_late(path):
        there = read_versioned(path)
        monkeypatch.setattr(storage, "read_versioned", read_versioned)
        publish(output, manifest("new.parquet"), Alone(generation=2))
        return there

    monkeypatch.setattr(storage, "read_versioned", read_and_be_late)
    with pytest.raises(JobError, match="another run has taken over"):
        publish(output, manifest("late.parquet"), Lost(proofs))
    assert result_files(output) == [str(tmp_path / "new.parquet")]


def test_the_owner_publishes_over_the_late_write_of_a_run_before_it(tmp_path, monkeypatch):
    output = str(tmp_path)
    swap = storage.swap
    publish(output, manifest("old.parquet"), ME)

    def late(path, data, version):
        monkeypatch.setattr(storage, "swap", swap)
        publish(output, manifest("late.parquet"), ME)
        return swap(path, data, version)

    monkeypatch.setattr(storage, "swap", late)
    publish(output, manifest("new.parquet"), Alone(generation=2))
    assert result_files(output) == [str(tmp_path / "new.parquet")]


def test_a_reader_never_sees_half_of_it(tmp_path):
    """Each manifest names one generation of files only."""
    output = str(tmp_path)
    publish(output, manifest(*(f"0-{i}" for i in range(50))), ME)
    done = threading.Event()
    seen = set()

    def look():
        while not done.is_set():
            seen.add(frozenset(name.split("-")[0] for name in read_manifest(output).names))

    reader = threading.Thread(target=look)
    reader.start()
    for generation in range(1, 30):
        publish(output, manifest(*(f"{generation}-{i}" for i in range(50))), ME)
    done.set()
    reader.join()
    assert {len(generations) for generations in seen} == {1}


def test_success_holds_the_digest_of_the_manifest(tmp_path):
    output = str(tmp_path)
    mark_success(output, publish(output, manifest(*NAMES), ME), ME)
    digest = hashlib.sha256((tmp_path / MANIFEST).read_bytes()).hexdigest()
    assert json.loads((tmp_path / SUCCESS).read_bytes()) == {"manifest_sha256": digest}
    unmark_success(output, ME)
    assert not (tmp_path / SUCCESS).exists()
    unmark_success(output, ME)
