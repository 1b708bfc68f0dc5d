"""Files on a local disk or in object storage, by one set of functions; nobody else opens them.

A path is a local path or a URL (`s3://`, `gs://`, `az://`; `file://` is a local path). Object
storage is reached through fsspec (s3fs, gcsfs, adlfs), which brings credentials from the usual
environment and its own retries. Three things are promised for both:

- a new file appears under its name whole or not at all (`new_file`, `write`);
- `create` and `swap` change a small control file only if nobody else did, `new_file` with
  `exclusive` never replaces a file, and `remove` deletes only the file that was listed: a process
  that stands still for an hour before one of them does no harm when it goes on;
- every failure but an absent file is a StorageError, so that it cannot be taken for bad content.
"""

import errno
import hashlib
import io
import json
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from stat import S_ISREG
from typing import IO, Any
from urllib.parse import quote

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from erniem_batch.errors import ConfigError, Conflict, StorageError

EXTRAS = {"s3": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "abfss": "az"}
ATTEMPTS = 8
READ_BYTES = 4 << 20
# Beyond the end of a slice a line has to be finished: small steps are enough.
STEP_BYTES = 64 << 10
DELETING_THREADS = 16
TEMPORARY_BYTES = 100  # of the name of a file, in that of its temporary one
CONNECT_SECONDS = 10
SILENT_SECONDS = 60
LOCK_SECONDS = 60
# What a file system answers that has no hard links.
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file as a listing shows it.

    Attributes:
        path: full path or URL.
        size: bytes.
        version: changes when the content does: the ETag or generation; locally see
            `_local_version`. Compare versions with `same_version`.
    """

    path: str
    size: int
    version: str


# ---- paths ------------------------------------------------------------------------------------


def normal(path: str) -> str:
    """An absolute local path, or a URL without a slash at its end.

    Raises:
        ConfigError: storage of this kind is not known, or its library is not installed.
    """
    if path.startswith("file://"):
        path = path.removeprefix("file://")
    if is_remote(path):
        scheme = _scheme(path)
        if EXTRAS.get(scheme) == "az" and "@" in path.split("/")[2]:
            account = "the account comes from AZURE_STORAGE_ACCOUNT_NAME"
            raise ConfigError(f"{path}: give {scheme}://container/path; {account}")
        _filesystem(scheme)
        return path.rstrip("/")
    if path.startswith("~") and not os.path.lexists(path):
        path = os.path.expanduser(path)
    return _shown(str(Path(path).absolute()))


def real(path: str) -> str:
    """A normal path without symbolic links; a URL as it is."""
    return path if is_remote(path) else _shown(os.path.realpath(_on_disk(path)))


def for_output(path: str, flag: str = "--output") -> str:
    """The normal path of a folder to write into.

    Raises:
        ConfigError: as `normal`; or the name is not UTF-8.
    """
    found = normal(path)
    if _STOOD_IN.search(found) and not is_remote(found):
        raise ConfigError(f"{flag} {found}: the name is not UTF-8: choose another one")
    return found


def is_pattern(path: str) -> bool:
    """Whether a path has the characters of a pattern. An existing path is a path first."""
    return any(char in path for char in "*?[")


def exists(path: str) -> bool:
    """Whether there is a file or folder of this name."""
    with _storage_errors(path, "looking"):
        if is_remote(path):
            return bool(_filesystem(_scheme(path)).exists(path))
        return os.path.exists(_on_disk(path))


# A local name is bytes, and some are not UTF-8. Python has lone surrogates for those bytes, which
# neither Arrow nor JSON can hold: here characters of the private use area stand for them.
_STOOD_IN = re.compile("[\uf780-\uf7ff]")
_SURROGATE = re.compile("[\udc80-\udcff]")
_SHIFT = 0xF780 - 0xDC80


def _shown(path: str) -> str:
    return _SURROGATE.sub(lambda found: chr(ord(found[0]) + _SHIFT), path)


def _on_disk(path: str) -> str:
    """The path as the system knows it."""
    if _STOOD_IN.search(path) is None or os.path.lexists(path):
        return path
    return _STOOD_IN.sub(lambda found: chr(ord(found[0]) - _SHIFT), path)


def is_remote(path: str) -> bool:
    """Whether the path is a URL of object storage."""
    return "://" in path


def join(folder: str, name: str) -> str:
    """A path inside a folder."""
    return f"{folder}/{name}"


def _scheme(path: str) -> str:
    return path.split("://", 1)[0]


@cache
def _filesystem(scheme: str) -> Any:
    if scheme not in EXTRAS:
        known = ", ".join(f"{name}://" for name in sorted(EXTRAS))
        raise ConfigError(f"{scheme}:// is no storage that can be used: give a path, {known}")
    try:
        if EXTRAS[scheme] == "s3":
            return _s3()
        if EXTRAS[scheme] == "gs":
            return _gcs()
        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError as error:
        raise ConfigError(
            f"{scheme}:// needs a library that is not installed: "
            f"pip install 'erniem-batch[{EXTRAS[scheme]}]'"
        ) from error


def for_arrow(path: str) -> tuple[str, Any]:
    """A normal path as pyarrow's users take it: path and pyarrow filesystem, None for local ones.

    Object storage goes through the same filesystem as everything else here, with the same
    credentials and retries.
    """
    if not is_remote(path):
        return os.path.abspath(path), None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    scheme, _, rest = path.partition("://")
    return rest, PyFileSystem(FSSpecHandler(_filesystem(scheme)))


# A child does not have the thread that the connections of its parent belong to.
os.register_at_fork(after_in_child=_filesystem.cache_clear)


def _s3() -> Any:
    config: dict[str, Any] = {"connect_timeout": CONNECT_SECONDS, "read_timeout": SILENT_SECONDS}
    # What the environment says about retries holds.
    if not {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & os.environ.keys():
        config["retries"] = {"mode": "standard", "max_attempts": ATTEMPTS}
    return fsspec.filesystem("s3", use_listings_cache=False, config_kwargs=config)


def _gcs() -> Any:
    from aiohttp import ClientTimeout

    # The class that fsspec would take asks by gRPC for the kind of the bucket before each upload,
    # for up to a minute where that is not allowed; only zonal buckets need it.
    from gcsfs.core import GCSFileSystem

    timeout = ClientTimeout(sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS)
    return GCSFileSystem(use_listings_cache=False, requests_timeout=timeout)


@contextmanager
def _storage_errors(path: str, doing: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, StorageError, ConfigError):
        raise
    except Exception as error:
        # Each library has a family of errors of its own, and they share no base.
        if not (isinstance(error, OSError) or is_remote(path)):
            raise
        what, hint = "failed", ""
        if isinstance(error, IsADirectoryError):
            hint = ": a folder stands where a file is expected, move it away"
        elif isinstance(error, NotADirectoryError | FileExistsError):
            hint = ": a file stands where a folder is expected, move it away"
        if isinstance(error, PermissionError) or _status(error) in ("401", "403"):
            what = "is not permitted"
            hint = "; check the credentials in the environment" if is_remote(path) else ""
        raise StorageError(f"{path}: {doing} {what}: {_short(error)}{hint}") from error


@contextmanager
def _upload_errors(path: str) -> Iterator[None]:
    with _storage_errors(path, "writing"):
        try:
            yield
        except Exception as error:
            if not _is_absent(error):
                raise
            raise StorageError(f"{path}: writing failed: there is no such bucket") from error


def _is_absent(error: BaseException) -> bool:
    return isinstance(error, FileNotFoundError) or _status(error) == "404"


def _status(error: BaseException) -> str:
    """The HTTP status that an error of one of the libraries stands for, or an empty string."""
    for cause in filter(None, (error, error.__cause__)):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            status = getattr(cause, "status_code", None) or getattr(cause, "code", None)
        if status:
            return str(status)
    return "403" if str(error).startswith("Forbidden:") else ""  # so says gcsfs


def _short(error: BaseException) -> str:
    text = (getattr(error, "strerror", None) or str(error)).strip().split("\n")[0][:300].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# ---- looking ----------------------------------------------------------------------------------


def find(path: str) -> Iterator[FileInfo]:
    """All files below a folder, or the file itself; nothing if there is neither."""
    with _storage_errors(path, "listing"):
        if is_remote(path):
            scheme = _scheme(path)
            with suppress(FileNotFoundError):
                found = _filesystem(scheme).find(path, detail=True)
                if isinstance(found, list):  # adlfs, if it is one file
                    found = {name: _filesystem(scheme).info(name) for name in found}
                while found:
                    name, info = found.popitem()
                    # Consoles put empty objects where they show folders.
                    if info["type"] == "file" and not name.endswith("/"):
                        yield _remote_info(scheme, info)
        elif os.path.isfile(_on_disk(path)):
            yield _local_info(path)
        else:
            there = os.walk(_on_disk(path), onerror=_unlistable, followlinks=True)
            for folder, _, names in there:
                for name in names:
                    with suppress(FileNotFoundError):
                        yield _local_info(_shown(os.path.join(folder, name)))


def _unlistable(error: OSError) -> None:
    """A folder that cannot be read must not look like an empty one."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def glob(pattern: str) -> list[str]:
    """Paths of files and folders that match a pattern with `*`, `?`, `[` or `**`."""
    with _storage_errors(pattern, "listing"):
        if is_remote(pattern):
            scheme = _scheme(pattern)
            return sorted(f"{scheme}://{name}" for name in _filesystem(scheme).glob(pattern))
        import glob as local

        return sorted(map(_shown, local.glob(_on_disk(pattern), recursive=True)))


def stat(path: str) -> FileInfo | None:
    """The file, or None if there is none."""
    with _storage_errors(path, "looking"):
        try:
            if not is_remote(path):
                return _local_info(path)
            info = _filesystem(_scheme(path)).info(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return _remote_info(_scheme(path), info) if info["type"] == "file" else None


def _local_info(path: str) -> FileInfo:
    state = os.stat(_on_disk(path))
    if not S_ISREG(state.st_mode):
        raise FileNotFoundError(f"{path}: no regular file")
    return FileInfo(path, state.st_size, _local_version(state))


def _local_version(state: os.stat_result) -> str:
    """The version of a local file: time of modification, size and time of change.

    The time of modification is copied by `cp -p`, `rsync -t`, `touch -r` and archives, so that two
    files of one size may have the same. The time of change (ctime) is set by the kernel whenever
    content or attributes change, and no program can set it back. The number of the inode is not
    used: an editor that writes in place keeps it, ext4 gives a free one to the next file, and on
    network file systems the nodes of a cluster may see different ones. The price is that a restored
    or copied file, or one with new owner, mode or hard links, counts as changed.
    """
    return f"{state.st_mtime_ns}-{state.st_size}-c{state.st_ctime_ns}"


# The last part is absent in what older releases have written down.
CHANGE_TIME = r"^(-?\d+-\d+)-c-?\d+$"


def same_version(planned: str, now: str) -> bool:
    """Whether a version that was written down, by an older release too, is that of now."""
    return planned == now or planned == re.sub(CHANGE_TIME, r"\1", now)


def _remote_info(scheme: str, info: dict[str, Any]) -> FileInfo:
    version = info.get("generation") or info.get("ETag") or info.get("etag") or ""
    return FileInfo(f"{scheme}://{info['name']}", int(info["size"]), str(version).strip('"'))


# ---- reading ----------------------------------------------------------------------------------


def read(path: str) -> bytes | None:
    """The whole content of a small file, or None if there is none."""
    with _storage_errors(path, "reading"):
        try:
            if is_remote(path):
                return bytes(_filesystem(_scheme(path)).cat_file(path))
            return Path(_on_disk(path)).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None


class InputFile(io.RawIOBase):
    """A file for reading at any place, without reading ahead further than it is asked to.

    Args:
        until: where the reader expects to stop; beyond it, requests are small.

    Attributes:
        n_bytes: read so far.
    """

    def __init__(self, path: str, until: int | None = None) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        info = stat(path)
        if info is None:
            raise FileNotFoundError(f"{path}: there is no such file")
        self.info = info
        self.n_bytes = 0
        self._until = info.size if until is None else until
        self._at = 0
        if not is_remote(path):
            with _storage_errors(path, "opening"):
                self._file = open(_on_disk(path), "rb", buffering=0)  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.info.size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self.info.size - self._at)
        if self._at < self._until:
            wanted = min(wanted, self._until - self._at)
        else:
            wanted = min(wanted, STEP_BYTES)
        data = self.fetch(wanted)
        buffer[: len(data)] = data
        return len(data)

    def fetch(self, n_bytes: int) -> bytes:
        """Up to so many bytes from here, in one request; fewer only at the end of the file."""
        n_bytes = max(0, min(n_bytes, self.info.size - self._at))
        if not n_bytes:
            return b""
        with _storage_errors(self._path, "reading"):
            if self._file is None:
                end = self._at + n_bytes
                filesystem = _filesystem(_scheme(self._path))
                data = bytes(filesystem.cat_file(self._path, start=self._at, end=end))
            else:
                data = os.pread(self._file.fileno(), n_bytes, self._at)
        if not data:
            raise StorageError(f"{self._path}: reading failed: it has become shorter")
        self._at += len(data)
        self.n_bytes += len(data)
        return data

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


def open_input(path: str, until: int | None = None) -> io.BufferedReader:
    """A file for reading in order.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: it cannot be opened.
    """
    return io.BufferedReader(InputFile(path, until), READ_BYTES)


def read_table(path: str) -> pa.Table:
    """A whole Parquet file.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: it cannot be read.
    """
    with InputFile(path) as source:
        return pq.read_table(pa.PythonFile(source, mode="r"))


def sha256_of(path: str) -> str:
    """Read a file and return its SHA-256 in hexadecimal digits.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: it cannot be read.
    """
    digest = hashlib.sha256()
    with InputFile(path) as source:
        while data := source.fetch(READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


@contextmanager
def local_copy(path: str) -> Iterator[tuple[str, int, str]]:
    """A local file with the content of a file, its size and its SHA-256.

    A file of object storage is downloaded once and removed after the block.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: it cannot be read.
    """
    if not is_remote(path):
        info = stat(path)
        if info is None:
            raise FileNotFoundError(f"{path}: there is no such file")
        yield path, info.size, sha256_of(path)
        return
    with tempfile.NamedTemporaryFile() as file:
        digest = hashlib.sha256()
        with InputFile(path) as source:
            while data := source.fetch(READ_BYTES):
                digest.update(data)
                file.write(data)
        file.flush()
        yield file.name, file.tell(), digest.hexdigest()


# ---- writing ----------------------------------------------------------------------------------


@contextmanager
def new_file(path: str, *, exclusive: bool = False) -> Iterator[IO[bytes]]:
    """A file that appears under its name when the block has ended, or not at all.

    Args:
        exclusive: a file that is there already stays.

    Raises:
        Conflict: `exclusive`, and when the block had ended, there was a file of this name.

    Locally it is renamed in its folder. For object storage it is collected on the local disk and
    then sent in one upload, which the library abandons on an error: an exception in the block finds
    nothing to abort, because no upload has begun.
    """
    if is_remote(path):
        with tempfile.NamedTemporaryFile() as file:
            with _storage_errors(file.name, "writing"):
                yield file
                file.flush()
            if exclusive:
                _conditionally(path, None, partial(_upload_new, file.name))
            else:
                with _upload_errors(path):
                    _filesystem(_scheme(path)).put_file(file.name, path)
        return
    target = Path(path)
    temporary = _temporary(target)
    try:
        with _storage_errors(path, "writing"):
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            try:
                if exclusive:
                    _rename_new(temporary, target)
                else:
                    temporary.replace(target)
            except FileNotFoundError:
                raise Conflict(f"{path}: another run has removed its unfinished file") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary(target: Path) -> Path:
    """A new name beside a file. A part of its name is enough: the whole one with these additions
    may be too long."""
    beginning = os.fsencode(target.name)[:TEMPORARY_BYTES].decode(errors="ignore")
    return target.with_name(f".{beginning}.{uuid.uuid4().hex}.tmp")


def _rename_new(temporary: Path, target: Path) -> None:
    """Renames a file unless that would replace another, in one step.

    Raises:
        Conflict: the target exists.
    """
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise Conflict(f"{target}: somebody else has made it") from None
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        with _locked(target):
            if target.exists():
                raise Conflict(f"{target}: somebody else has made it") from None
            temporary.replace(target)


def _upload_new(local: str, filesystem: Any, path: str, content_type: str) -> str:
    """Uploads a local file as a new object; gives no version."""
    only_new: dict[str, dict[str, Any]] = {
        "s3": {"mode": "create", "ContentType": content_type},
        "gs": {"mode": "create", "content_type": content_type},
        "az": {"overwrite": False, "content_settings": {"content_type": content_type}},
    }
    filesystem.put_file(local, path, **only_new[EXTRAS[_scheme(path)]])
    return ""


@contextmanager
def scratch(folder: str) -> Iterator[IO[bytes]]:
    """A file without a name that is gone when the block has ended.

    Args:
        folder: of results; a local one has the file, since there is room for them.
    """
    if not is_remote(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
    with (
        _storage_errors(folder, "writing a temporary file"),
        tempfile.TemporaryFile(dir=None if is_remote(folder) else folder) as file,
    ):
        yield file


def unfinished(folder: str) -> Iterator[FileInfo]:
    """Temporary files below a folder; those of writers that were killed, if nobody is writing."""
    if not is_remote(folder):
        for info in find(folder):
            if re.search(r"/\.[^/]+\.[0-9a-f]{32}\.tmp$", info.path):
                yield info


def write(path: str, data: bytes) -> None:
    """Replaces a small file, or makes it, in one step."""
    with new_file(path) as file:
        file.write(data)


def write_table(path: str, table: pa.Table) -> None:
    """Replaces a Parquet file, or makes it, in one step."""
    with new_file(path) as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)


class Hashed:
    """A new file that is hashed while it is written from its beginning to its end.

    Args:
        file: of `new_file`.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.closed = False

    def write(self, data: Any) -> int:
        """Write bytes, or anything with a buffer of bytes."""
        self._digest.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        """The number of bytes that have been written."""
        return self._file.tell()

    def flush(self) -> None:
        """Hand what was written to the system."""
        self._file.flush()

    def close(self) -> None:
        """Do nothing: the owner of the file closes it."""

    def sha256(self) -> str:
        """The SHA-256 of all that was written, in hexadecimal digits."""
        return self._digest.hexdigest()


def write_tables(path: str, tables: Iterable[pa.Table], large: str) -> None:
    """The same from several tables of one schema, each a row group.

    Args:
        large: column without dictionary and statistics, which take its memory several times more.
    """
    tables = iter(tables)
    table = next(tables)
    nested = any(pa.types.is_nested(field.type) for field in table.schema)
    indexed = nested or [name for name in table.column_names if name != large]
    columns: dict[str, Any] = {"use_dictionary": indexed, "write_statistics": indexed}
    columns |= {"compression": "zstd", "write_page_checksum": True}
    with (
        new_file(path) as file,
        pq.ParquetWriter(file, table.schema, **columns) as writer,
    ):
        writer.write_table(table)
        for table in tables:
            writer.write_table(table)


def delete(paths: Iterable[str]) -> None:
    """Removes files; absent ones are no error."""
    with ThreadPoolExecutor(DELETING_THREADS) as pool:
        list(pool.map(_delete, paths))


def _delete(path: str) -> None:
    with _storage_errors(path, "deleting"), suppress(FileNotFoundError):
        if is_remote(path):
            _filesystem(_scheme(path)).rm_file(path)
        else:
            os.unlink(path)


def remove(files: Iterable[FileInfo]) -> None:
    """Deletes files, each only if it is still the one that was listed.

    Where an object store ignores the condition of a deletion, a file that somebody replaces between
    a last look and the deletion is lost; names that are never used twice are safe there, too.
    """
    with ThreadPoolExecutor(DELETING_THREADS) as pool:
        for _ in pool.map(_remove, files):
            pass


def _remove(info: FileInfo) -> None:
    with _storage_errors(info.path, "deleting"), suppress(FileNotFoundError):
        if stat(info.path) != info:
            return
        if is_remote(info.path):
            _remove_object(info)
        else:
            _remove_local(info)


def _remove_local(info: FileInfo) -> None:
    """Moves the file aside and looks at it, since no system call deletes a file conditionally."""
    target = Path(_on_disk(info.path))
    before = os.stat(target)
    if (before.st_size, _local_version(before)) != (info.size, info.version):
        return
    aside = _temporary(target)
    os.rename(target, aside)
    if not _is_same(before, os.stat(aside)):  # it is another by now: back with it
        with suppress(Conflict):  # unless there is a still newer one
            _rename_new(aside, target)
    os.unlink(aside)


def _is_same(one: os.stat_result, other: os.stat_result) -> bool:
    names = ("st_ino", "st_dev", "st_size", "st_mtime_ns")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _remove_object(info: FileInfo) -> None:
    scheme = _scheme(info.path)
    filesystem = _filesystem(scheme)
    drop = {"s3": _s3_drop, "gs": _gs_drop, "az": _az_drop}[EXTRAS[scheme]]
    try:
        drop(filesystem, info)
    except Exception as error:
        if not (_is_absent(error) or _is_conflict(error, info.version)):
            raise


def _s3_drop(filesystem: Any, info: FileInfo) -> None:
    bucket, key, _ = filesystem.split_path(info.path)
    condition = f'"{info.version}"'
    filesystem.call_s3("delete_object", Bucket=bucket, Key=key, IfMatch=condition)


def _gs_drop(filesystem: Any, info: FileInfo) -> None:
    bucket, key, _ = filesystem.split_path(info.path)
    filesystem.call("DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=info.version)


def _az_drop(filesystem: Any, info: FileInfo) -> None:
    # adlfs has no deletion with a condition: the last look is all.
    filesystem.rm_file(info.path)


# ---- control files: change them only if nobody else did ---------------------------------------


def read_versioned(path: str) -> tuple[bytes, str] | None:
    """A control file and the version that `swap` wants, or None if there is none."""
    if not is_remote(path):
        data = read(path)
        return None if data is None else (data, _digest(data))
    # The version first: if the content changes in between, the swap fails, as it should.
    info = stat(path)
    data = None if info is None else read(path)
    return None if info is None or data is None else (data, info.version)


def version_of(path: str) -> str | None:
    """The version of a control file that `swap` wants, or None if there is none."""
    if is_remote(path):
        info = stat(path)
        return None if info is None else info.version
    there = read_versioned(path)
    return None if there is None else there[1]


def create(path: str, data: bytes) -> str:
    """Makes a control file; gives its version.

    Raises:
        Conflict: there is one already.
    """
    return _put(path, data, None)


def swap(path: str, data: bytes, version: str) -> str:
    """Replaces a control file that still has this version; gives the new version.

    Raises:
        Conflict: it has another, or is gone.
    """
    return _put(path, data, version)


def _put(path: str, data: bytes, version: str | None) -> str:
    if not is_remote(path):
        return _local_put(path, data, version)
    put = {"s3": _s3_put, "gs": _gs_put, "az": _az_put}[EXTRAS[_scheme(path)]]

    def upload(filesystem: Any, path: str, content_type: str) -> str:
        return put(filesystem, path, data, version, content_type).strip('"')

    return _conditionally(path, version, upload)


def _conditionally(path: str, version: str | None, upload: Callable[[Any, str, str], str]) -> str:
    """Uploads with a condition; gives the new version.

    Args:
        upload: takes the filesystem, the path and a content type that tells this upload from all
            others.

    Raises:
        Conflict: the condition did not hold.
    """
    scheme = _scheme(path)
    filesystem = _filesystem(scheme)
    # If the answer to a request is lost, the library sends it again and meets its own first try:
    # this tells it from anybody else's.
    content_type = f"application/octet-stream; writer={uuid.uuid4().hex}"
    with _upload_errors(path):
        try:
            return upload(filesystem, path, content_type)
        except Exception as error:
            if not _is_conflict(error, version):
                raise
        with suppress(FileNotFoundError):
            info = filesystem.info(path)
            if _content_type(info) == content_type:
                return _remote_info(scheme, info).version
    raise Conflict(f"{path}: somebody else has changed it")


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """One process at a time; the kernel frees the lock of a process that has died."""
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise StorageError(
            f"{target}: another process holds its lock for {LOCK_SECONDS} s: look for one that "
            f"stands still, end it, and run the same command again"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _local_put(path: str, data: bytes, version: str | None) -> str:
    target = Path(path)
    with _storage_errors(path, "writing"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            there = read_versioned(path)
            if (None if there is None else there[1]) != version:
                raise Conflict(f"{path}: somebody else has changed it")
            write(path, data)
    return _digest(data)


# The conditions are spelt out: older releases of s3fs and adlfs ignore mode="create".


def _s3_put(filesystem: Any, path: str, data: bytes, version: str | None, content_type: str) -> str:
    condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": f'"{version}"'}
    answer = filesystem.pipe_file(path, data, ContentType=content_type, **condition)
    return str(answer["ETag"])


def _gs_put(filesystem: Any, path: str, data: bytes, version: str | None, content_type: str) -> str:
    bucket, key, _ = filesystem.split_path(path)
    # gcsfs itself knows only "create"; this is the same request with any generation.
    boundary = uuid.uuid4().hex
    head = f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n"
    name = json.dumps({"name": key})
    body = f"\r\n--{boundary}\r\nContent-Type: {content_type}\r\n\r\n"
    answer = filesystem.call(
        "POST",
        f"{filesystem._location}/upload/storage/v1/b/{quote(bucket)}/o",
        uploadType="multipart",
        ifGenerationMatch=version or "0",
        headers={"Content-Type": f"multipart/related; boundary={boundary}"},
        data=(head + name + body).encode() + data + f"\r\n--{boundary}--".encode(),
        json_out=True,
    )
    return str(answer["generation"])


def _az_put(filesystem: Any, path: str, data: bytes, version: str | None, content_type: str) -> str:
    from azure.core import MatchConditions

    condition: dict[str, Any] = {"overwrite": False}
    if version is not None:
        condition = {"etag": f'"{version}"', "match_condition": MatchConditions.IfNotModified}
    settings = {"content_type": content_type}
    return str(filesystem.pipe_file(path, data, content_settings=settings, **condition)["etag"])


def _content_type(info: dict[str, Any]) -> str | None:
    settings = info.get("content_settings") or {}
    return info.get("ContentType") or info.get("contentType") or settings.get("content_type")


def _is_conflict(error: BaseException, version: str | None) -> bool:
    """Whether a request failed because its condition did not hold."""
    if _is_absent(error):
        return version is not None
    return isinstance(error, FileExistsError) or _status(error) in ("409", "412")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
