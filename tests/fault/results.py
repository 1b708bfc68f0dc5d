"""What stands in an output folder, read as a user would, and how two of them differ."""

import hashlib
import io
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq

from erniem_batch import storage

from .corpus import ids_in

MANIFEST = "_manifest.json"
SUCCESS = "_SUCCESS"
# Of a dead letter, what may differ between two runs.
OWN_OF_A_RUN = ("time", "attempts")
KEPT = ("_run/run.json", "_run/lease.json", "_run/report.json", "_run/report.html")
RECORDS = ("_run/plan", "_run/ledger", "_run/findings")
SCORE_TOLERANCE = 1e-5


@dataclass
class Result:
    """A complete output folder.

    Attributes:
        digests: SHA-256 of the data files that the manifest names.
        rows: their content.
        letters: rows of the dead letters that it names, without OWN_OF_A_RUN.
        ids: how often each row of the input is in one of the two.
        faults: what is not as promised, whatever the content.
    """

    manifest: bytes
    digests: dict[str, str] = field(default_factory=dict)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    letters: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    ids: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


@dataclass
class Difference:
    """How a result differs from the one it should be."""

    lost: int = 0
    repeated: int = 0
    files: int = 0
    problems: list[str] = field(default_factory=list)


def read_result(output: str) -> Result:
    """Everything in the folder, with what is wrong about it."""
    manifest = storage.read(f"{output}/{MANIFEST}")
    if manifest is None:
        return Result(b"", faults=["no manifest"])
    result = Result(manifest)
    names = json.loads(manifest)
    for entry in names["files"]:
        data = storage.read(f"{output}/{entry['name']}")
        if data is None:
            result.faults.append(f"{entry['name']} is in the manifest and not there")
            continue
        result.digests[entry["name"]] = digest(data)
        rows = content(entry["name"], data)
        result.rows[entry["name"]] = rows
        result.ids.update(row["id"] for row in rows)
        if (entry["n_rows"], entry["n_bytes"]) != (len(rows), len(data)):
            result.faults.append(f"{entry['name']} is not as the manifest says")
    for entry in names["dead_letters"]:
        data = storage.read(f"{output}/{entry['name']}")
        if data is None:
            result.faults.append(f"{entry['name']} is in the manifest and not there")
            continue
        letters = content(entry["name"], data)
        result.ids.update(map(letter_id, letters))
        for letter in letters:
            for name in OWN_OF_A_RUN:
                del letter[name]
        result.letters[entry["name"]] = letters
    result.faults += _stray_files(output, result)
    success = storage.read(f"{output}/{SUCCESS}")
    if success is None:
        result.faults.append(f"no {SUCCESS}")
    elif json.loads(success)["manifest_sha256"] != digest(manifest):
        result.faults.append(f"{SUCCESS} holds the digest of another manifest")
    return result


def _stray_files(output: str, result: Result) -> Iterator[str]:
    known = {MANIFEST, SUCCESS, *KEPT, *result.digests, *result.letters}
    known |= {f"_run/sidecars/{name}.json" for name in result.digests if name.endswith(".jsonl")}
    for name in sorted(names_in(output)):
        folder, _, last = name.rpartition("/")
        is_lock = last.startswith(".") and last.endswith(".lock")
        is_record = folder in RECORDS and last.endswith(".parquet")
        if name not in known and not is_lock and not (is_record and not last.startswith(".")):
            yield f"stray file {name}"


def names_in(output: str) -> dict[str, str]:
    """Names and versions of all files in a folder."""
    start = len(output) + 1
    return {info.path[start:]: info.version for info in storage.find(output)}


def is_data(name: str) -> bool:
    """Whether it is the name of a result, as readers see it."""
    return not any(part.startswith(("_", ".")) for part in name.split("/"))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def content(name: str, data: bytes) -> list[dict[str, Any]]:
    """Rows of a file; raises whatever its reader raises if it is not whole."""
    if name.endswith(".jsonl"):
        text = data.decode()
        if text and not text.endswith("\n"):
            raise ValueError("the last line is not complete")
        return [json.loads(line) for line in text.splitlines()]
    return list(pq.read_table(io.BytesIO(data)).to_pylist())


def letter_id(letter: Mapping[str, Any]) -> str:
    """The id of the row that became a dead letter."""
    if letter.get("row") is not None:
        return str(letter["row"]["id"])
    return ids_in([(letter["line"] or b"").decode(errors="replace")])[0]


def compare(result: Result, reference: Result, loose: set[str]) -> Difference:
    """What is different, where nothing should be.

    Args:
        loose: output files whose batches a fault has rightly changed: rows and spans must be the
            same, scores nearly.
    """
    lost, more = reference.ids - result.ids, result.ids - reference.ids
    found = Difference(lost.total(), more.total(), problems=list(result.faults))
    for name in sorted(result.digests.keys() | reference.digests.keys()):
        same = result.digests.get(name) == reference.digests.get(name)
        if not same and name in loose and name in result.rows and name in reference.rows:
            same = _nearly_equal(result.rows[name], reference.rows[name])
        if not same:
            found.files += 1
            found.problems.append(f"{name} differs")
    for name in sorted(result.letters.keys() | reference.letters.keys()):
        if result.letters.get(name) != reference.letters.get(name):
            found.problems.append(f"{name} differs")
    if _named(result, loose) != _named(reference, loose):
        found.problems.append("the manifest differs")
    return found


def _named(result: Result, loose: set[str]) -> Any:
    """The manifest, but for what may differ: who has published it."""
    if not result.manifest:
        return None
    values = json.loads(result.manifest)
    del values["lease"], values["checksum"]
    for entry in values["files"]:
        if entry["name"] in loose:
            del entry["n_bytes"], entry["sha256"]
    return values


def _nearly_equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=0, abs_tol=SCORE_TOLERANCE)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_nearly_equal(one[k], other[k]) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_nearly_equal, one, other))
    return bool(one == other)


class Reader:
    """Somebody who reads the folder all the time and must never see anything unfinished.

    - a file under its final name is whole, whenever it is looked at;
    - all that the manifest names is there, with the size it says;
    - while there is a _SUCCESS, it is that of the manifest, and no file is beside it.

    Args:
        pause: seconds between two looks.

    Attributes:
        problems: what was seen that must not be.
        digests: of data files, all contents that were seen under a name.
        tries: the highest number of an attempt seen at each unit.
        n_looks: how often the folder was looked at.
    """

    def __init__(self, output: str, pause: float = 0.1) -> None:
        self.problems: list[str] = []
        self.digests: dict[str, set[str]] = {}
        self.tries: dict[str, int] = {}
        self.n_looks = 0
        self._output = output
        self._pause = pause
        self._seen: set[tuple[str, str]] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)

    def __enter__(self) -> "Reader":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(60)

    def _look_on(self) -> None:
        while not self._stop.wait(self._pause):
            try:
                self.look()
            except Exception as error:
                self.problems.append(f"reader: {type(error).__name__}: {error}")
                time.sleep(1)

    def look(self) -> None:
        """Once."""
        self.n_looks += 1
        manifest, success = self._read(MANIFEST), self._read(SUCCESS)
        names = names_in(self._output)
        for name, version in names.items():
            if (name, version) in self._seen:
                continue
            if is_data(name) or (name.startswith("_dead_letters/") and "/." not in name):
                self._check_file(name, version)
            elif name.startswith("_run/attempts/") and "/." not in name:
                self._check_attempt(name)
        changed = self._read(MANIFEST) != manifest or self._read(SUCCESS) != success
        if not changed and manifest is not None:
            self._check_manifest(json.loads(manifest), names)
        if not changed and success is not None:
            self._check_success(success, manifest, names)

    def _read(self, name: str) -> bytes | None:
        return storage.read(f"{self._output}/{name}")

    def _check_file(self, name: str, version: str) -> None:
        data = self._read(name)
        if data is None:  # it was replaced by a later one and removed
            return
        self._seen.add((name, version))
        try:
            content(name, data)
        except Exception as error:
            self.problems.append(f"reader: {name} is not whole: {type(error).__name__}: {error}")
        if is_data(name):
            self.digests.setdefault(name, set()).add(digest(data))

    def _check_attempt(self, name: str) -> None:
        data = self._read(name)
        if data:
            unit = name.rpartition("/")[2].removesuffix(".json")
            number = json.loads(data)["number"]
            self.tries[unit] = max(number, self.tries.get(unit, 0))

    def _check_manifest(self, values: dict[str, Any], names: dict[str, str]) -> None:
        for entry in (*values["files"], *values["dead_letters"]):
            if entry["name"] not in names:
                self.problems.append(f"reader: {entry['name']} of the manifest is not there")

    def _check_success(self, success: bytes, manifest: bytes | None, names: dict[str, str]) -> None:
        if manifest is None or json.loads(success)["manifest_sha256"] != digest(manifest):
            self.problems.append(f"reader: {SUCCESS} without its manifest")
            return
        values = json.loads(manifest)
        named = {entry["name"] for entry in (*values["files"], *values["dead_letters"])}
        beside = [name for name in names if is_data(name) and name not in named]
        if beside:
            self.problems.append(f"reader: {SUCCESS} stands while {beside[0]} is not in it")
