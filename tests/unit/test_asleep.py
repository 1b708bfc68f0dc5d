"""A run stands still before one of its effects on the output folder, and another run takes over.

Every effect of a run (a file that appears, is replaced, renamed or deleted) is counted. Before the
chosen one, a second run into the same folder is made from beginning to end; then the first goes on,
as a process does that was stopped for an hour. Whatever it does then must harm nothing.
"""

import hashlib
import json
import os
import random
from collections import Counter
from contextlib import contextmanager

import pyarrow.parquet as pq
import pytest
from fakes import KILLER, RefusingTagger, write_jsonl

from erniem_batch import storage
from erniem_batch.errors import ErnieMBatchError
from erniem_batch.job import compact as compact_module
from erniem_batch.job import lease as lease_module
from erniem_batch.job.compact import compact
from erniem_batch.job.lease import Lease

SEED = 23
SAMPLED = 1  # moments of each kind of run in the fast test


class Effects:
    """Counts the effects of this process on the files of a folder.

    Args:
        at: number of the effect before which `then` is called; None: only counting.
    """

    def __init__(self, folder, at=None, then=None):
        self.folder = str(folder)
        self.names = []
        self._at, self._then = at, then
        self._paused = False

    @contextmanager
    def counted(self, monkeypatch):
        with monkeypatch.context() as patch:
            for name in ("link", "rename", "replace", "unlink"):
                patch.setattr(os, name, self._counting(name, getattr(os, name)))
            yield self

    def _counting(self, name, function):
        def call(*arguments, **options):
            path = str(arguments[-1] if name in ("link", "replace") else arguments[0])
            if not self._paused and self._counts(name, path):
                self.names.append(f"{name} {path.removeprefix(self.folder)}")
                if len(self.names) - 1 == self._at:
                    self._paused = True
                    self._then()
                    self._paused = False
            return function(*arguments, **options)

        return call

    def _counts(self, name, path):
        own = name == "unlink" and path.endswith(".tmp")  # what is left of a rename
        return path.startswith(self.folder) and "lease.json" not in path and not own


@pytest.fixture
def asleep(monkeypatch):
    """Makes all leases of a moment those of a process that stands still; and wakes it up."""
    monkeypatch.setattr(lease_module, "BEAT_S", 0.02)
    monkeypatch.setattr(lease_module, "STALE_S", 0.1)
    monkeypatch.setattr(storage, "LOCK_SECONDS", 0.3)  # who holds a file's lock may stand still
    made = []
    acquire = Lease.acquire

    def noted(self):
        made.append(self)
        return acquire(self)

    monkeypatch.setattr(Lease, "acquire", noted)

    def call():
        for lease in made:
            lease._stop.set()
            if lease._thread.is_alive():
                lease._thread.join()

    return call


def rows_of(output):
    """How often each text is in the results; dead letters count as None."""
    manifest = json.loads((output / "_manifest.json").read_bytes())
    found = Counter()
    for entry in manifest["files"]:
        path = output / entry["name"]
        assert path.exists(), f"{entry['name']} is named and missing"
        assert path.stat().st_size == entry["n_bytes"]
        if path.suffix == ".parquet":
            texts = pq.read_table(path)["text"].to_pylist()
        else:
            texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        assert len(texts) == entry["n_rows"]
        found.update(texts)
    for entry in manifest["dead_letters"]:
        path = output / entry["name"]
        assert path.exists(), f"{entry['name']} is named and missing"
        letters = pq.read_table(path)
        assert len(letters) == entry["n_rows"]
        found.update(json.loads(line)["text"] for line in letters["line"].to_pylist())
    return found


def success_is_right(output):
    success, manifest = output / "_SUCCESS", (output / "_manifest.json").read_bytes()
    return success.exists() and json.loads(success.read_bytes()) == {
        "manifest_sha256": hashlib.sha256(manifest).hexdigest()
    }


def strays(output):
    """Files of data and dead letters that the manifest does not name."""
    manifest = json.loads((output / "_manifest.json").read_bytes())
    named = {entry["name"] for entry in (*manifest["files"], *manifest["dead_letters"])}
    there = {p.relative_to(output).as_posix() for p in output.rglob("*.*") if p.is_file()}
    there = {name for name in there if not name.startswith(("_run/", "_manifest"))}
    return {name for name in there if not name.endswith(".lock")} - named


class World:
    """An input folder, an output folder, and runs from one into the other."""

    def __init__(self, tmp_path, job):
        self.input, self.output = tmp_path / "in", tmp_path / "out"
        self.job = job
        self.want = {}
        for i in range(3):
            self.put(f"{i}.jsonl", [f"Ada {i} 0", f"Ada {i} 1", None, KILLER])
        self.options = {"max_dead_letters": "90%"}

    def put(self, name, texts):
        write_jsonl(self.input / name, [{"text": text} for text in texts])
        self.want[name] = texts

    @property
    def wanted(self):
        return Counter(text for texts in self.want.values() for text in texts)

    def run(self, **options):
        report, _ = self.job(**self.options, **options)
        assert report.exit_code == 0

    def prepare(self, kind):
        """What stands in the folder before the first run; and that run."""
        if kind == "first night":
            return self.run
        if kind == "first night, JSONL":
            self.options["output_format"] = "jsonl"
            return self.run
        if kind == "replay":
            report, _ = self.job(RefusingTagger, **self.options)
            assert report.n_dead == 6
            return lambda: self.run(replay=True)
        self.run()
        if kind == "overwrite":
            self.options["min_score"] = 0.6
            return lambda: self.run(overwrite=True)
        self.put("1.jsonl", ["Eva", None])
        self.put("7.jsonl", ["Bob", None])
        return self.run

    def second(self, kind, first):
        """The run that takes over."""
        if kind == "the same":
            return (lambda: self.run(replay=True)) if first == "replay" else self.repeat(first)
        if kind == "next night":
            self.put("0.jsonl", ["Zoe", None])
            self.put("9.jsonl", ["Max"])
            return self.repeat(first)
        self.options["min_score"] = 0.7
        return lambda: self.run(overwrite=True)

    def repeat(self, first):
        """The same command once more; an --overwrite that is complete is a run like any other."""
        return lambda: self.run(overwrite=first == "overwrite")


FIRST = ["first night", "first night, JSONL", "second night", "overwrite", "replay"]
SECOND = ["the same", "next night", "overwrite"]


def effects_of(tmp_path, job, monkeypatch, kind):
    """The effects of an undisturbed run."""
    run = World(tmp_path, job).prepare(kind)
    with Effects(tmp_path / "out").counted(monkeypatch) as effects:
        run()
    return effects.names


def disturb(world, first, second, at, asleep, monkeypatch):
    """One run that stands still before an effect; gives how both ended."""
    run = world.prepare(first)
    ended = {}

    def take_over():
        asleep()
        try:
            world.second(second, first)()
            ended["second"] = "complete"
        except ErnieMBatchError as error:
            ended["second"] = error

    with Effects(world.output, at, take_over).counted(monkeypatch) as effects:
        try:
            run()
            ended["first"] = "complete"
        except ErnieMBatchError as error:
            ended["first"] = error
    return ended, effects.names[at]


def check(world, first, second, at, asleep, monkeypatch):
    ended, effect = disturb(world, first, second, at, asleep, monkeypatch)
    told = f"{first} / {second}, before {at}: {effect}: {ended}"
    if ended["second"] == "complete":
        assert ended["first"] != "complete", told
        assert "taken over" in str(ended["first"]) or "another run" in str(ended["first"]), told
        assert rows_of(world.output) == world.wanted, told
        assert success_is_right(world.output), told
    elif (world.output / "_manifest.json").exists():
        rows_of(world.output)
    asleep()  # nobody renews a lease any more
    final = {"overwrite": True} if first == "overwrite" or second == "overwrite" else {}
    try:
        world.run(**final)
        world.run()
    except ErnieMBatchError as error:
        raise AssertionError(told) from error
    assert rows_of(world.output) == world.wanted, told
    assert success_is_right(world.output), told
    assert strays(world.output) <= {"_SUCCESS"}, told


@pytest.mark.parametrize("first", FIRST[1:])
def test_some_moments(tmp_path, job, asleep, monkeypatch, first):
    effects = effects_of(
        tmp_path / "count", _elsewhere(job, tmp_path / "count"), monkeypatch, first
    )
    generator = random.Random(f"{SEED} {first}")
    for number, at in enumerate(sorted(generator.sample(range(len(effects)), SAMPLED))):
        folder = tmp_path / f"{number}"
        world = World(folder, _elsewhere(job, folder))
        check(world, first, generator.choice(SECOND), at, asleep, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("first", FIRST)
def test_every_moment(tmp_path, job, asleep, monkeypatch, first, second):
    effects = effects_of(
        tmp_path / "count", _elsewhere(job, tmp_path / "count"), monkeypatch, first
    )
    wrong = []
    for at in range(len(effects)):
        folder = tmp_path / f"{at}"
        world = World(folder, _elsewhere(job, folder))
        try:
            check(world, first, second, at, asleep, monkeypatch)
        except AssertionError as error:
            wrong.append(str(error).splitlines()[0])
    assert not wrong, "\n".join(wrong)


def _elsewhere(job, folder):
    """The runs of the fixture, from and into folders of their own."""

    def call(*arguments, replay=False, **options):
        if not replay:
            options |= {"input": [str(folder / "in")]}
        return job(*arguments, replay=replay, output=str(folder / "out"), **options)

    return call


@pytest.mark.parametrize("at", range(5))
def test_a_compaction(tmp_path, job, asleep, monkeypatch, at):
    """Two compactions of two nights: the later one counts."""
    world = World(tmp_path, job)
    world.run()
    target = tmp_path / "big"
    compact(str(world.output), str(target))
    ended = {}

    def take_over():
        asleep()
        world.put("9.jsonl", ["Max"])
        try:
            world.run()
            compact(str(world.output), str(target))
            ended["second"] = "complete"
        except ErnieMBatchError as error:
            ended["second"] = error

    with Effects(target, at, take_over).counted(monkeypatch) as effects:
        try:
            compact(str(world.output), str(target))
            ended["first"] = "complete"
        except ErnieMBatchError as error:
            ended["first"] = error
    told = f"{effects.names[at]}: {ended}"
    asleep()
    if ended["second"] == "complete":
        assert ended["first"] != "complete", told
        assert success_is_right(target), told
    else:
        world.run()
        compact_module.compact(str(world.output), str(target))
    found = Counter(rows_of(target))
    assert found == Counter({k: n for k, n in world.wanted.items() if k is not None}), told
