"""Files of a model folder: which ones belong to the model, and reading them within limits.

A model folder may come from a stranger. Every file that is not weights is read through this module,
which checks the size before it reads.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from reprlib import Repr
from typing import Any

from erniem_batch.errors import CheckpointError

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

# 100,000 labels, each with a name of 70 characters, stay below this.
MAX_JSON_BYTES = 16 << 20
MAX_JSON_DEPTH = 100
MAX_SHARDS = 1_000
MAX_NAME_CHARS = 255
MAX_REASON_CHARS = 300

_shorten = Repr()
_shorten.maxstring = _shorten.maxother = _shorten.maxlong = 80
_shorten.maxlevel = 2


def short_repr(value: Any) -> str:
    """The repr of a value from a file, cut to a length that fits into an error message."""
    try:
        return _shorten.repr(value)
    except ValueError:  # an integer with more digits than Python prints
        return f"a very long {type(value).__name__}"


def short_reason(error: Exception) -> str:
    """The message of another library's error, which may repeat what is in a file, cut short."""
    return " ".join(str(error).split())[:MAX_REASON_CHARS]


def is_model_file(name: str) -> bool:
    """Whether a file, by its path within a folder, is a part of the model there."""
    return _matches(name, MODEL_FILES) and not _matches(name, OTHER_FILES)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes.

    Raises:
        CheckpointError: the file is larger, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(size) if size <= limit else b""
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if size > limit:
        raise CheckpointError(f"{path}: expected at most {limit:,} bytes, got {size:,}")
    return content


def read_json(path: Path) -> Any:
    """The content of a JSON file of at most MAX_JSON_BYTES.

    Raises:
        CheckpointError: the file is larger, damaged or nested too deeply; an object in it holds
            the same key twice, which programs read in different ways; or a string in it has half
            of a surrogate pair, which no file in UTF-8 can hold.
    """
    content = read_bytes(path, MAX_JSON_BYTES)
    try:
        values = json.loads(content.decode("utf-8"), object_pairs_hook=_object)
        if b"\\ud" in content.lower():
            json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{path}: a string has half of a surrogate pair") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {short_reason(error)}") from error
    if isinstance(values, dict | list) and _is_too_deep(values):
        raise CheckpointError(f"{path}: nested more than {MAX_JSON_DEPTH} levels deep")
    return values


def _is_too_deep(content: Any) -> bool:
    level = [content]
    for _ in range(MAX_JSON_DEPTH):
        inner = (v.values() if isinstance(v, dict) else v for v in level)
        level = [v for values in inner for v in values if isinstance(v, dict | list)]
        if not level:
            return False
    return True


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {short_repr(twice)} is there twice in one object")
    return found


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if there is no file.

    Raises:
        CheckpointError: see `read_json`; or the file holds no object.
    """
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def read_shard_names(index: Path, suffix: str) -> dict[str, str]:
    """The file of each tensor, by the name of the tensor, from the index of a sharded checkpoint.

    Args:
        suffix: of the shards, such as ".safetensors".

    Raises:
        CheckpointError: the index is damaged, or names a file that is not a shard in its folder:
            `model_digest` covers files at the top of the folder only.
    """
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(
            f"{index}: expected a weight_map from tensors to files, got {short_repr(weight_map)}"
        )
    files = set(map(str, weight_map.values()))
    if len(files) > MAX_SHARDS:
        raise CheckpointError(f"{index}: expected at most {MAX_SHARDS} shards, got {len(files)}")
    for name in weight_map.values():
        if not isinstance(name, str) or not _is_shard(name, suffix):
            raise CheckpointError(
                f"{index}: weight_map names {short_repr(name)}, expected the name of a "
                f"{suffix} file in the same folder, such as 'model-00001-of-00002{suffix}'"
            )
    return dict(weight_map)


def _is_shard(name: str, suffix: str) -> bool:
    is_plain = len(name) <= MAX_NAME_CHARS and name.isprintable() and "\\" not in name
    return is_plain and is_model_file(name) and name.endswith(suffix)
