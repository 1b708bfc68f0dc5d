"""Small JSON documents of a run folder: written with a checksum, checked when they are read.

A document is one JSON object. Fields that this release does not know are ignored, because a newer
release may have written them. A field that is needed and absent, or of another type, makes the
document damaged: a DamagedFile names the file, the fault and the remedy.

The checksum covers the fields that the writer says are protected. It is optional, so that documents
of older releases stay readable.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from erniem_batch import storage
from erniem_batch.errors import DamagedFile

CHECKSUM = "checksum"

# Types of the fields of a document; `int` does not accept true and false.
Fields = Mapping[str, type | tuple[type, ...]]


def read_document(
    path: str, fields: Fields, remedy: str, protected: Sequence[str] = ()
) -> dict[str, Any] | None:
    """Read a document, or return None if there is no such file.

    Args:
        path: Normal path or URL.
        fields: The needed fields with their types.
        remedy: What the user should do about a damaged file; ends the message.
        protected: The fields that the checksum covers.

    Raises:
        DamagedFile: The content is not such a document.
        StorageError: The file cannot be read.
    """
    data = storage.read(path)
    return None if data is None else parse_document(data, path, fields, remedy, protected)


def parse_document(
    data: bytes, path: str, fields: Fields, remedy: str, protected: Sequence[str] = ()
) -> dict[str, Any]:
    """Check the content of a document and return its fields.

    Raises:
        DamagedFile: The content is not such a document.
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        size = "it is empty" if not data.strip() else f"its {len(data)} bytes are not JSON"
        raise damaged(path, size, remedy) from None
    if not isinstance(values, dict):
        raise damaged(path, f"a JSON object is expected, not {type(values).__name__}", remedy)
    for name, kind in fields.items():
        _require(values, name, kind, path, remedy)
    if protected:
        _require_checksum(values, protected, path, remedy)
    return values


def with_checksum(values: Mapping[str, Any], protected: Sequence[str]) -> dict[str, Any]:
    """Return the values with a checksum of the protected ones."""
    return {**values, CHECKSUM: checksum(values, protected)}


def checksum(values: Mapping[str, Any], protected: Sequence[str]) -> str:
    """Return the checksum of some fields; the same before and after a way through JSON."""
    chosen = {name: values.get(name) for name in protected}
    text = json.dumps(chosen, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def known(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return only the fields that this release knows."""
    return {name: values[name] for name in names if name in values}


def require_checksum_of_newer(
    values: Mapping[str, Any], names: Sequence[str], path: str, remedy: str
) -> None:
    """Check that a document with unknown fields has a checksum.

    A release that writes no checksum writes no field that is unknown here: the unknown field is
    the checksum itself, with a damaged name.

    Args:
        names: All fields that releases without a checksum write.

    Raises:
        DamagedFile: It has none.
    """
    if CHECKSUM not in values and values.keys() - set(names):
        raise damaged(path, "it has unknown fields and no checksum", remedy)


def damaged(path: str, what: str, remedy: str) -> DamagedFile:
    """Return the error that names a damaged file."""
    return DamagedFile(f"{path} is damaged ({what}): {remedy}")


def _require(
    values: Mapping[str, Any], name: str, kind: type | tuple[type, ...], path: str, remedy: str
) -> None:
    if name not in values:
        raise damaged(path, f"the field {name!r} is missing", remedy)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    value = values[name]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(k.__name__ for k in kinds)
        what = f"the field {name!r} should be {wanted} and is {type(value).__name__}"
        raise damaged(path, what, remedy)


def _require_checksum(
    values: Mapping[str, Any], protected: Sequence[str], path: str, remedy: str
) -> None:
    stated = values.get(CHECKSUM)
    if stated is not None and stated != checksum(values, protected):
        raise damaged(path, "its checksum does not fit its content", remedy)
