"""The table of cases names tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


def named():
    """File and name of every test in the table; a name without a file is of the last one."""
    for row in (TESTS / "fault" / "cases.md").read_text().splitlines():
        file = None
        for quoted in re.findall(r"`([^`]*)`", row.rpartition("|")[0].rpartition("|")[2]):
            name, _, test = quoted.partition("::")
            if name.endswith(".py"):
                file = TESTS / (name if "/" in name else f"unit/{name}")
            if name.endswith(".py") or test:
                yield row, file, test.partition("[")[0]


def test_every_test_of_the_table_is_there():
    found = list(named())
    assert len(found) > 90
    for row, file, test in found:
        assert file is not None, row
        assert file.exists(), row
        assert not test or f"def {test}(" in file.read_text(), f"{file.name}::{test}"
