"""The drills of the service (slow)."""

import asyncio
from pathlib import Path

import pytest

from .serve_drill import Drill

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]
DRILLS = (
    "poison",
    "kill",
    "overflow",
    "overflow behind",
    "kill behind",
    "change",
    "SIGTERM",
    "SIGTERM idle",
    "SIGTERM behind",
    "device lost",
    "hanging pass",
)


@pytest.mark.parametrize("name", DRILLS)
def test_the_service_holds(name: str, tmp_path: Path) -> None:
    """Each drill for as long as it takes."""
    drill = Drill(tmp_path)
    assert set(drill.drills()) == set(DRILLS)
    found = asyncio.run(drill.drills()[name]())
    assert not found.problems, found
