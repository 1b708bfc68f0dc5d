import json

import pytest

from erniem_batch import storage
from erniem_batch.job.attempts import (
    ATTEMPTS,
    DEATHS_TOGETHER,
    UNEXPLAINED_DEATHS,
    Attempt,
    records,
)


@pytest.fixture
def begin(tmp_path):
    """Begins a unit; if it was begun before and never ended, its process has died since."""

    def call(unit_id="u1"):
        attempt = Attempt.next(str(tmp_path), unit_id)
        attempt.begin()
        return attempt

    return call


def _records(tmp_path):
    return sorted(path.name for path in (tmp_path / ATTEMPTS).glob("*.json"))


def test_a_unit_that_succeeds_leaves_nothing(tmp_path, begin):
    attempt = begin()
    assert (attempt.number, attempt.row_by_row, attempt.hopeless) == (1, False, False)
    assert _records(tmp_path) == ["u1.json"]
    attempt.end()
    assert _records(tmp_path) == []
    assert begin().number == 1


def test_looking_is_not_beginning(tmp_path):
    """A unit that waits for its turn has no part in the death of another."""
    Attempt.next(str(tmp_path), "u1")
    Attempt.next(str(tmp_path), "u1")
    assert _records(tmp_path) == []
    assert Attempt.next(str(tmp_path), "u1").number == 1


def test_a_row_that_two_deaths_name_is_convicted(begin):
    for number in range(1, DEATHS_TOGETHER + 1):
        attempt = begin()
        assert (attempt.number, attempt.row_by_row) == (number, False)
    for death in range(2):
        attempt = begin()
        assert (attempt.row_by_row, attempt.killers) == (True, [])
        for row in range(5):
            attempt.works_on(row)
        assert attempt.number == DEATHS_TOGETHER + 1 + death
    attempt = begin()
    assert (attempt.killers, attempt.row, attempt.suspect) == ([4], None, None)
    attempt.works_on(7)
    begin().works_on(7)
    assert begin().killers == [4, 7]


def test_a_machine_that_goes_away_convicts_nobody(begin):
    for _ in range(DEATHS_TOGETHER):
        begin()
    for row in range(20):
        attempt = begin()
        assert attempt.killers == []
        attempt.works_on(row)


def test_a_row_that_was_finished_is_not_convicted(begin):
    for _ in range(DEATHS_TOGETHER):
        begin()
    attempt = begin()
    attempt.works_on(3)
    attempt.works_on(None)
    attempt = begin()
    assert (attempt.killers, attempt.unexplained) == ([], 1)


def test_deaths_that_no_row_explains_are_hopeless_in_the_end(begin):
    deaths = 0
    while not begin().hopeless:
        deaths += 1
        assert deaths < 20
    assert deaths == DEATHS_TOGETHER + UNEXPLAINED_DEATHS


def test_units_are_apart(tmp_path, begin):
    for _ in range(4):
        begin("u1")
    assert begin("u2").number == 1
    assert _records(tmp_path) == ["u1.json", "u2.json"]
    assert sorted(info.path.rpartition("/")[2] for info in records(str(tmp_path))) == [
        "u1.json", "u2.json",
    ]  # fmt: skip
    storage.remove(records(str(tmp_path)))
    assert _records(tmp_path) == []


def test_a_record_holds_numbers_only(tmp_path, begin):
    begin().works_on(7)
    values = json.loads((tmp_path / ATTEMPTS / "u1.json").read_bytes())
    del values["path"], values["checksum"]
    assert values == {"number": 1, "row": 7, "suspect": None, "killers": [], "unexplained": 0}
