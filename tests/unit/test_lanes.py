"""Threads of forward passes: how many of torch each gets."""

import threading

import pytest
import torch

from erniem_batch.lanes import Lanes, lanes_of


@pytest.fixture
def threads_stay():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("n_threads", "n_lanes", "expected"),
    [(1, 4, {1: 1}), (2, 4, {1: 1, 2: 2}), (8, 4, {1: 2, 3: 6, 4: 8}), (3, 2, {1: 1, 2: 3})],
)
def test_width_decides(threads_stay, n_threads, n_lanes, expected):
    lanes = Lanes(n_threads, n_lanes)
    got = {width: lanes.submit(width, torch.get_num_threads).result() for width in expected}
    lanes.close()
    assert got == expected


def test_lanes_run_side_by_side():
    lanes = Lanes(2, 2)
    both = threading.Barrier(2, timeout=10)
    passes = [lanes.submit(1, both.wait) for _ in range(2)]
    assert sorted(each.result() for each in passes) == [0, 1]
    lanes.close()


def test_one_lane_where_torch_decides():
    assert Lanes(None, 4).n_lanes == 1


def test_as_many_lanes_as_are_worth_it():
    assert lanes_of(2, "cpu").n_lanes == 2
    assert lanes_of(16, "cpu").n_lanes == 4
    assert lanes_of(None, "cpu").n_lanes == min(4, torch.get_num_threads())
    assert lanes_of(8, "cuda").n_lanes == 1
