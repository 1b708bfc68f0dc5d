"""Storage on a local disk, S3, GCS and Azure: one set of tests, and what only some of them need."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import stores
from fault.proxy import FaultyProxy

from erniem_batch import storage
from erniem_batch.errors import ConfigError, Conflict, StorageError

ROOT = Path(__file__).parents[2]
CONTENT = bytes(random.Random(5).randbytes(300_000))
KINDS = ["local", "s3", "gs"]
if shutil.which("azurite-blob"):  # it needs Node, and is no part of our test requirements
    KINDS.append("az")
# Real ones back off for seconds: here, a failure that lasts shall be told soon.
FEW_RETRIES = {"AWS_MAX_ATTEMPTS": "2"}


@pytest.fixture(params=KINDS)
def folder(request, tmp_path):
    """An empty folder of each kind of storage."""
    if request.param == "local":
        return str(tmp_path / "folder")
    return request.getfixturevalue(f"{request.param}_folder")


@pytest.fixture(params=KINDS[1:])
def remote_folder(request):
    return request.getfixturevalue(f"{request.param}_folder")


def _in_another_process(code, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "from erniem_batch import storage\n" + code, *arguments]
    return subprocess.Popen(command, env=environment)


def _parallel(n_threads, work, items):
    with ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(work, items))


# ---- looking ----------------------------------------------------------------------------------


def test_find_and_stat_agree(folder):
    names = ["a.txt", "b/c.txt", "b/d/e.txt"]
    for name in names:
        storage.write(f"{folder}/{name}", name.encode())
    found = {file.path: file for file in storage.find(folder)}
    assert sorted(found) == [f"{folder}/{name}" for name in names]
    assert found == {path: storage.stat(path) for path in found}
    assert {file.size for file in found.values()} == {5, 7, 9}
    assert all(file.version for file in found.values())


def test_a_version_changes_with_the_content(folder):
    path = f"{folder}/a"
    storage.write(path, b"one")
    before = storage.stat(path)
    assert storage.stat(path) == before
    storage.write(path, b"three")
    assert storage.stat(path).version != before.version
    assert [file.version for file in storage.find(folder)] == [storage.stat(path).version]


def test_find_a_file_a_prefix_and_nothing(folder):
    storage.write(f"{folder}/part/a", b"x")
    storage.write(f"{folder}/part-2/a", b"x")
    assert [file.path for file in storage.find(f"{folder}/part/a")] == [f"{folder}/part/a"]
    assert [file.path for file in storage.find(f"{folder}/part")] == [f"{folder}/part/a"]
    assert list(storage.find(f"{folder}/none")) == []


def test_absent(folder):
    storage.write(f"{folder}/b/c", b"x")
    for name in ("none", "b/none", "b/c/none"):
        path = f"{folder}/{name}"
        assert storage.stat(path) is None
        assert storage.read(path) is None
        assert storage.read_versioned(path) is None
        with pytest.raises(FileNotFoundError):
            storage.open_input(path)
    assert storage.stat(f"{folder}/b") is None


def test_glob(folder):
    for name in ("a.txt", "b.txt", "c.csv", "d/e.txt"):
        storage.write(f"{folder}/{name}", b"x")
    assert storage.glob(f"{folder}/*.txt") == [f"{folder}/a.txt", f"{folder}/b.txt"]
    assert storage.glob(f"{folder}/*/e.txt") == [f"{folder}/d/e.txt"]
    assert storage.glob(f"{folder}/?.none") == []


@pytest.mark.parametrize(
    "name", ["two words", "a+b", "a%20b", "a#b", "a&b=c", "naïve-日本語", "a'b\"", "{0}"]
)
def test_names(folder, name):
    path = f"{folder}/{name}/{name}"
    storage.write(path, b"content")
    assert storage.read(path) == b"content"
    assert list(storage.find(folder)) == [storage.stat(path)]
    version = storage.create(f"{path}.control", b"1")
    storage.swap(f"{path}.control", b"2", version)
    assert storage.read(f"{path}.control") == b"2"
    storage.delete([path, f"{path}.control"])
    assert not [file for file in storage.find(folder) if not file.path.endswith(".lock")]


def test_more_files_than_a_page(s3_folder):
    _list_many(s3_folder, 1050)


@pytest.mark.slow
def test_2500_files(folder):
    _list_many(folder, 2500)


def _list_many(folder, n_files):
    paths = [f"{folder}/{n:04d}" for n in range(n_files)]
    _parallel(16, lambda path: storage.write(path, b"x"), paths)
    assert sorted(file.path for file in storage.find(folder)) == paths
    storage.delete([*paths, f"{folder}/none"])
    assert list(storage.find(folder)) == []


def test_files_of_others_are_seen_at_once(remote_folder):
    folder, path = remote_folder, f"{remote_folder}/a"
    assert list(storage.find(folder)) == []
    assert storage.stat(path) is None
    code = "import sys; storage.write(sys.argv[1], b'theirs')"
    assert _in_another_process(code, path).wait() == 0
    assert storage.read(path) == b"theirs"
    assert storage.stat(path).size == 6
    assert [file.path for file in storage.find(folder)] == [path]


def test_placeholders_of_folders_are_no_files(s3_folder):
    storage.write(f"{s3_folder}/sub/a", b"x")
    bucket, key = s3_folder.removeprefix("s3://").split("/")
    storage._filesystem("s3").call_s3("put_object", Bucket=bucket, Key=f"{key}/sub/", Body=b"")
    assert [file.path for file in storage.find(s3_folder)] == [f"{s3_folder}/sub/a"]


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(StorageError, match="listing is not permitted"):
        list(storage.find(str(tmp_path)))


# ---- reading ----------------------------------------------------------------------------------


def test_read_any_part(folder):
    path = f"{folder}/a"
    storage.write(path, CONTENT)
    with storage.open_input(path) as file:
        for start, n_bytes in ((0, 10), (299_990, 100), (1_000, 70_000), (5, 0)):
            file.seek(start)
            assert file.read(n_bytes) == CONTENT[start : start + n_bytes]
        file.seek(-20, os.SEEK_END)
        assert file.read() == CONTENT[-20:]


def test_reads_little_beyond_the_end_of_a_slice(folder):
    path = f"{folder}/a"
    storage.write(path, CONTENT)
    with storage.open_input(path, until=100_000) as file:
        file.seek(50_000)
        assert file.read(50_000) == CONTENT[50_000:100_000]
        assert file.raw.n_bytes == 50_000
        assert file.read(1) == CONTENT[100_000:100_001]
        assert file.raw.n_bytes == 50_000 + storage.STEP_BYTES
        assert file.read() == CONTENT[100_001:]


def test_fetch_is_one_request(folder):
    storage.write(f"{folder}/a", CONTENT)
    file = storage.InputFile(f"{folder}/a")
    assert file.fetch(200_000) == CONTENT[:200_000]
    assert file.fetch(200_000) == CONTENT[200_000:]
    assert file.fetch(1) == b""
    file.close()


def test_a_file_that_became_shorter_is_an_error(folder):
    storage.write(f"{folder}/a", CONTENT)
    with storage.open_input(f"{folder}/a") as file:
        if storage.is_remote(folder):
            storage.write(f"{folder}/a", b"short")
        else:
            os.truncate(f"{folder}/a", 5)  # a file put in its place would not touch an open one
        file.seek(1_000)
        with pytest.raises(StorageError, match="reading failed"):
            file.read(10)


def test_16_threads(folder):
    def work(n):
        path, content = f"{folder}/{n}", str(n).encode() * 1000
        storage.write(path, content)
        with storage.open_input(path) as file:
            file.seek(10)
            return file.read() == content[10:] and storage.stat(path).size == len(content)

    assert all(_parallel(16, work, range(100)))


# ---- writing ----------------------------------------------------------------------------------


def test_a_new_file_is_whole_or_absent(folder):
    path = f"{folder}/a"
    with storage.new_file(path) as file:
        file.write(b"one")
        assert storage.stat(path) is None
    assert storage.read(path) == b"one"
    with pytest.raises(ZeroDivisionError), storage.new_file(path) as file:
        file.write(bytes([1 // 0]))
    assert storage.read(path) == b"one"
    assert [file.path for file in storage.find(folder)] == [path]


def test_empty_files(folder):
    storage.write(f"{folder}/a", b"")
    assert storage.read(f"{folder}/a") == b""
    with storage.open_input(f"{folder}/a") as file:
        assert file.read() == b""


def test_a_full_disk_is_a_storage_error(folder):
    with pytest.raises(StorageError, match="No space left"), storage.new_file(f"{folder}/a"):
        raise OSError(28, "No space left on device")
    assert storage.stat(f"{folder}/a") is None


def _uploads(s3):
    answer = storage._filesystem("s3").call_s3("list_multipart_uploads", Bucket=s3.bucket)
    return answer.get("Uploads", [])


def test_an_upload_that_fails_publishes_nothing(s3, s3_folder):
    with (
        FaultyProxy(s3.endpoint, rate=1, kinds=("500", "reset_before"), match="^PUT") as proxy,
        stores.used({"AWS_ENDPOINT_URL": proxy.endpoint, **FEW_RETRIES}),
    ):
        with pytest.raises(StorageError, match="a: writing failed"):
            storage.write(f"{s3_folder}/a", b"one")
        with pytest.raises(StorageError, match="a: writing failed"):
            storage.create(f"{s3_folder}/a", b"one")
    assert storage.stat(f"{s3_folder}/a") is None


def test_a_part_that_fails_ends_the_upload(s3, s3_folder):
    path = f"{s3_folder}/large"
    with (
        FaultyProxy(s3.endpoint, rate=1, kinds=("500",), match="partNumber=2") as proxy,
        stores.used({"AWS_ENDPOINT_URL": proxy.endpoint, **FEW_RETRIES}),
    ):
        with (
            pytest.raises(StorageError, match="large: writing failed"),
            storage.new_file(path) as file,
        ):
            file.truncate(101 << 20)
        assert proxy.n_faults
    assert storage.stat(path) is None
    assert _uploads(s3) == []


@pytest.mark.slow
def test_large_uploads(s3, remote_folder):
    path, block = f"{remote_folder}/large", random.Random(1).randbytes(1 << 20)
    with storage.new_file(path) as file:
        for _ in range(130):
            file.write(block)
    assert storage.stat(path).size == 130 << 20
    with storage.open_input(path) as file:
        assert all(file.read(1 << 20) == block for _ in range(130))
        assert file.read() == b""
    assert _uploads(s3) == []


# ---- control files ----------------------------------------------------------------------------


def test_create_and_swap(folder):
    path = f"{folder}/control"
    first = storage.create(path, b"one")
    assert storage.read_versioned(path) == (b"one", first)
    for data in (b"one", b"other"):
        with pytest.raises(Conflict):
            storage.create(path, data)
    second = storage.swap(path, b"two", first)
    assert storage.read_versioned(path) == (b"two", second)
    for data in (b"two", b"three"):
        with pytest.raises(Conflict):
            storage.swap(path, data, first)
    assert storage.read(path) == b"two"
    storage.delete([path])
    with pytest.raises(Conflict):
        storage.swap(path, b"three", second)
    assert storage.read(path) is None


def test_a_write_counts_as_a_change(folder):
    path = f"{folder}/control"
    version = storage.create(path, b"one")
    storage.write(path, b"two")
    with pytest.raises(Conflict):
        storage.swap(path, b"three", version)


def test_one_of_many_creates_it(folder):
    def work(n):
        try:
            storage.create(f"{folder}/control", b"the same")
        except Conflict:
            return 0
        return 1

    for _ in range(3):
        assert sum(_parallel(16, work, range(16))) == 1
        storage.delete([f"{folder}/control"])


COUNT = """
import random, sys, time
from erniem_batch.errors import Conflict
def count(path, n_times):
    for _ in range(n_times):
        while True:
            data, version = storage.read_versioned(path)
            try:
                storage.swap(path, str(int(data) + 1).encode(), version)
                break
            except Conflict:
                time.sleep(random.random() / 20)
"""


def _count_together(path, n_threads, n_processes, n_times):
    names = {"storage": storage}
    exec(COUNT, names)
    storage.create(path, b"0")
    code = f"{COUNT}\ncount(sys.argv[1], {n_times})"
    others = [_in_another_process(code, path) for _ in range(n_processes)]
    _parallel(n_threads, lambda _: names["count"](path, n_times), range(n_threads))
    assert [process.wait() for process in others] == [0] * n_processes
    assert int(storage.read(path)) == (n_threads + n_processes) * n_times


def test_no_update_is_lost(folder):
    _count_together(f"{folder}/counter", n_threads=6, n_processes=0, n_times=4)


@pytest.mark.slow
def test_no_update_is_lost_among_many(folder):
    _count_together(f"{folder}/counter", n_threads=20, n_processes=2, n_times=20)


def test_a_lost_answer_is_no_conflict(s3, s3_folder):
    """The second try meets the first, which the store has done."""
    path = f"{s3_folder}/control"
    lost = {"rate": 1, "kinds": ("reset_after",), "match": "^PUT", "limit": 1}
    with (
        FaultyProxy(s3.endpoint, **lost) as proxy,
        stores.used({"AWS_ENDPOINT_URL": proxy.endpoint}),
    ):
        version = storage.create(path, b"one")
        assert proxy.counts["reset_after"] == 1
    assert storage.read_versioned(path) == (b"one", version)
    with (
        FaultyProxy(s3.endpoint, **lost) as proxy,
        stores.used({"AWS_ENDPOINT_URL": proxy.endpoint}),
    ):
        version = storage.swap(path, b"two", version)
        assert proxy.counts["reset_after"] == 1
    assert storage.read_versioned(path) == (b"two", version)


# ---- what cannot work -------------------------------------------------------------------------


def _attempts(folder):
    yield lambda: storage.read(f"{folder}/a")
    yield lambda: storage.stat(f"{folder}/a")
    yield lambda: list(storage.find(folder))
    yield lambda: storage.write(f"{folder}/a", b"x")
    yield lambda: storage.create(f"{folder}/a", b"x")
    yield lambda: storage.delete([f"{folder}/a"])


def test_a_wrong_secret_is_told(s3_folder):
    with stores.used({"AWS_SECRET_ACCESS_KEY": "wrong"}):
        for attempt in _attempts(s3_folder):
            with pytest.raises(StorageError, match=r"not permitted.*check the credentials") as told:
                attempt()
            assert "wrong" not in str(told.value)


def test_a_missing_bucket(remote_folder):
    url = f"{remote_folder.split('://')[0]}://nob/folder"
    assert storage.read(f"{url}/a") is None
    assert storage.stat(f"{url}/a") is None
    assert list(storage.find(url)) == []
    for write in (storage.write, storage.create):
        with pytest.raises(StorageError, match="there is no such bucket"):
            write(f"{url}/a", b"x")


def test_nobody_listens_at_s3(s3_folder):
    with stores.used({"AWS_ENDPOINT_URL": _closed_port(), **FEW_RETRIES}):
        for attempt in list(_attempts(s3_folder))[2:4]:
            begin = time.monotonic()
            with pytest.raises(StorageError, match="failed: EndpointConnectionError"):
                attempt()
            assert time.monotonic() - begin < 20


@pytest.mark.slow
def test_nobody_listens_with_all_retries(s3_folder, gs_folder):
    settings = {"AWS_ENDPOINT_URL": _closed_port(), "STORAGE_EMULATOR_HOST": _closed_port()}
    with stores.used(settings):
        for folder in (s3_folder, gs_folder):
            begin = time.monotonic()
            with pytest.raises(StorageError, match="reading failed"):
                storage.read(f"{folder}/a")
            assert time.monotonic() - begin < 120


def _closed_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_storage_that_is_not_known():
    with pytest.raises(ConfigError, match="ftp:// is no storage"):
        storage.normal("ftp://host/folder")


def test_the_account_of_azure_is_not_taken_from_the_url():
    with pytest.raises(ConfigError, match="AZURE_STORAGE_ACCOUNT_NAME"):
        storage.normal("abfss://container@account.dfs.core.windows.net/folder")


def test_a_child_makes_its_own_connections(s3_folder):
    storage.write(f"{s3_folder}/a", b"one")
    child = os.fork()
    if not child:
        status = 1
        try:
            status = 0 if storage.read(f"{s3_folder}/a") == b"one" else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


# ---- a store that often fails -----------------------------------------------------------------


def test_all_is_right_where_a_third_of_the_requests_fails(s3, s3_folder):
    with (
        FaultyProxy(s3.endpoint, rate=0.3, seed=1) as proxy,
        stores.used({"AWS_ENDPOINT_URL": proxy.endpoint}),
    ):
        _use_everything(s3_folder, n_files=12)
        assert proxy.n_faults > 10
        assert len(proxy.counts) == 7, "every kind of fault was met"
    found = {file.path: file.size for file in storage.find(f"{s3_folder}/files")}
    assert found == {f"{s3_folder}/files/{n}": 1000 + n for n in range(12)}
    assert sorted(json.loads(storage.read(f"{s3_folder}/control"))) == list(range(8))
    assert _uploads(s3) == []


def _use_everything(folder, n_files):
    def files(n):
        path, content = f"{folder}/files/{n}", CONTENT[: 1000 + n]
        storage.write(path, content)
        assert storage.read(path) == content
        assert storage.stat(path).size == len(content)
        with storage.open_input(path) as file:
            file.seek(100)
            assert file.read(500) == content[100:600]

    def control(n):
        # Whose change another one followed cannot be told, so a writer looks for its own mark.
        while True:
            data, version = storage.read_versioned(f"{folder}/control")
            marks = json.loads(data)
            if n in marks:
                return
            try:
                storage.swap(f"{folder}/control", json.dumps([*marks, n]).encode(), version)
                return
            except Conflict:
                time.sleep(random.random() / 20)

    storage.create(f"{folder}/control", b"[]")
    _parallel(8, files, range(n_files))
    _parallel(4, control, range(8))
    for _ in range(8):
        assert len(list(storage.find(f"{folder}/files"))) == n_files
