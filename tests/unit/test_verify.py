"""`erniem-batch verify`: everything that a manifest names is read back."""

import hashlib
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import RefusingTagger, letters_path, quick_jobs, write_jsonl

from erniem_batch import cli
from erniem_batch.errors import ConfigError
from erniem_batch.job.compact import compact
from erniem_batch.job.manifest import MANIFEST, read_manifest
from erniem_batch.job.verify import verify

TEXTS = ["Ada Lovelace in London", "Zoë 😀 à Paris", "Bob"]
FORMATS = ["parquet", "jsonl"]


both = pytest.mark.parametrize("format_", FORMATS)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quick_jobs(monkeypatch)


@pytest.fixture
def night(format_, tmp_path, job):
    """A complete run with dead letters; gives its folder and what runs it again."""
    for i in range(3):
        rows = [{"id": f"{i}{j}", "text": text} for j, text in enumerate(TEXTS)]
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", [*rows, {"text": i}] if i else rows)

    def again(**options):
        return job(**{"output_format": format_, "max_dead_letters": "9", **options})

    again()
    return tmp_path / "out", again, format_


def names(found):
    return [damage.name for damage in found.damaged]


def flip(path, place=None):
    """The same size, other content."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 0x01
    path.write_bytes(bytes(data))


def repaired(night, found):
    """Follows the advice to the letter."""
    output, again, _ = night
    for damage in found.damaged:
        if damage.repair.startswith("delete "):
            listed = damage.repair.removeprefix("delete ").partition(" and run")[0]
            for name in listed.split(", "):
                (output / name).unlink(missing_ok=True)
    for _ in range(3):
        report, _ = again()
        if report.exit_code == 0:
            break
    return verify(str(output))


@both
def test_a_sound_folder(night):
    output, _, _ = night
    found = verify(str(output))
    assert (found.exit_code, found.damaged, found.unnamed, found.success) == (0, [], [], True)
    assert (found.files, found.rows, found.dead_letter_files, found.dead_letters) == (3, 9, 2, 2)
    assert found.checksums == 3
    assert found.spans > 0
    for entry in read_manifest(str(output)).files:
        assert entry.sha256 == hashlib.sha256((output / entry.name).read_bytes()).hexdigest()


@both
def test_the_same_size_with_flipped_bytes(night):
    """A run counts it as done; this does not, and its advice makes the unit anew."""
    output, again, format_ = night
    path = output / f"1.{format_}"
    before = path.read_bytes()
    flip(path)
    _, done = again()
    assert done == []
    found = verify(str(output))
    assert (found.exit_code, names(found)) == (1, [path.name])
    assert "SHA-256" in found.damaged[0].what
    assert repaired(night, found).exit_code == 0
    assert path.read_bytes() == before


@both
def test_without_checksums_pages_have_their_own(night):
    """Folders of older releases, whose manifests have none."""
    output, _, format_ = night
    manifest = json.loads((output / MANIFEST).read_bytes())
    for entry in manifest["files"]:
        del entry["sha256"]
    del manifest["checksum"]
    (output / MANIFEST).write_text(json.dumps(manifest))
    (output / "_SUCCESS").unlink()
    found = verify(str(output))
    assert (found.exit_code, found.checksums) == (0, 0)
    if format_ == "parquet":
        flip(output / "1.parquet", 60)  # in the first page
        assert names(verify(str(output))) == ["1.parquet"]


@both
@pytest.mark.parametrize("how", ["shorter", "missing", "rows", "foreign"])
def test_a_damaged_data_file(night, how):
    output, _, format_ = night
    path = output / f"2.{format_}"
    data = path.read_bytes()
    if how == "shorter":
        path.write_bytes(data[:-9])
    elif how == "missing":
        path.unlink()
    elif how == "rows":
        shutil.copy(output / f"0.{format_}", path)
    else:
        path.write_bytes(b"hello")
    found = verify(str(output))
    assert (found.exit_code, names(found)) == (1, [path.name])
    assert ("delete" in found.damaged[0].repair) == (how != "missing")
    assert repaired(night, found).exit_code == 0
    assert path.read_bytes() == data


@both
@pytest.mark.parametrize("how", ["shorter", "missing", "rows", "flipped"])
def test_damaged_dead_letters(night, how):
    """They are made with their unit: its data file goes too."""
    output, _, format_ = night
    path = letters_path(output, "2")
    table = pq.read_table(path)
    if how == "shorter":
        path.write_bytes(path.read_bytes()[:-9])
    elif how == "missing":
        path.unlink()
    elif how == "rows":
        pq.write_table(pa.concat_tables([table, table]), path)
    else:
        flip(path, 20)
    found = verify(str(output))
    assert (found.exit_code, names(found)) == (1, [f"_dead_letters/{path.name}"])
    letters = f"_dead_letters/{path.name}, "
    assert found.damaged[0].repair == f"delete {letters}2.{format_} and run the same command again"
    assert repaired(night, found).exit_code == 0
    assert pq.read_table(path).drop_columns("time").equals(table.drop_columns("time"))


def test_a_damaged_replay(tmp_path, job):
    """Its dead letters are gone: the file that it replays is made again, too."""
    rows = [{"text": "the row that kills"}, {"text": "Ada in Paris"}]
    write_jsonl(tmp_path / "in" / "a.jsonl", rows)
    options = {"max_dead_letters": "5"}
    job(tagger=RefusingTagger, **options)
    job(replay=True)
    output = tmp_path / "out"
    flip(output / "a.replay-1.parquet")
    found = verify(str(output))
    assert names(found) == ["a.replay-1.parquet"]
    assert "delete a.parquet, a.replay-1.parquet and" in found.damaged[0].repair
    (output / "a.replay-1.parquet").unlink()
    report, _ = job(**options)
    assert report.exit_code == 3
    assert "delete the data file of a " in report.failed_units[0].error

    def again(**_):
        return job(tagger=RefusingTagger, **options)

    assert repaired((output, again, "parquet"), found).exit_code == 0
    assert next(entry.n_rows for entry in read_manifest(str(output)).files) == 1


@both
def test_files_that_no_manifest_names(night):
    output, _, format_ = night
    shutil.copy(output / f"0.{format_}", output / f"stray.{format_}")
    shutil.copy(letters_path(output, "1"), output / "_dead_letters" / "x.parquet")
    found = verify(str(output))
    assert (found.exit_code, found.damaged) == (1, [])
    assert found.unnamed == ["_dead_letters/x.parquet", f"stray.{format_}"]
    (output / "_SUCCESS").unlink()  # a run is under way: they may be its own
    assert verify(str(output)).exit_code == 0


@both
def test_success_and_manifest(night):
    output, _, _ = night
    (output / "_SUCCESS").write_text('{"manifest_sha256": "0"}')
    found = verify(str(output))
    assert (found.exit_code, names(found)) == (1, ["_SUCCESS"])
    assert repaired(night, found).exit_code == 0
    files = read_manifest(str(output)).files
    (output / MANIFEST).write_bytes((output / MANIFEST).read_bytes()[:-30])
    found = verify(str(output))
    assert (found.exit_code, names(found)) == (1, [MANIFEST])
    assert repaired(night, found).exit_code == 0
    assert read_manifest(str(output)).files == files


@both
def test_the_run_folder_is_not_trusted(night):
    output, _, format_ = night
    expected = verify(str(output))
    shutil.rmtree(output / "_run" / "plan")
    (output / "_run" / "run.json").write_bytes(b"{}")
    found = verify(str(output))
    assert (found.exit_code, found.rows, found.spans) == (0, expected.rows, expected.spans)
    shutil.rmtree(output / "_run")
    assert verify(str(output)).exit_code == (1 if format_ == "jsonl" else 0), "without sidecars"


@pytest.mark.parametrize("unit", ["codepoint", "utf16", "byte"])
@pytest.mark.parametrize("is_known", [True, False])
def test_offsets(tmp_path, job, unit, is_known):
    """Changed so that sizes and checksums tell nothing: what is compared is the text."""
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": text, "title": "x" * 50} for text in TEXTS])
    job(output_format="jsonl", offset_unit=unit)
    output = tmp_path / "out"
    assert verify(str(output)).spans > 0
    if not is_known:
        (output / "_run" / "run.json").unlink()
        shutil.rmtree(output / "_run" / "plan")
        shutil.rmtree(output / "_run" / "ledger")
    assert verify(str(output)).exit_code == 0
    rows = [json.loads(line) for line in (output / "a.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row["entities"])
    row["entities"][0]["text"] = row["entities"][0]["text"][::-1] + "!"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    _with_new_content(output, "a.jsonl", text.encode())
    found = verify(str(output))
    assert (found.exit_code, found.spans) == ((1, 0) if is_known else (0, 0))


def _with_new_content(output, name, data):
    """A data file with manifest and sidecar that fit it."""
    (output / name).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    for path in (output / MANIFEST, output / "_run" / "sidecars" / f"{name}.json"):
        values = json.loads(path.read_bytes())
        for entry in values.get("files", [values]):
            entry.update(n_bytes=len(data), sha256=digest)
        values.pop("checksum", None)
        path.write_text(json.dumps(values))
    (output / "_SUCCESS").unlink()


def test_a_second_dataset(tmp_path, job):
    write_jsonl(
        tmp_path / "in" / "a.jsonl", [{"text": text, "k": i} for i, text in enumerate(TEXTS)]
    )
    job()
    compact(str(tmp_path / "out"), str(tmp_path / "second"), partition_by=["k"])
    found = verify(str(tmp_path / "second"))
    assert (found.exit_code, found.files, found.rows) == (0, 3, 3)
    assert found.spans > 0
    name = next((tmp_path / "second").rglob("*.parquet"))
    flip(name, 60)
    found = verify(str(tmp_path / "second"))
    assert (found.exit_code, found.damaged[0].repair) == (1, "run erniem-batch compact again")


@both
def test_the_command(night, capsys):
    output, _, format_ = night
    assert cli.main(["verify", str(output)]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["exit_code"] == 0
    assert "sound" in told.err
    flip(output / f"0.{format_}")
    assert cli.main(["verify", str(output)]) == 1
    told = capsys.readouterr()
    line = json.loads(told.out)
    assert (line["n_damaged"], line["damaged"][0]["name"]) == (1, f"0.{format_}")
    assert f"delete 0.{format_} and run" in told.err


@pytest.mark.parametrize("folder", ["in", "absent"])
def test_no_folder_of_a_run(tmp_path, folder):
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": "a"}])
    with pytest.raises(ConfigError, match="holds no results that could be verified"):
        verify(str(tmp_path / folder))
    assert cli.main(["verify", str(tmp_path / folder)]) == 2
