"""Which units a process has died on, kept where it outlives the process.

A unit being worked on has a small record in the run folder, removed when it is done. A record that
is still there says that its process died (or was killed because it hung): after two deaths the
unit is worked on row by row, and the record names the row; a third death convicts that row.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Self

from erniem_batch import storage
from erniem_batch.storage import FileInfo

ATTEMPTS = "_run/attempts"
DEATHS_TOGETHER = 2  # deaths before a unit is worked on row by row
UNEXPLAINED_DEATHS = 3  # deaths row by row, but in no row, before a unit is given up


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
        before = storage.read(path)
        attempt = cls(path) if before is None else cls(**json.loads(before))
        if before is not None:
            attempt._learn()
            attempt.number += 1
        return attempt

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
        storage.write(self.path, json.dumps(asdict(self)).encode())


def n_repeated(output: str) -> int:
    """Units that are being worked on, and have cost a process before."""
    paths = [info.path for info in storage.find(f"{output}/{ATTEMPTS}")]
    # Not those that are just being written.
    records = [storage.read(path) for path in paths if path.endswith(".json")]
    return sum(1 for data in records if data is not None and json.loads(data)["number"] > 1)


def records(output: str) -> Iterator[FileInfo]:
    """Files of all records."""
    return storage.find(f"{output}/{ATTEMPTS}")
