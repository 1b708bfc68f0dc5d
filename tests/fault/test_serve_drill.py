"""A short drill with poison always; all drills with `-m slow`."""

import asyncio
from pathlib import Path

import pytest

from .serve_drill import Drill

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
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


def test_poison_fails_alone(tmp_path: Path) -> None:
    """Ten seconds with poison in nearly every batch: nobody else gets an error."""
    found = asyncio.run(Drill(tmp_path, seconds=10.0).poison())
    assert not found.problems, found
    assert found.figures["passes_with_poison"] > 3


@pytest.mark.slow
@pytest.mark.parametrize("name", DRILLS)
def test_the_service_holds(name: str, tmp_path: Path) -> None:
    """Each drill for as long as it takes."""
    drill = Drill(tmp_path)
    assert set(drill.drills()) == set(DRILLS)
    found = asyncio.run(drill.drills()[name]())
    assert not found.problems, found
