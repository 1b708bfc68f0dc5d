import builtins
import hashlib
import io
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest

from erniem_batch import storage
from erniem_batch.config import PredictorConfig
from erniem_batch.errors import ConfigError, StorageError
from erniem_batch.model import fetch
from erniem_batch.model.fetch import is_model_file, model_digest
from erniem_batch.options import demo_model

MODEL = {"config.json": b"{}", "vocab.txt": b"a\nb\n", "model.safetensors": b"w" * 3_000_000}
OTHERS = ("README.md", "optimizer.bin", "training_args.bin", ".hidden.json", "checkpoint-5/a.json")
# Which task it is only matters to the demo.
local_folder = partial(fetch.local_folder, task="ner")
PACKAGE_PARENT = Path(storage.__file__).parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ERNIEM_BATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def there(tmp_path):
    """A model where a URL shows."""
    folder = tmp_path / "over there" / "model"
    for name, content in {**MODEL, **dict.fromkeys(OTHERS, b"other")}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def opened(monkeypatch):
    """Names of the files that are read, as they are read."""
    names, open_input = [], storage.open_input

    def recorded(path):
        names.append(path.rpartition("/")[2])
        return open_input(path)

    monkeypatch.setattr(storage, "open_input", recorded)
    return names


def _url(folder):
    return f"file://{folder}"


def _contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _folders(cache):
    return [path for path in cache.iterdir() if path.is_dir()]


# ---- folders ----------------------------------------------------------------------------------


def test_the_demo_and_folders_are_where_they_are(tmp_path, monkeypatch):
    assert local_folder("demo") == demo_model("ner")
    assert fetch.local_folder("demo", task="qa") == demo_model("qa") != demo_model("ner")
    assert fetch.local_folder("demo", task="embed") == demo_model("ner").parent / "encoder"
    assert local_folder(str(tmp_path)) == tmp_path
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_folder("org/name") == Path("org/name"), "a folder here, not a name on the hub"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_folder("~/org") == tmp_path / "org"


@pytest.mark.parametrize(
    "model",
    ["absent", "./absent/model", "a/b/c", "ftp://host/model", "hf://name", "hf://a/b/c"],
)
def test_what_is_no_model(model):
    with pytest.raises(ConfigError, match="is not a folder"):
        local_folder(model)


# ---- URLs -------------------------------------------------------------------------------------


def test_a_url_is_downloaded_once(there, opened, cache):
    folder = local_folder(_url(there))
    assert _contents(folder) == MODEL
    assert sorted(opened) == sorted(MODEL)
    assert local_folder(_url(there)) == folder
    assert local_folder(_url(there) + "/") == folder
    assert PredictorConfig(model=_url(there)).model_folder == folder
    assert len(opened) == len(MODEL), "read again"
    assert _folders(cache) == [folder]


class Bucket:
    """Object storage as fsspec shows it: names without scheme, a place holder for the folder."""

    def __init__(self, files):
        self.files = files

    def find(self, path, detail):
        names = [name for name in self.files if name.startswith(path.removeprefix("s3://"))]
        return {name: self.info(name) for name in names}

    def info(self, path):
        name = path.removeprefix("s3://")
        tag = f'"{hashlib.md5(self.files[name]).hexdigest()}"'
        return {"name": name, "size": len(self.files[name]), "ETag": tag, "type": "file"}

    def cat_file(self, path, start, end):
        return self.files[path.removeprefix("s3://")][start:end]


def test_a_url_of_object_storage(cache, monkeypatch):
    files = {f"bucket/model/{name}": content for name, content in MODEL.items()}
    files |= {f"bucket/model/{name}": b"other" for name in OTHERS} | {"bucket/model/": b""}
    monkeypatch.setattr(storage, "_filesystem", lambda scheme: Bucket(files))
    before = local_folder("s3://bucket/model/")
    assert _contents(before) == MODEL
    files["bucket/model/vocab.txt"] = b"c\nd\n"
    after = local_folder("s3://bucket/model")
    assert (after / "vocab.txt").read_bytes() == b"c\nd\n"
    assert sorted(_folders(cache)) == sorted([before, after])


def test_the_cache_is_in_the_folder_of_the_user(there, tmp_path, monkeypatch):
    monkeypatch.delenv("ERNIEM_BATCH_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = local_folder(_url(there))
    assert folder.parent == tmp_path / "home" / ".cache" / "erniem_batch" / "models"


def test_a_changed_file_makes_another_folder(there, opened, cache):
    before = local_folder(_url(there))
    (there / "vocab.txt").write_bytes(b"a\nb\nc\n")
    after = local_folder(_url(there))
    assert after != before
    assert (after / "vocab.txt").read_bytes() == b"a\nb\nc\n"
    assert _contents(before) == MODEL, "someone may still use it"
    (there / "README.md").write_text("of no account")
    assert local_folder(_url(there)) == after
    assert len(opened) == 2 * len(MODEL)


def test_the_same_size_but_written_later_is_a_change(there):
    before = local_folder(_url(there))
    (there / "vocab.txt").write_bytes(b"c\nd\n")
    os.utime(there / "vocab.txt", ns=(10**18, 10**18))
    after = local_folder(_url(there))
    assert (after / "vocab.txt").read_bytes() == b"c\nd\n"
    assert after != before


def test_a_download_that_ends_early_leaves_nothing(there, cache, monkeypatch):
    open_input = storage.open_input

    def cut(path):
        with open_input(path) as file:
            return io.BytesIO(file.read()[:1_000_000])

    with monkeypatch.context() as patch:
        patch.setattr(storage, "open_input", cut)
        with pytest.raises(StorageError, match=r"model.safetensors: read 1000000 bytes of 3000000"):
            local_folder(_url(there))
    assert _folders(cache) == []
    assert _contents(local_folder(_url(there))) == MODEL


def test_a_model_that_changes_while_it_is_read_is_not_kept(there, cache, monkeypatch):
    """Two files of one training and one of another would be loaded without a word."""
    open_input = storage.open_input

    def opened_late(path):
        if path.endswith("vocab.txt"):
            (there / "config.json").write_bytes(b"[]")
        return open_input(path)

    monkeypatch.setattr(storage, "open_input", opened_late)
    with pytest.raises(StorageError, match="changed while it was read"):
        local_folder(_url(there))
    assert _folders(cache) == []


def test_what_a_killed_download_left_is_no_harm(there, cache):
    folder = local_folder(_url(there))
    shutil.rmtree(folder)
    partial = folder.with_suffix(".partial")
    partial.mkdir()
    (partial / "half.json").write_text("{")
    assert _contents(local_folder(_url(there))) == MODEL
    assert _folders(cache) == [folder]


def test_two_processes_download_once(there, tmp_path):
    log = tmp_path / "log"
    code = """
import sys, time
from erniem_batch import storage
from erniem_batch.model.fetch import local_folder

open_input = storage.open_input

def recorded(path):
    with open(sys.argv[2], "a") as log:
        log.write("opened\\n")
    time.sleep(0.2)
    return open_input(path)

storage.open_input = recorded
print("ready", flush=True)
sys.stdin.readline()
print(local_folder(sys.argv[1], "ner"))
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, _url(there), str(log)],
            cwd=PACKAGE_PARENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    folders = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert len(folders) == 1
    assert _contents(Path(folders.pop())) == MODEL
    assert len(log.read_text().splitlines()) == len(MODEL)


def test_a_url_without_a_model(tmp_path, there):
    for name in MODEL:
        (there / name).unlink()
    with pytest.raises(ConfigError, match="there are no files of a model"):
        local_folder(_url(there))
    with pytest.raises(ConfigError, match="absent': there are no files of a model"):
        local_folder(_url(tmp_path / "absent"))


def test_a_cache_that_cannot_be_written(there, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ERNIEM_BATCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="ERNIEM_BATCH_CACHE names another place"):
        local_folder(_url(there))


# ---- hub --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["hf://org/name", "hf://org/name@main", "org/name"])
def test_the_hub_needs_its_package(model, monkeypatch):
    real = builtins.__import__

    def without_hub(name, *args, **options):
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_hub)
    with pytest.raises(ConfigError, match=r"pip install 'erniem-batch\[hub\]'"):
        local_folder(model)


@pytest.mark.parametrize(
    ("model", "revision"),
    [
        ("org/name", None),
        ("hf://org/name", None),
        ("hf://org/name@v1.0", "v1.0"),
        ("hf://org/name@refs/pr/1", "refs/pr/1"),
    ],
)
def test_a_name_on_the_hub(model, revision, monkeypatch, tmp_path):
    calls = []

    def snapshot_download(name, **options):
        calls.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert local_folder(model) == tmp_path
    ((name, options),) = calls
    assert (name, options["revision"]) == ("org/name", revision)
    patterns = {key: options[key] for key in ("allow_patterns", "ignore_patterns")}
    paths = [*MODEL, *OTHERS, "tf_model.h5", "pytorch_model.bin", "onnx/model.json"]
    assert list(huggingface_hub.utils.filter_repo_objects(paths, **patterns)) == [
        path for path in paths if is_model_file(path)
    ]


@pytest.mark.parametrize("error", [OSError, ValueError])
def test_a_name_that_the_hub_does_not_know(error, monkeypatch):
    def snapshot_download(name, **options):
        raise error("404\nRepository Not Found")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ConfigError, match=r"hub does not give it: \w+: 404$"):
        local_folder("org/absent")


# ---- digest -----------------------------------------------------------------------------------


def test_the_digest_is_of_the_files_that_decide_answers(there):
    before = model_digest(there)
    lines = [f"{hashlib.sha256(MODEL[name]).hexdigest()}  {name}\n" for name in sorted(MODEL)]
    assert before == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert model_digest(local_folder(_url(there))) == before
    for name in OTHERS:
        (there / name).write_text("changed")
    assert model_digest(there) == before


@pytest.mark.parametrize("name", sorted(MODEL))
def test_the_digest_changes_with_each_file(there, name):
    digests = {model_digest(there)}
    (there / name).write_bytes(MODEL[name] + b" ")
    digests.add(model_digest(there))
    (there / name).rename(there / f"other-{name}")
    digests.add(model_digest(there))
    (there / f"other-{name}").unlink()
    digests.add(model_digest(there))
    assert len(digests) == 4


def test_the_digest_reads_a_file_once(there, monkeypatch):
    n_reads, file_digest = [], hashlib.file_digest

    def counted(file, name):
        n_reads.append(file.name)
        return file_digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    before = model_digest(there)
    assert model_digest(there) == before
    assert len(n_reads) == len(MODEL)
    os.utime(there / "vocab.txt", ns=(10**18, 10**18))
    assert model_digest(there) == before
    assert len(n_reads) == len(MODEL) + 1


@pytest.mark.parametrize("task", ["ner", "embed"])
def test_all_files_of_the_demo_that_are_loaded_count(task):
    files = {path.name for path in demo_model(task).iterdir()}
    assert {name for name in files if is_model_file(name)} == files - {"README.md", "curve.png"}
