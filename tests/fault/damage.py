"""Damage to a run folder, at random: whatever it is, no command may fail without saying why.

    python -m tests.fault.damage --runs 1000 --seed 7

Finished and interrupted run folders, Parquet and JSONL, are copied, and files of `_run/`, the
manifest and `_SUCCESS` are truncated, changed, replaced, deleted or joined by foreign ones. Then
every command that reads a run folder is called. None may end with a traceback. A run that succeeds
must have the results of the undisturbed one; one that refuses must leave published results as they
are, and with --overwrite it must succeed.
"""

import io
import json
import logging
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from cyclopts import App
from fakes import Kept, Killed, UnitsHere, save_tiny_ner_model, write_jsonl

from erniem_batch import ErnieMTokenizer, cli
from erniem_batch.errors import ErnieMBatchError
from erniem_batch.evaluate import read as evaluate_read
from erniem_batch.job import actor, charts, details, lease, manifest, run, status, verify
from erniem_batch.job.attempts import Attempt
from erniem_batch.predictor import Predictor
from erniem_batch.serve import parity

FORMATS = ("parquet", "jsonl")
LEFT_OUT = (".lease.json.lock",)
FOREIGN = (
    "_run/plan/notes.parquet",
    "_run/plan/001-00077.parquet",
    "_run/plan/999-00001.parquet",
    "_run/plan/abc-def.parquet",
    "_run/ledger/001-1.parquet",
    "_run/ledger/x-y-z.parquet",
    "_run/ledger/001-01790000000000000000-0123abcd.parquet",
    "_run/findings/stray.parquet",
    "_run/attempts/0123.json",
    "_run/attempts/x.txt",
    "_run/sidecars/other.jsonl.json",
    "_run/README.txt",
    "_run/.DS_Store",
)
CHARTS = ("timeline", "stages", "labels", "scores", "lengths")  # half a second each
CODES = (0, 1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Template:
    """A run folder that copies are made of.

    Attributes:
        rows: of the undisturbed result.
        published: rows of the manifest that stands in it, None without one.
    """

    name: str
    folder: Path
    command: tuple[str, ...]
    rows: list[str]
    published: list[str] | None


@dataclass
class Outcome:
    """What came of all runs."""

    ends: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


# ---- runs without Ray -------------------------------------------------------------------------


@contextmanager
def tagging_here() -> Iterator[UnitsHere]:
    """Commands of this process tag without Ray, with one model that is loaded once."""
    here = UnitsHere()
    replaced: list[tuple[Any, str, Any]] = [
        (run, "connect", lambda config: False),
        (run, "tag_units", here),
        (lease, "BEAT_S", 0.02),
        (lease, "STALE_S", 0.1),
        (status, "BEAT_S", 0.02),
        (actor, "model_digest", cache(actor.model_digest)),
        (run, "model_digest", cache(run.model_digest)),
        *((charts, name, _blank(name)) for name in CHARTS),
    ]
    loaded = cache(Predictor.load)
    replaced.append((Predictor, "load", staticmethod(lambda config: Kept(loaded(config)))))
    before = [(place, name, vars(place)[name]) for place, name, _ in replaced]
    for place, name, value in replaced:
        setattr(place, name, value)
    try:
        yield here
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def _blank(name: str) -> Callable[[Any], str]:
    def chart(_: Any) -> str:
        return ""

    chart.__name__ = name
    return chart


def call(arguments: Sequence[str]) -> tuple[int, str, str]:
    """Exit code and output of a command."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = cli.main(list(arguments))
    return code, out.getvalue(), err.getvalue()


# ---- templates --------------------------------------------------------------------------------


def templates(work: Path, tokenizer: Path) -> list[Template]:
    """Finished and interrupted folders of both formats."""
    model = save_tiny_ner_model(work / "model", ErnieMTokenizer.from_pretrained(tokenizer))
    made = []
    for format_ in FORMATS:
        for finished in (True, False):
            name = f"{'finished' if finished else 'interrupted'}-{format_}"
            made.append(_template(work / name, name, format_, model, finished))
    return made


def _template(work: Path, name: str, format_: str, model: Path, finished: bool) -> Template:
    corpus, folder, whole = work / "in", work / "out", work / "whole"
    for i in range(4):
        rows: list[dict[str, Any]] = [{"id": f"{i}-{j}", "text": f"Ada {i} {j}"} for j in range(3)]
        write_jsonl(corpus / f"{i}.jsonl", rows)
    with (corpus / "1.jsonl").open("a") as file:
        file.write('{"id": "bad", "text": 5}\n')
    command = (
        "ner", "--input", str(corpus), "--model", str(model), "--window-tokens", "64",
        "--overlap-tokens", "16", "--output-format", format_, "--max-dead-letters", "5",
    )  # fmt: skip
    with tagging_here() as here:
        _succeed([*command, "--output", str(folder)])
        write_jsonl(corpus / "2.jsonl", [{"id": "2-new", "text": "Eva 2 new"}])
        write_jsonl(corpus / "9.jsonl", [{"id": f"9-{j}", "text": f"Bob {j}"} for j in range(2)])
        if finished:
            _succeed([*command, "--output", str(folder)])
        else:
            _kill_after(here, 1, [*command, "--output", str(folder)])
        shutil.copytree(folder, whole)
        _succeed([*command, "--output", str(whole)])
    return Template(name, folder, command, rows_in(whole), rows_in(folder))


def _succeed(arguments: Sequence[str]) -> None:
    code, _, err = call(arguments)
    assert code == 0, err


def _kill_after(here: UnitsHere, n_units: int, arguments: Sequence[str]) -> None:
    """The driver and its actor die while they work on the unit after so many."""
    here.done.clear()
    here.until = n_units
    with suppress(Killed):
        call(arguments)
    here.until = None
    output = arguments[-1]
    attempt = Attempt.next(output, "0123456789abcdef")
    attempt.begin()
    attempt.works_on(1)


def rows_in(folder: Path) -> list[str] | None:
    """All rows that the manifest names, and the number of dead letters, sorted; None without."""
    made = manifest.read_manifest(str(folder))
    if made is None:
        return None
    rows = [f"dead letters {sum(entry.n_rows for entry in made.dead_letters)}"]
    for entry in made.files:
        path = folder / entry.name
        if path.suffix == ".jsonl":
            found = [json.loads(line) for line in path.read_text().splitlines()]
        else:
            found = pq.read_table(path).to_pylist()
        assert len(found) == entry.n_rows
        rows += [json.dumps(row, sort_keys=True) for row in found]
    return sorted(rows)


# ---- damage -----------------------------------------------------------------------------------


def damage(folder: Path, draw: random.Random) -> list[str]:
    """Damages one to three files; says what was done."""
    done = []
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        files = [
            p for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name not in LEFT_OUT and _is_control(p.relative_to(folder))
        ]  # fmt: skip
        kinds: list[Callable[[Path, list[Path], random.Random], str]]
        kinds = [truncate, flip, flip, replace, delete, unknown_field, foreign, copy_under, folded]
        path = draw.choice(files)
        kind = draw.choice(kinds)
        what = kind(path, [folder, *files], draw)
        done.append(f"{kind.__name__} {path.relative_to(folder)} {what}".strip())
    return done


def _is_control(name: Path) -> bool:
    return name.parts[0] in ("_run", "_manifest.json", "_SUCCESS")


def truncate(path: Path, _: list[Path], draw: random.Random) -> str:
    data = path.read_bytes()
    size = draw.choice([0, len(data) // 2, draw.randrange(len(data) + 1), max(0, len(data) - 1)])
    path.write_bytes(data[:size])
    return f"to {size} of {len(data)}"


def flip(path: Path, _: list[Path], draw: random.Random) -> str:
    data = bytearray(path.read_bytes())
    if not data:
        return "empty"
    places = [draw.randrange(len(data)) for _ in range(draw.choice([1, 1, 2, 4, 16]))]
    for place in places:
        data[place] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(data))
    return f"at {places}"


def replace(path: Path, files: list[Path], draw: random.Random) -> str:
    other = draw.choice(files[1:])
    contents = [b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 5000, b"{" + b'"a":1' + b"}"]
    contents += [draw.randbytes(draw.randrange(1, 300)), other.read_bytes()]
    i = draw.randrange(len(contents))
    path.write_bytes(contents[i])
    return f"by {other.relative_to(files[0]) if i == len(contents) - 1 else contents[i][:8]!r}"


def delete(path: Path, *_: Any) -> str:
    path.unlink()
    return ""


def unknown_field(path: Path, _: list[Path], draw: random.Random) -> str:
    """As a newer release may write it."""
    try:
        values = json.loads(path.read_bytes())
    except ValueError:
        return "no JSON"
    if not isinstance(values, dict):
        return "no object"
    values["of_a_newer_release"] = draw.choice([1, "x", [None], {"a": 1}])
    for entry in values.get("files", []):
        entry["newer"] = 1
    path.write_text(json.dumps(values))
    return ""


def foreign(_: Path, files: list[Path], draw: random.Random) -> str:
    folder, *others = files
    path = folder / draw.choice(FOREIGN)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        return "there is a folder"
    contents = [b"", b"{}", b"hello", draw.choice(others).read_bytes()]
    path.write_bytes(draw.choice(contents))
    return f"{path.relative_to(folder)} ({path.stat().st_size} bytes)"


def copy_under(path: Path, files: list[Path], draw: random.Random) -> str:
    """One file has the content of another of its folder, or is there twice."""
    name = path.name.replace("001-", draw.choice(["001-", "002-"]), 1)
    other = path.with_name(f"{name[:-9]}9.parquet")
    if path.suffix != ".parquet" or other.exists():
        return "not one of several"
    shutil.copy(path, other)
    return f"to {other.relative_to(files[0])}"


def folded(path: Path, _: list[Path], draw: random.Random) -> str:
    """A folder stands where a file should be."""
    if draw.random() < 0.5:
        return "left"
    path.unlink()
    path.mkdir()
    return ""


# ---- a run ------------------------------------------------------------------------------------


def one(template: Template, work: Path, draw: random.Random, outcome: Outcome) -> None:
    """Damages a copy and calls every command."""
    output = work / "out"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(template.folder, output)
    what = damage(output, draw)
    said: list[str] = []
    try:
        _commands(template, output, outcome, said)
    except Exception:
        text = "\n".join([template.name, *what, *said[-2:], traceback.format_exc()])
        outcome.faults.append(text)


def _commands(template: Template, output: Path, outcome: Outcome, said: list[str]) -> None:
    def ends(name: str, arguments: Sequence[str]) -> int:
        code, out, err = call(arguments)
        said.append(f"{name}: {code} {out} {err}")
        assert code in CODES, (name, code)
        assert "Traceback" not in err, (name, err)
        assert code in (0, 1) or "error:" in err or out, (name, code, err)
        outcome.ends[f"{name} {code}"] += 1
        return code

    ends("status", ["status", str(output)])
    ends("verify", ["verify", str(output)])
    for read in (evaluate_read.read_run, parity.read_run, details.previous_findings):
        _read(read, output, outcome)
    code = ends("resume", [*template.command, "--output", str(output)])
    if code == 0:
        assert rows_in(output) == template.rows, "results differ"
        _mend_sidecars(template, output, ends)
    else:
        _keeps_what_was_published(template, output)
        code = ends("overwrite", [*template.command, "--output", str(output), "--overwrite"])
        if code == 0:
            assert rows_in(output) == template.rows, "results differ after --overwrite"
    if code == 0:
        assert ends("status after", ["status", str(output)]) == 0
        assert ends("compact", ["compact", str(output)]) == (2 if "jsonl" in template.name else 0)
        assert ends("replay", ["replay", str(output)]) == 0
        assert rows_in(output) == template.rows, "results differ after replay"


def _mend_sidecars(template: Template, output: Path, ends: Callable[..., int]) -> None:
    """A run does not look at the sidecars of files that its ledger knows; `verify` does, and its
    advice repairs them."""
    before = verify.verify(str(output))
    assert not before.unnamed, before.unnamed
    for fault in before.damaged:
        assert "sidecar" in fault.what, fault
        assert fault.repair == f"delete {fault.name} and run the same command again"
        (output / fault.name).unlink()
        sidecar = output / "_run" / "sidecars" / f"{fault.name}.json"
        if sidecar.is_dir():  # it says so, too
            sidecar.rmdir()
    if before.damaged and ends("repair", [*template.command, "--output", str(output)]):
        return
    assert rows_in(output) == template.rows, "results differ after the repair"
    assert ends("verify after", ["verify", str(output)]) == 0


def _read(read: Callable[[str], Any], output: Path, outcome: Outcome) -> None:
    name = f"{read.__module__.rpartition('.')[0].rpartition('.')[2]}.{read.__name__}"
    try:
        read(str(output))
        outcome.ends[f"{name} read"] += 1
    except ErnieMBatchError:
        outcome.ends[f"{name} refused"] += 1


def _keeps_what_was_published(template: Template, output: Path) -> None:
    try:
        rows = rows_in(output)
    except ErnieMBatchError:
        return
    assert rows in (None, template.published, template.rows), "published results are not kept"


def damage_runs(work: Path, tokenizer: Path, runs: int, seed: int) -> Outcome:
    """So many damaged folders, one after the other."""
    outcome = Outcome()
    draw = random.Random(seed)
    made = templates(work, tokenizer)
    with tagging_here():
        for i in range(runs):
            one(made[i % len(made)], work / "copy", draw, outcome)
    return outcome


app = App(help=__doc__)


@app.default
def main(runs: int = 1000, seed: int = 7) -> int:
    """Prints how the commands have ended, and every fault."""
    tokenizer = Path(__file__).parents[1] / "data" / "tiny_tokenizer"
    started = time.monotonic()
    logging.disable(logging.NOTSET)
    with tempfile.TemporaryDirectory() as work:
        outcome = damage_runs(Path(work), tokenizer, runs, seed)
    for name, n in sorted(outcome.ends.items()):
        print(f"{n:>6}  {name}")
    for fault in outcome.faults[:20]:
        print(fault, file=sys.stderr)
    print(f"{runs} runs, {len(outcome.faults)} faults, {time.monotonic() - started:.0f} s")
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    raise SystemExit(app())
