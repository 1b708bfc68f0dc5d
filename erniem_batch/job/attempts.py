"""Which units a process has died on, kept where it outlives the process.

A unit being worked on has a small record in the run folder, removed when it is done. A record that
is still there says that its process died (or was killed because it hung): after two deaths the
unit is worked on row by row, and the record names the row; a third death convicts that row.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Self

from erniem_batch import storage
from erniem_batch.errors import DamagedFile
from erniem_batch.job.documents import (
    Fields,
    damaged,
    known,
    parse_document,
    require_checksum_of_newer,
    with_checksum,
)
from erniem_batch.storage import FileInfo

logger = logging.getLogger(__name__)

ATTEMPTS = "_run/attempts"
DEATHS_TOGETHER = 2  # deaths before a unit is worked on row by row
UNEXPLAINED_DEATHS = 3  # deaths row by row, but in no row, before a unit is given up
REMEDY = "it is ignored, so the deaths that it counts are forgotten"
FIELDS: Fields = {"number": int}
PROTECTED = ("number", "row", "suspect", "killers", "unexplained")


@dataclass(slots=True)
class Attempt:
    """One try at a unit.

    Attributes:
        number: of this try, from 1.
        row: which row is being worked on, counted in the order of reading; None: no single one.
        suspect: row that the last death named.
        killers: rows that two deaths named.
        unexplained: deaths row by row that no row explains.
    """

    path: str
    number: int = 1
    row: int | None = None
    suspect: int | None = None
    killers: list[int] = field(default_factory=list)
    unexplained: int = 0

    @classmethod
    def next(cls, output: str, unit_id: str) -> Self:
        """The try that comes next, from how the last one ended; on record only once it begins."""
        path = f"{output}/{ATTEMPTS}/{unit_id}.json"
        data = storage.read(path)
        if data is None:
            return cls(path)
        try:
            attempt = cls.decode(data, path)
        except DamagedFile as error:
            logger.warning("%s", error)
            return cls(path)
        attempt._learn()
        attempt.number += 1
        return attempt

    @classmethod
    def decode(cls, data: bytes, path: str) -> Self:
        """The attempt of a record.

        Raises:
            DamagedFile: It is not what a process writes.
        """
        values = parse_document(data, path, FIELDS, REMEDY, PROTECTED)
        require_checksum_of_newer(values, (*PROTECTED, "path"), path, REMEDY)
        attempt = cls(**{**known(values, [f.name for f in fields(cls)]), "path": path})
        if not (isinstance(attempt.killers, list) and attempt._has_numbers()):
            raise damaged(path, "its fields are not numbers of rows and tries", REMEDY)
        return attempt

    def _has_numbers(self) -> bool:
        rows = [row for row in (self.row, self.suspect) if row is not None]
        return all(type(n) is int for n in (self.unexplained, *rows, *self.killers))

    def _learn(self) -> None:
        """What the death of the last try says."""
        if self.row is None:
            self.unexplained += self.row_by_row
        elif self.row == self.suspect:
            self.killers.append(self.row)
            self.suspect = None
        else:
            self.suspect = self.row
        self.row = None

    def begin(self) -> None:
        """Takes note that the unit is begun."""
        self._save()

    @property
    def row_by_row(self) -> bool:
        """Whether this try has to name each row before it works on it."""
        return self.number > DEATHS_TOGETHER

    @property
    def hopeless(self) -> bool:
        """Whether the process dies before any row is reached."""
        return self.unexplained >= UNEXPLAINED_DEATHS

    def works_on(self, row: int | None) -> None:
        """Says which row comes next."""
        self.row = row
        self._save()

    def end(self) -> None:
        """The unit is done."""
        storage.delete([self.path])

    def _save(self) -> None:
        values = with_checksum(asdict(self), PROTECTED)
        storage.write(self.path, json.dumps(values).encode())


def n_repeated(output: str) -> int:
    """Units that are being worked on, and have cost a process before."""
    paths = [info.path for info in storage.find(f"{output}/{ATTEMPTS}")]
    # Not those that are just being written.
    return sum(_number_of(path) > 1 for path in paths if path.endswith(".json"))


def _number_of(path: str) -> int:
    data = storage.read(path)
    try:
        return 0 if data is None else Attempt.decode(data, path).number
    except DamagedFile as error:
        logger.warning("%s", error)
        return 0


def records(output: str) -> Iterator[FileInfo]:
    """Files of all records."""
    return storage.find(f"{output}/{ATTEMPTS}")
