"""Models by name: a folder, a URL of object storage or a name on the Hugging Face hub in, a local
folder out; and what tells two models apart.

A model is the files at the top of one folder that decide its answers, see `is_model_file`. The rest
(cards, pictures, the state of a training, its older checkpoints) is neither fetched nor compared.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

from erniem_batch import storage
from erniem_batch.config import CACHE_VARIABLE, DEMO, cache_folder
from erniem_batch.errors import ConfigError, StorageError
from erniem_batch.model.overlay import base_folder, base_name
from erniem_batch.options import demo_model
from erniem_batch.storage import FileInfo

logger = logging.getLogger(__name__)

STORAGE_SCHEMES = ("s3", "gs", "az", "file")
HUB_SCHEME = "hf"
# Where a training of several tasks puts what their heads share.
ENCODER = "encoder"

# Configuration, vocabulary and tokenizer settings, weights of any format that is read.
MODEL_FILES = ("*.json", "*.txt", "*.model", "*.safetensors", "*.bin", "*.pdparams")
# Of these: what a training leaves beside a model, hidden files, texts for people, folders.
OTHER_FILES = (
    ".*",
    "README*",
    "*_results.json",
    "optimizer*",
    "scheduler*",
    "trainer_state.json",
    "training_args.*",
    "*/*",
)

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def is_model_file(name: str) -> bool:
    """Whether a file, by its path within a folder, is a part of the model there."""
    return _matches(name, MODEL_FILES) and not _matches(name, OTHER_FILES)


def local_folder(model: str, task: str) -> Path:
    """Where a model lies on this machine, fetched before if it is elsewhere.

    Args:
        model: `demo`; a folder; `s3://`, `gs://`, `az://` or `file://` and the URL of a folder;
            `hf://org/name`, `hf://org/name@revision` or `org/name` for the Hugging Face hub.
        task: which demo model is meant by `demo`.

    Raises:
        ConfigError: there is no such model, or the package that fetches it is not installed.
        StorageError: the model cannot be read in full.
    """
    if model == DEMO:
        return demo_model(task)
    scheme, _, rest = model.rpartition("://")
    if scheme in STORAGE_SCHEMES:
        return _with_base(storage.normal(model))
    name, _, revision = rest.partition("@")
    if scheme == HUB_SCHEME and _HUB_NAME.fullmatch(name):
        return _from_hub(model, name, revision or None)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if _HUB_NAME.fullmatch(model):
        return _from_hub(model, model, None)
    raise ConfigError(
        f"model={model!r} is not a folder: give the path of a model folder of transformers or "
        f"PaddleNLP, its URL ({', '.join(STORAGE_SCHEMES)}), hf://org/name, or {DEMO!r}"
    )


def head_url(model: str, name: str) -> str | None:
    """A folder of the output of a training of several tasks; None: this is none, or has no such.

    Args:
        name: of a task, or ENCODER.
    """
    scheme, _, _ = model.rpartition("://")
    if model == DEMO or scheme not in ("", *STORAGE_SCHEMES):
        return None
    url = storage.join(storage.normal(model), name)
    return None if storage.stat(storage.join(url, "config.json")) is None else url


def model_digest(folder: Path) -> str:
    """SHA-256, in hex, over names and contents of all files that decide a model's answers.

    The same as `sha256sum FILES | sha256sum` in the folder, files sorted by name; those of the base
    of an overlay come after, as `../model/config.json`.

    Raises:
        CheckpointError: an overlay without its base.
    """
    lines = _digest_lines(folder, prefix="")
    base = base_folder(folder)
    if base is not None:
        lines += _digest_lines(base, prefix=f"{base_name(folder)}/")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _digest_lines(folder: Path, prefix: str) -> list[str]:
    """What `sha256sum` says of the files of a model."""
    lines = []
    for path in sorted(folder.iterdir()):
        if is_model_file(path.name) and path.is_file():
            stat = path.stat()
            digest = _file_digest(path, stat.st_size, stat.st_mtime_ns)
            lines.append(f"{digest}  {prefix}{path.name}\n")
    return lines


@lru_cache(maxsize=1024)
def _file_digest(path: Path, size: int, mtime_ns: int) -> str:
    """Of the content; size and time are only here to read a changed file anew."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


# ---- object storage ---------------------------------------------------------------------------


def _with_base(url: str) -> Path:
    """The folder of a URL in the cache; of an overlay a copy of it, beside which its base lies."""
    folder = _downloaded(url)
    name = base_name(folder)
    if name is None:
        return folder
    above, _, base_of_url = name.partition("/")
    parent, _, own = url.rpartition("/")
    if above != ".." or "/" in base_of_url or base_of_url in ("", "..", own):
        raise ConfigError(
            f"{url}: its base_model {name!r} is not beside it; by URL only a base of the form "
            f'"../NAME" can be fetched'
        )
    base = _downloaded(f"{parent}/{base_of_url}")
    pair = folder.with_name(f"{folder.name}-{base.name}")
    with FileLock(folder.with_name(f"{pair.name}.lock")):
        if not pair.is_dir():
            partial = pair.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(folder, partial / own)
            (partial / base_of_url).symlink_to(base)
            partial.rename(pair)
    return pair / own


def _downloaded(url: str) -> Path:
    """The folder in the cache with the files that are at the URL now; only the first call reads."""
    files = _model_files(url)
    models = cache_folder() / "models"
    folder = models / _key(url, files)
    if folder.is_dir():
        return folder
    try:
        models.mkdir(parents=True, exist_ok=True)
        with FileLock(models / f"{folder.name}.lock"):
            if not folder.is_dir():  # another process may have been faster
                _download(url, files, folder)
    except OSError as error:
        raise StorageError(
            f"{url}: cannot be copied to {folder}: {error} ({CACHE_VARIABLE} names another place)"
        ) from error
    return folder


def _model_files(url: str) -> dict[str, FileInfo]:
    """By name, in order of names."""
    found = {info.path.removeprefix(f"{url}/"): info for info in storage.find(url)}
    files = {name: found[name] for name in sorted(found) if is_model_file(name)}
    if not files:
        raise ConfigError(f"model={url!r}: there are no files of a model")
    return files


def _key(url: str, files: dict[str, FileInfo]) -> str:
    """A name for these files in these versions; another version gets another folder."""
    facts = [url, *((name, info.size, str(info.version)) for name, info in files.items())]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _download(url: str, files: dict[str, FileInfo], folder: Path) -> None:
    """Fills the folder; it is there as a whole or not at all. The caller holds its lock."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    try:
        for name, info in files.items():
            logger.info("downloading model file=%s bytes=%s", info.path, info.size)
            _copy(info, partial / name)
        if _model_files(url) != files:  # weights of two trainings have the same size
            raise StorageError(f"{url}: the model was changed while it was read: try again")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy(info: FileInfo, path: Path) -> None:
    with storage.open_input(info.path) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
        size = target.tell()
    if size != info.size:
        raise StorageError(f"{info.path}: read {size} bytes of {info.size}: try again")


# ---- hub --------------------------------------------------------------------------------------


def _from_hub(model: str, name: str, revision: str | None) -> Path:
    """A snapshot in the hub's own cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigError(
            f"model={model!r} is no folder here; to take it from the Hugging Face hub: "
            "pip install 'erniem-batch[hub]'"
        ) from error
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(MODEL_FILES),
                ignore_patterns=list(OTHER_FILES),
            )
        )
    except (OSError, ValueError) as error:  # of the network, or no such name or revision
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"model={model!r} is no folder here, and the Hugging Face hub does not give it: "
            f"{type(error).__name__}: {reason}"
        ) from error
