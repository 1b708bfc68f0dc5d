import hashlib
import json
import threading

import pytest

from erniem_batch import storage
from erniem_batch.errors import Conflict, JobError
from erniem_batch.job.manifest import (
    MANIFEST,
    SUCCESS,
    Entry,
    Manifest,
    mark_success,
    publish,
    read_manifest,
    result_files,
    unmark_success,
)

NAMES = ["a.parquet", "sub/b-00001.parquet", 'odd "name" é\n.parquet']


def manifest(*names, letters=(), generation=1):
    files = [Entry(name, i, 100 + i) for i, name in enumerate(names)]
    return Manifest(generation, "f1", files, [Entry(name, 1) for name in letters])


@pytest.mark.parametrize(
    "made",
    [manifest(), manifest(*NAMES), manifest("a.parquet", letters=["_dead_letters/a.parquet"])],
)
def test_a_manifest_comes_back(tmp_path, made):
    assert publish(str(tmp_path), made) == set()
    assert read_manifest(str(tmp_path)) == made
    content = (tmp_path / MANIFEST).read_bytes()
    assert content == made.encode()
    values = json.loads(content)
    assert (values["format"], values["generation"], values["fingerprint"]) == (1, 1, "f1")
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
    publish(str(tmp_path), manifest("b.parquet", "a.parquet", letters=["_dead_letters/a.parquet"]))
    expected = [str(tmp_path / "b.parquet"), str(tmp_path / "a.parquet")]
    assert result_files(str(tmp_path)) == expected
    monkeypatch.chdir(tmp_path.parent)
    assert result_files(tmp_path.name) == expected


def test_names_that_only_the_one_before_had(tmp_path):
    publish(str(tmp_path), manifest("a.parquet", "b.parquet", letters=["_dead_letters/b.parquet"]))
    gone = publish(str(tmp_path), manifest("a.parquet", "b.2.parquet"))
    assert gone == {"b.parquet", "_dead_letters/b.parquet"}


def test_the_same_manifest_again_is_not_written(tmp_path):
    publish(str(tmp_path), manifest("a.parquet"))
    before = (tmp_path / MANIFEST).stat().st_mtime_ns
    assert publish(str(tmp_path), manifest("a.parquet")) == set()
    assert (tmp_path / MANIFEST).stat().st_mtime_ns == before


@pytest.mark.parametrize("first", [None, manifest("old.parquet")])
def test_who_publishes_second_is_told(tmp_path, monkeypatch, first):
    """Both have read the same one before: a zombie must not undo what came after it."""
    output = str(tmp_path)
    if first is not None:
        publish(output, first)
    read_versioned = storage.read_versioned

    def read_and_be_late(path):
        there = read_versioned(path)
        monkeypatch.setattr(storage, "read_versioned", read_versioned)
        publish(output, manifest("new.parquet"))
        return there

    monkeypatch.setattr(storage, "read_versioned", read_and_be_late)
    with pytest.raises(Conflict):
        publish(output, manifest("zombie.parquet"))
    assert result_files(output) == [str(tmp_path / "new.parquet")]


def test_a_reader_never_sees_half_of_it(tmp_path):
    """Each manifest names one generation of files only."""
    output = str(tmp_path)
    publish(output, manifest(*(f"0-{i}" for i in range(50))))
    done = threading.Event()
    seen = set()

    def look():
        while not done.is_set():
            seen.add(frozenset(name.split("-")[0] for name in read_manifest(output).names))

    reader = threading.Thread(target=look)
    reader.start()
    for generation in range(1, 30):
        publish(output, manifest(*(f"{generation}-{i}" for i in range(50))))
    done.set()
    reader.join()
    assert {len(generations) for generations in seen} == {1}


def test_success_holds_the_digest_of_the_manifest(tmp_path):
    output = str(tmp_path)
    made = manifest(*NAMES)
    publish(output, made)
    mark_success(output, made)
    digest = hashlib.sha256((tmp_path / MANIFEST).read_bytes()).hexdigest()
    assert json.loads((tmp_path / SUCCESS).read_bytes()) == {"manifest_sha256": digest}
    unmark_success(output)
    assert not (tmp_path / SUCCESS).exists()
    unmark_success(output)
