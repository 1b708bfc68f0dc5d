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
from collections.abc import Iterable
from functools import lru_cache
from glob import escape
from pathlib import Path
from typing import Any

from filelock import FileLock

from erniem_batch import storage
from erniem_batch.config import CACHE_VARIABLE, DEMO, cache_folder
from erniem_batch.errors import ConfigError, StorageError
from erniem_batch.model.files import is_model_file, short_repr
from erniem_batch.model.overlay import BASE_KEY, base_folder, base_name
from erniem_batch.options import demo_model
from erniem_batch.storage import FileInfo

logger = logging.getLogger(__name__)

STORAGE_SCHEMES = ("s3", "gs", "az", "file")
HUB_SCHEME = "hf"
# Where a training of several tasks puts what their heads share.
ENCODER = "encoder"

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")

# Files of weights by format, best first, as `checkpoint.tensors_of` looks for them.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model_state.pdparams")
_WEIGHT_SUFFIXES = tuple(Path(name).suffix for name in _WEIGHTS)


def local_folder(model: str, task: str) -> Path:
    """Where a model lies on this machine, fetched before if it is elsewhere.

    Args:
        model: `demo`; a folder; `s3://`, `gs://`, `az://` or `file://` and the URL of a folder;
            `hf://org/name` or `hf://org/name@revision` for the Hugging Face hub. `org/name` means
            the hub as well, with a warning, unless there is a file or folder `org`.
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
    if _HUB_NAME.fullmatch(model) and not _is_there(Path(model).parent):
        logger.warning(
            "model=%s is no folder here and is taken from the Hugging Face hub: write hf://%s for "
            "a model of the hub, ./%s for a folder",
            *(model, model, model),
        )
        return _from_hub(model, model, None)
    raise ConfigError(
        f"model={model!r} is not a folder: give the path of a model folder of transformers or "
        f"PaddleNLP, its URL ({', '.join(STORAGE_SCHEMES)}), hf://org/name, or {DEMO!r}"
    )


def name_elsewhere(model: str, folder: Path) -> str:
    """A name that stands for the same model in other processes and on other machines.

    A model of the hub is named with its commit. The path of a folder is marked as one, so that a
    machine that lacks the folder does not ask the hub for it.

    Args:
        model: as `local_folder` takes it.
        folder: that `local_folder` gave for it.
    """
    scheme, _, rest = model.rpartition("://")
    if model == DEMO or scheme in STORAGE_SCHEMES:
        return model
    if not scheme and Path(model).expanduser().is_dir():
        return marked_as_path(model)
    return f"{HUB_SCHEME}://{rest.partition('@')[0]}@{folder.name}"


def marked_as_path(model: str) -> str:
    """A name of a model, with `./` before the relative path of a folder that is here."""
    is_bare = model != DEMO and "://" not in model and not model.startswith(("/", ".", "~"))
    return f"./{model}" if is_bare and Path(model).is_dir() else model


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


# ---- object storage ---------------------------------------------------------------------------


def _with_base(url: str) -> Path:
    """The folder of a URL in the cache; of an overlay a copy of it, beside which its base lies."""
    folder = _downloaded(url)
    name = base_name(folder)
    if name is None:
        return folder
    above, _, base_of_url = name.partition("/")
    parent, _, own = url.rpartition("/")
    if above != ".." or "/" in base_of_url or base_of_url in ("", ".", "..", own):
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
    """A snapshot of one commit in the hub's own cache, with the files that are read here."""
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise ConfigError(
            f"model={model!r} is no folder here; to take it from the Hugging Face hub: "
            "pip install 'erniem-batch[hub]'"
        ) from error
    try:
        found = _find_on_hub(hub, name, revision)
        if found is None:
            folder = Path(hub.snapshot_download(name, revision=revision, local_files_only=True))
        else:
            commit, files = found
            patterns = [escape(file) for file in files]
            folder = Path(hub.snapshot_download(name, revision=commit, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # of the network, or no such name or revision
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"model={model!r} is no folder here, and the Hugging Face hub does not give it: "
            f"{type(error).__name__}: {reason}"
        ) from error
    if (base := base_name(folder)) is not None:
        raise ConfigError(
            f"model={model!r}: its {BASE_KEY} {base!r} is not in it; only a model that stands "
            "alone can be taken from the hub"
        )
    logger.info(
        "model=hf://%s revision=%s commit=%s; for this version again: hf://%s@%s",
        *(name, revision or "main", folder.name, name, folder.name),
    )
    return folder


def _find_on_hub(hub: Any, name: str, revision: str | None) -> tuple[str, list[str]] | None:
    """The commit of a revision and its files to read; None: the hub cannot be reached.

    Raises:
        OSError, ValueError: there is no such name or revision.
        ConfigError: there are no files of a model.
    """
    try:
        info = hub.HfApi().model_info(name, revision=revision)
    except (hub.utils.HfHubHTTPError, ValueError):
        raise
    except Exception as error:  # of the library that speaks HTTP, which depends on the version
        logger.warning(
            "the Hugging Face hub cannot be reached, looking in its cache: %s",
            type(error).__name__,
        )
        return None
    files = _files_to_read(sibling.rfilename for sibling in info.siblings or ())
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise ValueError(f"expected a commit of 40 digits, got {short_repr(info.sha)}")
    if not files:
        raise ConfigError(f"model='{HUB_SCHEME}://{name}': there are no files of a model")
    return info.sha, files


def _files_to_read(names: Iterable[str]) -> list[str]:
    """The files of a model, of weights only those of the format that is read."""
    files = sorted(filter(is_model_file, names))
    for weights, suffix in zip(_WEIGHTS, _WEIGHT_SUFFIXES, strict=True):
        index = f"{weights}.index.json"
        if weights in files or index in files:
            others = [s for s in _WEIGHT_SUFFIXES if s != suffix or weights in files]
            return [
                file
                for file in files
                if file == weights or not file.removesuffix(".index.json").endswith(tuple(others))
            ]
    return files


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.exists()
