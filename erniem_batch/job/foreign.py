"""Files beside the data: what is left out of an input, and tables that are more than files."""

import logging
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from erniem_batch import storage
from erniem_batch.errors import ConfigError, StorageError
from erniem_batch.storage import FileInfo

logger = logging.getLogger(__name__)

# JSON that describes data, as Hugging Face's datasets leave it beside them.
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# A folder of this name makes the folder above it a table of this format.
TABLE_FOLDERS = {"_delta_log": "Delta Lake", ".hoodie": "Hudi"}
ICEBERG_METADATA = ".metadata.json"
# Folders that are looked at, from that of the files up; each takes three requests if it is remote.
LEVELS_ABOVE = 4
LEVELS_ABOVE_REMOTE = 2
MOST_LOOKED_AT = 1000  # files of such a folder


@dataclass
class LeftOut:
    """Files of an input that are not read, for the log.

    Attributes:
        descriptions: paths of JSON files that describe data.
        n_others: files with other endings.
        example: one of these.
    """

    descriptions: list[str] = field(default_factory=list)
    n_others: int = 0
    example: str = ""

    def add(self, path: str) -> None:
        """A file with another ending."""
        self.n_others += 1
        self.example = self.example or path

    def log(self, known: str) -> None:
        """Says what was left out, if anything was.

        Args:
            known: endings that are read.
        """
        for path in self.descriptions:
            logger.warning("left out, it describes data: %s", path)
        if self.n_others:
            logger.warning(
                "left out files=%d such as %s: only %s are read", self.n_others, self.example, known
            )


def is_description(path: str) -> bool:
    """Whether a file is JSON about data, by its name."""
    return posixpath.basename(path).lower() in DESCRIPTIONS


def require_plain_files(root: str, parts: list[str]) -> None:
    """Raises a ConfigError if a file is part of a table of another format.

    Args:
        root: folder that is listed.
        parts: of the path of a file below it.
    """
    for i, part in enumerate(parts[:-1]):
        if part in TABLE_FOLDERS:
            raise _refused("/".join([root, *parts[:i]]), TABLE_FOLDERS[part])
        if part == "metadata" and i == len(parts) - 2 and parts[-1].endswith(ICEBERG_METADATA):
            raise _refused("/".join([root, *parts[:i]]), "Iceberg")
        if part.startswith(("_", ".")):
            return


def require_no_table_above(folder: str) -> None:
    """Raises a ConfigError if a folder is one of a table of another format, or inside of one."""
    for _ in range(LEVELS_ABOVE_REMOTE if storage.is_remote(folder) else LEVELS_ABOVE):
        if not folder or folder.endswith((":", "/")):
            return
        for name, format_ in (*TABLE_FOLDERS.items(), ("metadata", "Iceberg")):
            for info in _first_of(storage.join(folder, name)):
                if name != "metadata" or info.path.endswith(ICEBERG_METADATA):
                    raise _refused(folder, format_)
        folder = folder.rpartition("/")[0]


def _first_of(folder: str) -> Iterator[FileInfo]:
    """Files of a folder, if there is one that may be listed."""
    try:
        yield from islice(storage.find(folder), MOST_LOOKED_AT)
    except (StorageError, OSError):
        return


def _refused(folder: str, format_: str) -> ConfigError:
    return ConfigError(
        f"--input {folder} is a table of {format_}: read as plain Parquet, it gives rows that were "
        f"deleted or replaced. Export the rows of its current version to a folder of Parquet files"
    )
