"""How units are handed to actors."""

import pytest

from erniem_batch.job.cluster import Pool
from erniem_batch.job.stream import calls_at_a_time


@pytest.mark.parametrize(
    ("cpus", "gpus", "expected"), [(1, 0, 2), (4, 0, 2), (1, 1, 2), (4, 1, 5), (2, 0.5, 3)]
)
def test_calls_at_a_time(cpus, gpus, expected):
    assert calls_at_a_time(Pool(1, 2, cpus, gpus, 5)) == expected
