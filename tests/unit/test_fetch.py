import builtins
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest

from erniem_batch import storage
from erniem_batch.config import PredictorConfig
from erniem_batch.errors import ConfigError, StorageError
from erniem_batch.model import fetch
from erniem_batch.model.fetch import is_model_file, model_digest
from erniem_batch.options import demo_model
from erniem_batch.serve.flags import ServeFlags

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


@pytest.fixture
def hub():
    """A hub on this machine with the repository org/name, as the real one answers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.asked = dict(HUB_FILES), []
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_FILES = {
    **MODEL,
    **dict.fromkeys(OTHERS, b"other"),
    "pytorch_model.bin": b"larger",
    "model_state.pdparams": b"larger",
    "tf_model.h5": b"larger",
    "modeling_remote.py": b"raise SystemExit",
    "onnx/model.json": b"{}",
}


class Hub(BaseHTTPRequestHandler):
    """Two calls: what a revision holds, and a file of a commit."""

    def do_GET(self):
        self.server.asked.append(self.path)
        parts = self.path.split("/")
        if self.path == "/api/models/org/name":
            return self._tell("main")
        if self.path.startswith("/api/models/org/name/revision/"):
            return self._tell(parts[-1])
        if self.path.startswith(f"/org/name/resolve/{COMMIT}/") and parts[-1] in self.server.files:
            return self._send(self.server.files[parts[-1]])
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def _tell(self, revision):
        if revision not in ("main", "v1.0", COMMIT):
            return self._send(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": name} for name in self.server.files]
        told = {"id": "org/name", "modelId": "org/name", "sha": COMMIT, "siblings": siblings}
        self._send(json.dumps(told).encode(), headers={"Content-Type": "application/json"})

    def _send(self, content, status=200, headers=None):
        self.send_response(status)
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        sent = {"Content-Length": str(len(content)), "ETag": tag, "X-Repo-Commit": COMMIT}
        for name, value in {**sent, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


ASK = """
import json, logging, sys
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
from erniem_batch.errors import ConfigError
from erniem_batch.model.fetch import local_folder, name_elsewhere
told = []
for model in sys.argv[1:]:
    try:
        folder = local_folder(model, "ner")
        found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
        told.append([folder.name, found, name_elsewhere(model, folder)])
    except ConfigError as error:
        told.append(str(error))
print(json.dumps(told))
"""


@pytest.fixture
def ask(hub, tmp_path):
    """What another process gets by a name: it reads the address of the hub when it starts."""

    def call(*models, **changes):
        there = {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(PACKAGE_PARENT),
        }
        done = subprocess.run(
            [sys.executable, "-c", ASK, *models],
            cwd=tmp_path,
            env={**os.environ, **there, **changes},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return json.loads(done.stdout), done.stderr

    return call


def test_a_model_of_the_hub_is_pinned_and_only_what_is_read_is_fetched(hub, ask):
    models = ["hf://org/name", "hf://org/name@v1.0", "hf://org/name@v9", "hf://org/absent"]
    (newest, tagged, no_revision, no_name), log = ask(*models)
    expected = [COMMIT, sorted(MODEL), f"hf://org/name@{COMMIT}"]
    assert newest == tagged == expected, "one format of weights, no code"
    assert f"revision=main commit={COMMIT}; for this version again: hf://org/name@{COMMIT}" in log
    assert f"revision=v1.0 commit={COMMIT}; " in log
    assert "WARNING" not in log
    assert "hub does not give it: RevisionNotFoundError: 404" in no_revision
    assert "hub does not give it: RepositoryNotFoundError: 404" in no_name
    # A commit that is in the cache needs no hub; a bare name comes with a warning.
    pinned, bare = f"hf://org/name@{COMMIT}", "org/name"
    assert ask(pinned, HF_HUB_OFFLINE="1")[0] == [expected]
    (found,), log = ask(bare)
    assert found == expected
    assert "WARNING erniem_batch.model.fetch model=org/name is no folder here" in log
    assert "write hf://org/name for a model of the hub, ./org/name for a folder" in log


def test_a_path_that_is_not_there_never_becomes_a_download(tmp_path, monkeypatch):
    """A misspelt folder was asked for on the hub, where anybody may have taken its name."""
    monkeypatch.setattr(fetch, "_from_hub", lambda *_: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    Path("link").symlink_to("nowhere")
    Path("file").touch()
    for model in ("models/ner", "link/ner", "file/ner", "./org/name", "../org/name", "~/name"):
        with pytest.raises(ConfigError, match=r"is not a folder.*hf://org/name"):
            local_folder(model)
    for model in ("org/name/", "/org/name", "org\\name/x", "org/name@main"):
        with pytest.raises(ConfigError, match="is not a folder"):
            local_folder(model)


def test_the_name_of_a_folder_stays_one_elsewhere(tmp_path, monkeypatch):
    """On a machine without the folder, org/name would be asked for on the hub."""
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    for model, there in (
        ("org/name", "./org/name"),
        ("./org/name", "./org/name"),
        (str(tmp_path), str(tmp_path)),
        ("demo", "demo"),
        (_url(tmp_path), _url(tmp_path)),
    ):
        assert fetch.name_elsewhere(model, Path("org/name")) == there
        assert fetch.marked_as_path(model) == there
    assert fetch.marked_as_path("org/other") == "org/other"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch.name_elsewhere("~/org/name", Path()) == "~/org/name"
    assert ServeFlags(model="org/name").app_config(1).model == "./org/name"


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        ({"model.safetensors", "model.fp16.safetensors"}, {"model.safetensors"}),
        ({"model-1.safetensors", "model.safetensors.index.json", "pytorch_model.bin"}, None),
        ({"pytorch_model.bin", "adapter.safetensors"}, {"pytorch_model.bin"}),
        ({"model_state.pdparams"}, {"model_state.pdparams"}),
    ],
)
def test_the_best_format_of_the_hub_is_taken(names, weights):
    expected = weights or {"model-1.safetensors", "model.safetensors.index.json"}
    others = {"config.json", "vocab.txt", "sentencepiece.bpe.model"}
    assert set(fetch._files_to_read(names | others)) == expected | others


def test_an_overlay_is_not_taken_from_the_hub(monkeypatch, tmp_path):
    """Its base would be a folder of this machine that a stranger chose."""
    (tmp_path / "config.json").write_text('{"base_model": "../../home"}')
    monkeypatch.setattr(fetch, "_find_on_hub", lambda *_: (COMMIT, ["config.json"]))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(ConfigError, match="only a model that stands alone"):
        local_folder("hf://org/name")


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
