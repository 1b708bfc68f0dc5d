"""Overlay folders: a model that holds only what differs from another one beside it.

The config.json of an overlay names a base, `"base_model": "../model"`; its weights are put over
those of the base, and the tokenizer is the base's. Such a folder is small, but only this package
reads it: `save_pretrained` of the loaded model writes an ordinary one.
"""

import os
from pathlib import Path, PurePosixPath

from erniem_batch.errors import CheckpointError
from erniem_batch.model.files import MAX_NAME_CHARS, read_json, short_repr

BASE_KEY = "base_model"
MAX_PATH_CHARS = 1_000


def base_name(folder: Path) -> str | None:
    """The base as the config.json of a folder names it; None if the folder stands alone.

    Raises:
        CheckpointError: not a relative path.
    """
    try:
        values = read_json(folder / "config.json")
    except CheckpointError:
        return None  # whoever needs the config says what is wrong with it
    name = values.get(BASE_KEY) if isinstance(values, dict) else None
    if name is None:
        return None
    if not _is_relative(name):
        raise CheckpointError(
            f"{folder}: {BASE_KEY} must be the relative path of a model folder beside this one, "
            f'such as "../model"; got {short_repr(name)}'
        )
    return str(name)


def _is_relative(name: object) -> bool:
    if not isinstance(name, str) or not name or len(name) > MAX_PATH_CHARS:
        return False
    is_path = name.isprintable() and "\\" not in name and "://" not in name
    names = PurePosixPath(name)
    return (
        is_path and not names.is_absolute() and all(len(p) <= MAX_NAME_CHARS for p in names.parts)
    )


def base_folder(folder: Path) -> Path | None:
    """The folder an overlay lies over; None if the folder stands alone.

    Raises:
        CheckpointError: the base is absent, or is an overlay itself.
    """
    name = base_name(folder)
    if name is None:
        return None
    base = folder / name
    if not (base / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: holds only what differs from its {BASE_KEY} {name!r}, which is not there: "
            "put both folders side by side, or save the model in full where both are"
        )
    if base_name(base) is not None:
        raise CheckpointError(
            f"{folder}: its {BASE_KEY} {name!r} has a {BASE_KEY} itself; only one level is read"
        )
    return base


def relative_base(folder: Path, base: Path) -> str:
    """What `base_model` says in the config.json of a folder over this base."""
    return Path(os.path.relpath(base.resolve(), folder.resolve())).as_posix()
