"""Odd names of input files: processed under a safe name, and no two under one."""

import json
import os

import pyarrow as pa
import pytest
from fakes import quick_jobs, write_jsonl, write_parquet
from hypothesis import given, settings
from hypothesis import strategies as st

from erniem_batch import storage
from erniem_batch.errors import ConfigError
from erniem_batch.job import result_files
from erniem_batch.job.units import (
    MOST_NAME_BYTES,
    MOST_PART_BYTES,
    ODD,
    files_of,
    find_files,
    output_stem,
)
from erniem_batch.job.verify import verify


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quick_jobs(monkeypatch)


LONG = "n" * 225
ODD_NAMES = [
    LONG,
    "n" * 226,
    "é" * 110,
    "new\nline",
    "esc\x1b[31m",
    "\u202etxt",
    "_hidden",
    ".dot",
    "quote\"'`$(x)",
    "~home",
    "star*[a]?",
    "100%",
    "100%0A",
    "looks~0123456789abcdef",
]


@pytest.mark.parametrize(
    "name", ["a", "de/x", "part-00042", "a.2", "naïve 漢字", "a%0A", "x~y", "n" * MOST_PART_BYTES]
)
def test_an_ordinary_name_stays(name):
    assert output_stem(name) == name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a\nb", "a%0Ab~"),
        ("a%\n", "a%25%0A~"),
        ("caf\uf7e9", "caf%E9~"),
        ("_a", "%5Fa~"),
        (".a", "%2Ea~"),
        ("d\u202ee/x", "d%E2%80%AEe/x~"),
        ("a//b", "a/%/b~"),
        ("a~0123456789abcdef", "a~0123456789abcdef~"),
        ("n" * 225, "n" * 180 + "~"),
    ],
)
def test_an_odd_name_is_written_with_digits(name, expected):
    made = output_stem(name)
    assert made[:-16] == expected
    assert int(made[-16:], 16) >= 0


parts = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), max_size=300)
names = st.lists(parts, min_size=1, max_size=5).map("/".join)


@settings(max_examples=200)
@given(names, names)
def test_names_of_outputs(one, other):
    made = output_stem(one)
    assert (made == output_stem(other)) == (one == other)
    assert output_stem(made) != made or made == one, "no input has the name that another gets"
    assert not ODD.search(made)
    assert len(made.encode()) <= MOST_NAME_BYTES + 200
    for part in made.split("/"):
        assert 0 < len(part.encode()) <= MOST_PART_BYTES
        assert not part.startswith((".", "_"))


@pytest.mark.parametrize("output_format", ["parquet", "jsonl"])
def test_one_odd_name_does_not_stop_a_corpus(tmp_path, job, output_format):
    """Two units of a file, dead letters and a replay have the longest names."""
    for i, name in enumerate(ODD_NAMES):
        if name[0] not in "._":
            write_jsonl(tmp_path / "in" / f"{name}.jsonl", [{"text": f"Ada {i}"}, {"text": 5}])
    hidden = [tmp_path / "other" / f"{name}.jsonl" for name in ODD_NAMES if name[0] in "._"]
    for path in hidden:  # given by name, they are wanted
        write_jsonl(path, [{"text": path.name}])
    inputs = [str(tmp_path / "in"), *map(str, hidden)]
    options = {"input": inputs, "max_dead_letters": "100", "output_format": output_format}
    report, _ = job(**options)
    assert (report.exit_code, report.n_units, report.n_ok) == (0, len(ODD_NAMES), len(ODD_NAMES))
    assert report.n_dead == len(ODD_NAMES) - len(hidden)
    report, _ = job(replay=True)
    assert (report.exit_code, report.n_ok) == (0, len(ODD_NAMES))
    report, done = job(**options)
    assert (report.exit_code, done) == (0, [])
    found = verify(str(tmp_path / "out"))
    assert (found.exit_code, found.damaged, found.unnamed) == (0, [], [])


def test_a_name_that_is_not_utf8(tmp_path, job):
    folder = os.fsencode(tmp_path / "in")
    os.makedirs(folder + b"/d\xff")
    for name in (b"caf\xe9.jsonl", b"d\xff/x.jsonl", b"plain.jsonl"):
        with open(folder + b"/" + name, "wb") as file:
            file.write(json.dumps({"text": "Ada"}).encode() + b"\n")
    report, _ = job()
    assert (report.exit_code, report.n_ok, report.n_units) == (0, 3, 3)
    stems = [path[len(str(tmp_path / "out")) + 1 :] for path in result_files(str(tmp_path / "out"))]
    assert [stem.partition("~")[0] for stem in stems] == ["caf%E9", "d%FF/x", "plain.parquet"]
    _, done = job()
    assert done == []
    given = os.fsdecode(folder + b"/caf\xe9.jsonl")
    (file,) = files_of(find_files([given]))
    assert storage.read(file.path) == b'{"text": "Ada"}\n'


def test_an_output_that_is_not_utf8(tmp_path, job):
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": "Ada"}])
    with pytest.raises(ConfigError, match="the name is not UTF-8"):
        job(output=os.fsdecode(os.fsencode(tmp_path) + b"/o\xe9"))


@pytest.mark.parametrize("name", ["dir[1]", "a*b", "what?", "~x"])
def test_an_existing_path_is_no_pattern(tmp_path, monkeypatch, name):
    write_jsonl(tmp_path / name / "in.jsonl", [{"text": "a"}])
    write_parquet(tmp_path / f"{name}.parquet", pa.table({"text": ["a"]}))
    write_jsonl(tmp_path / "a1b" / "no.jsonl", [{"text": "a"}])
    write_jsonl(tmp_path / "dir1" / "no.jsonl", [{"text": "a"}])
    monkeypatch.chdir(tmp_path)
    assert find_files([name])["name"].to_pylist() == ["in"]
    assert find_files([f"{name}.parquet"])["name"].to_pylist() == [name]


@pytest.mark.parametrize("name", ["~x.jsonl", "~nobody-has-this-name/x.jsonl"])
def test_a_tilde_of_nobody(tmp_path, monkeypatch, name):
    """Python raises a RuntimeError."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no file matches"):
        find_files([name])
    write_jsonl(tmp_path / name, [{"text": "a"}])
    assert find_files([name])["name"].to_pylist() == [name.rpartition("/")[2][:-6]]


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    assert find_files(["~/a.jsonl"])["name"].to_pylist() == ["a"]


def test_a_temporary_name_is_never_too_long(tmp_path):
    storage.write(str(tmp_path / ("é" * 127)), b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["é" * 127]
    assert list(storage.unfinished(str(tmp_path))) == []
