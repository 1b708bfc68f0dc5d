"""`verify`: read everything that a manifest names, and say what is damaged and how to repair it.

The manifest decides which files there should be. `_run/` is not trusted: `run.json` only says which
column holds the text, and without it every column of strings is tried.
"""

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from erniem_batch import storage
from erniem_batch.errors import ConfigError, DamagedFile, StorageError
from erniem_batch.job.config import LANGUAGE_COLUMN, TEXT_FLAGS
from erniem_batch.job.letters import DEAD_LETTERS, LETTER_SCHEMA, output_of_letters
from erniem_batch.job.manifest import MANIFEST, SUCCESS, Entry, Manifest, read_manifest
from erniem_batch.job.rundir import RunFolder
from erniem_batch.job.samples import SIZES
from erniem_batch.job.segments import ERRORS
from erniem_batch.job.write import COUNTED_SCHEMA, MARKS, Marks, sidecar
from erniem_batch.options import OPTIONS

EXIT_DAMAGED = 1
THREADS = 8
BATCH_ROWS = 1000
SHOWN = 100  # names in the line of JSON
SPANS = ("entities", "extracted", "predicted_answers")
UNITS = ("codepoint", "utf16", "byte")
REPLAY = re.compile(r"^(.*)\.replay-(\d{1,6})$")

Row = Mapping[str, Any]
# A column and what its offsets count.
Place = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Damage:
    """A file that is not as the manifest says, and the remedy."""

    name: str
    what: str
    repair: str


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The outcome of `verify`.

    Attributes:
        files, dead_letter_files: That the manifest names.
        rows, dead_letters: That were read.
        checksums: Number of files whose SHA-256 was compared; older folders have none.
        spans: Number of entities, items or answers whose offsets gave their text.
        unnamed: Files beside those of the manifest. While a run is unfinished they may be its own.
        success: Whether `_SUCCESS` stands.
    """

    output: str
    files: int
    dead_letter_files: int
    rows: int = 0
    dead_letters: int = 0
    bytes: int = 0
    checksums: int = 0
    spans: int = 0
    success: bool = False
    damaged: Sequence[Damage] = ()
    unnamed: Sequence[str] = ()
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """0 sound; 1 damaged, or files beside a complete result that it does not name."""
        return EXIT_DAMAGED if self.damaged or (self.success and self.unnamed) else 0

    def as_line(self) -> str:
        """One line of JSON, with the first names of each kind."""
        values = asdict(self)
        values["damaged"] = values["damaged"][:SHOWN]
        values["unnamed"] = list(self.unnamed[:SHOWN])
        counts = {"n_damaged": len(self.damaged), "n_unnamed": len(self.unnamed)}
        return json.dumps({"exit_code": self.exit_code, **values, **counts})


@dataclass
class Checked:
    """What one file has shown.

    Attributes:
        kinds: Types of the columns with results, for comparison with other files.
    """

    name: str
    n_rows: int = 0
    n_bytes: int = 0
    n_spans: int = 0
    n_checksums: int = 0
    kinds: dict[str, str] = field(default_factory=dict)
    fault: str = ""
    is_absent: bool = False


class _Fault(Exception):
    """Something about a file is not as it should be."""


def verify(output: str) -> Verification:
    """Read all files that the manifest of a folder names.

    Raises:
        ConfigError: There is no manifest.
        StorageError: Storage failed, after all retries.
    """
    started = time.monotonic()
    folder = storage.normal(output)
    try:
        manifest = read_manifest(folder)
    except DamagedFile as error:
        broken = Damage(MANIFEST, str(error), "delete it and run the same command again")
        return Verification(output=folder, files=0, dead_letter_files=0, damaged=[broken])
    if manifest is None:
        raise ConfigError(
            f"{output} holds no results that could be verified (no {MANIFEST}): give the --output "
            f"of a run that was completed, or of a compaction"
        )
    places = _places(folder, manifest)
    data_check = partial(_check_data, folder, manifest, places)
    with ThreadPoolExecutor(THREADS) as pool:
        data = list(pool.map(data_check, manifest.files))
        letters = list(pool.map(partial(_check_letters, folder), manifest.dead_letters))
    _compare_schemas(data)
    damages = [_damage(manifest, checked) for checked in (*data, *letters) if checked.fault]
    success, fault = _success(folder)
    if fault:
        damages.append(Damage(SUCCESS, fault, "run the same command again"))
    return Verification(
        output=folder,
        files=len(data),
        dead_letter_files=len(letters),
        rows=sum(checked.n_rows for checked in data),
        dead_letters=sum(checked.n_rows for checked in letters),
        bytes=sum(checked.n_bytes for checked in data),
        checksums=sum(checked.n_checksums for checked in data),
        spans=sum(checked.n_spans for checked in data),
        success=success,
        damaged=damages,
        unnamed=sorted(_unnamed(folder, manifest)),
        seconds=round(time.monotonic() - started, 2),
    )


# ---- data files ---------------------------------------------------------------------------------


def _check_data(
    folder: str, manifest: Manifest, places: Sequence[Place] | None, entry: Entry
) -> Checked:
    checked = Checked(entry.name)
    read = _read_jsonl if entry.name.endswith(".jsonl") else _read_parquet
    try:
        with storage.local_copy(storage.join(folder, entry.name)) as (local, size, digest):
            checked.n_bytes = size
            _require_bytes(entry, size, digest)
            checked.n_checksums = int(bool(entry.sha256))
            read(folder, manifest, entry, local, checked, _Spans(places))
        if checked.n_rows != entry.n_rows:
            raise _Fault(f"it has {checked.n_rows} rows, the manifest says {entry.n_rows}")
    except FileNotFoundError:
        checked.fault, checked.is_absent = "it is missing", True
    except (_Fault, DamagedFile) as fault:
        checked.fault = str(fault)
    except (*ERRORS, UnicodeDecodeError, RecursionError) as error:
        checked.fault = f"it cannot be read ({type(error).__name__})"
    return checked


def _require_bytes(entry: Entry, size: int, digest: str) -> None:
    if entry.n_bytes is not None and size != entry.n_bytes:
        raise _Fault(f"it has {size:,} bytes, the manifest says {entry.n_bytes:,}")
    if entry.sha256 and digest != entry.sha256:
        raise _Fault("its SHA-256 is not the one in the manifest: its content has changed")


def _read_parquet(
    folder: str, manifest: Manifest, entry: Entry, local: str, checked: Checked, spans: "_Spans"
) -> None:
    with pq.ParquetFile(local, page_checksum_verification=True) as file:
        schema = file.schema_arrow
        checked.kinds = {f.name: str(f.type) for f in schema if f.name in RESULT_COLUMNS}
        if manifest.fingerprint:
            marks = (file.metadata.metadata or {}).get(MARKS)
            if marks is None:
                raise _Fault("it has no marks of a run")
            _require_marks(Marks.decode(marks, entry.name), manifest, entry)
        spans.begin(schema)
        for batch in file.iter_batches(BATCH_ROWS):
            checked.n_rows += len(batch)
            wanted = [name for name in spans.columns if name in schema.names]
            if wanted and len(batch):
                table = pa.Table.from_batches([batch]).select(wanted)
                checked.n_spans += spans.check(table.to_pylist())


def _read_jsonl(
    folder: str, manifest: Manifest, entry: Entry, local: str, checked: Checked, spans: "_Spans"
) -> None:
    path = sidecar(folder, entry.name)
    data = _sidecar_of(path)
    if data is None:
        raise _Fault("its sidecar in _run/sidecars is missing")
    marks = _require_marks(Marks.decode(data, path), manifest, entry)
    digests = {marks.sha256, entry.sha256} - {None, ""}
    if marks.n_bytes != checked.n_bytes or len(digests) > 1:
        raise _Fault("its sidecar in _run/sidecars is of another file")
    with open(local, encoding="utf-8", newline="\n") as lines:
        for line in lines:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise _Fault(f"row {checked.n_rows} is not a JSON object")
            if not checked.n_rows:
                checked.kinds = {name: "" for name in row if name in RESULT_COLUMNS}
                spans.begin_json(row)
            checked.n_spans += spans.check([row])
            checked.n_rows += 1


def _sidecar_of(path: str) -> bytes | None:
    try:
        return storage.read(path)
    except StorageError as error:
        if not isinstance(error.__cause__, IsADirectoryError):
            raise
        raise _Fault(f"its sidecar {path} is a folder, which has to be moved away") from None


def _require_marks(marks: Marks, manifest: Manifest, entry: Entry) -> Marks:
    if marks.fingerprint != manifest.fingerprint:
        raise _Fault("it was made with other settings than the manifest says")
    if marks.counts.get("n_ok") != entry.n_rows:
        raise _Fault(f"its marks say {marks.counts.get('n_ok')} rows, the manifest {entry.n_rows}")
    return marks


def _compare_schemas(data: Sequence[Checked]) -> None:
    """The columns with results have the same types in all files."""
    sound = [checked for checked in data if not checked.fault and checked.n_rows]
    if not sound:
        return
    expected = sound[0].kinds
    for checked in sound:
        if checked.kinds != expected:
            names = sorted(
                n for n in {*expected, *checked.kinds} if expected.get(n) != checked.kinds.get(n)
            )
            checked.fault = f"its columns {', '.join(names)} are not those of {sound[0].name}"
        elif absent := [name for name in COUNTED_SCHEMA.names if name not in checked.kinds]:
            checked.fault = f"it lacks the columns {', '.join(absent)}"


def _result_columns() -> frozenset[str]:
    names = {LANGUAGE_COLUMN, "extracted_json", *COUNTED_SCHEMA.names}
    for options in OPTIONS.values():
        names |= {*options().added_columns}
    return frozenset(names)


RESULT_COLUMNS = _result_columns()


# ---- offsets ------------------------------------------------------------------------------------


def _places(folder: str, manifest: Manifest) -> list[Place] | None:
    """Where run.json says that the text is; None if it does not say so of this manifest."""
    try:
        info = RunFolder(folder).read_info()
    except (ConfigError, StorageError):
        return None
    if info is None or info.fingerprint != manifest.fingerprint:
        return None
    settings = info.settings
    flag = TEXT_FLAGS.get(str(settings.get("task")), "--text-column").removeprefix("--")
    column, unit = settings.get(flag), settings.get("offset-unit", "codepoint")
    return [(column, unit)] if isinstance(column, str) and unit in UNITS else None


class _Spans:
    """Compares the text of spans with what their offsets give.

    Args:
        places: Columns and units to try; None: all columns of strings. As long as one of them fits
            all spans of the file, they are right.
    """

    def __init__(self, places: Sequence[Place] | None) -> None:
        self._given = places
        self._places: list[Place] = []
        self.columns: list[str] = []

    def begin(self, schema: pa.Schema) -> None:
        """Take the columns of a Parquet file."""
        strings = [
            f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)
        ]
        self._begin(strings, schema.names)

    def begin_json(self, row: Row) -> None:
        """Take the columns of a line of JSON."""
        self._begin([name for name, value in row.items() if isinstance(value, str)], list(row))

    def _begin(self, strings: Sequence[str], names: Sequence[str]) -> None:
        free = [name for name in strings if name not in RESULT_COLUMNS]
        places = [(name, unit) for name in free for unit in UNITS]
        if self._given is not None:
            places = [p for p in self._given if {p[0], p[0].partition(".")[0]} & set(names)]
        self._places = places
        tops = [name if name in names else name.partition(".")[0] for name, _ in places]
        self.columns = list(dict.fromkeys([*(n for n in SPANS if n in names), *tops]))
        if not any(name in names for name in SPANS):
            self.columns, self._places = [], []

    def check(self, rows: Sequence[Row]) -> int:
        """Compare the spans of some rows; gives their number.

        Raises:
            _Fault: Offsets do not give the text of a span.
        """
        n_spans = 0
        for row in rows:
            if not self._places:
                return n_spans
            spans = [s for name in SPANS for s in row.get(name) or () if s["start"] is not None]
            if not spans:
                continue
            fitting = [place for place in self._places if _fits(_text(row, place[0]), spans, place)]
            if not fitting and self._given is not None:
                raise _Fault("offsets of a span do not give its text")
            self._places = fitting
            n_spans += len(spans) if fitting else 0
        return n_spans


def _text(row: Row, column: str) -> Any:
    value: Any = row
    for name in [column] if column in row else column.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _fits(text: Any, spans: Sequence[Row], place: Place) -> bool:
    if not isinstance(text, str):
        return False
    if place[1] == "codepoint":
        return all(text[s["start"] : s["end"]] == s["text"] for s in spans)
    coding, size = SIZES[place[1]]
    data = text.encode(coding, "surrogatepass")
    pieces = (data[s["start"] * size : s["end"] * size] for s in spans)
    found = [piece.decode(coding, "replace") for piece in pieces]
    return found == [s["text"] for s in spans]


# ---- dead letters, names, repair ----------------------------------------------------------------


def _check_letters(folder: str, entry: Entry) -> Checked:
    checked = Checked(entry.name)
    try:
        with (
            storage.local_copy(storage.join(folder, entry.name)) as (local, size, _),
            pq.ParquetFile(local, page_checksum_verification=True) as file,
        ):
            checked.n_bytes = size
            if absent := set(LETTER_SCHEMA.names) - set(file.schema_arrow.names):
                raise _Fault(f"it lacks the columns {', '.join(sorted(absent))}")
            for batch in file.iter_batches(BATCH_ROWS):
                numbers = pc.fill_null(batch.column("n_rows"), 1)
                checked.n_rows += pc.sum(numbers).as_py() or 0
        if checked.n_rows != entry.n_rows:
            raise _Fault(f"it stands for {checked.n_rows} rows, the manifest says {entry.n_rows}")
    except FileNotFoundError:
        checked.fault, checked.is_absent = "it is missing", True
    except _Fault as fault:
        checked.fault = str(fault)
    except ERRORS as error:
        checked.fault = f"it cannot be read ({type(error).__name__})"
    return checked


def _success(folder: str) -> tuple[bool, str]:
    """Whether `_SUCCESS` stands, and what is wrong with it."""
    data = storage.read(storage.join(folder, SUCCESS))
    if data is None:
        return False, ""
    try:
        stated = json.loads(data)["manifest_sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return True, "it is damaged"
    fits = stated == storage.sha256_of(storage.join(folder, MANIFEST))
    return True, "" if fits else "it belongs to another manifest"


def _unnamed(folder: str, manifest: Manifest) -> Iterator[str]:
    """Data files and dead letters that the manifest does not name."""
    names = manifest.names
    for info in storage.find(folder):
        name = info.path[len(folder) + 1 :]
        inside = name.removeprefix(f"{DEAD_LETTERS}/")
        if not any(part.startswith(("_", ".")) for part in inside.split("/")) and name not in names:
            yield name


def _damage(manifest: Manifest, checked: Checked) -> Damage:
    if not manifest.fingerprint:
        repair = "run erniem-batch compact again"
    else:
        names = _to_delete(manifest, checked.name)
        if checked.is_absent and names == [checked.name]:
            repair = "run the same command again"
        else:
            repair = f"delete {', '.join(names)} and run the same command again"
    return Damage(checked.name, checked.fault, repair)


def _to_delete(manifest: Manifest, name: str) -> list[str]:
    """The file itself, and those that its unit needs anew: of dead letters the data file, of a
    replay all that it follows, because their dead letters are gone."""
    files = {entry.name.rpartition(".")[0]: entry.name for entry in manifest.files}
    stem = name.rpartition(".")[0]
    chosen = []
    if name.startswith(f"{DEAD_LETTERS}/"):
        chosen, stem = [name], output_of_letters(name)
    replay = REPLAY.match(stem)
    stems = [stem]
    if replay:
        stems = [replay[1], *(f"{replay[1]}.replay-{i + 1}" for i in range(int(replay[2])))]
    chosen += [files[s] for s in stems if s in files]
    return chosen or [name]
