"""A cluster that grows for a job and shrinks after it, with Ray's autoscaler and real nodes."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from clusters import Head, growing_cluster
from fault.corpus import make_corpus, save_model
from fault.results import is_data, names_in, read_result
from fault.runs import ROOT, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

PATIENCE_S = 600.0
# Actors of one CPU; a node holds one of them.
GROUPS = {
    "small": {"resources": {"CPU": 1, "object_store_memory": 120 << 20}, "max_workers": 2},
}


class Nodes:
    """How many nodes a cluster has beside its head, as their number changes.

    Attributes:
        trace: seconds since the start, and the number from then on.
    """

    def __init__(self, head: Head) -> None:
        self._head = head
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._started = time.monotonic()
        (self._own,) = head.raylets()
        self.trace: list[tuple[float, int]] = []

    def there(self) -> list[int]:
        """Process numbers of their raylets."""
        return [pid for pid in self._head.raylets() if pid != self._own]

    @property
    def numbers(self) -> list[int]:
        return [number for _, number in self.trace]

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            number = len(self.there())
            if not self.trace or number != self.trace[-1][1]:
                self.trace.append((round(time.monotonic() - self._started, 1), number))

    @contextmanager
    def watched(self) -> Iterator["Nodes"]:
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._thread.join()


def _start(
    head: Head | None, arguments: list[str], log: Path
) -> tuple[subprocess.Popen[bytes], Path]:
    """`python pipelines/ner.py …`, on the cluster or on a Ray of its own."""
    environment = {name: v for name, v in os.environ.items() if not name.startswith("RAY_")}
    if head is not None:
        environment = head.environment
        arguments = [*arguments, "--address", head.address]
    with log.open("wb") as file:
        run = subprocess.Popen(
            [sys.executable, "pipelines/ner.py", *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    return run, log


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("corpus")
    corpus = make_corpus(folder / "in", seed=5, n_shards=80)
    arguments = ["--input", str(corpus.folder), "--model", str(save_model(folder / "model"))]
    arguments += ["--unit-bytes", "3000", "--max-dead-letters", "20%", "--max-batch-tokens", "600"]
    return [*arguments, "--num-cpus-per-actor", "1"]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """What a run on this machine alone makes."""
    folder = tmp_path_factory.mktemp("whole")
    output = str(folder / "out")
    run, log = _start(None, [*arguments, "--actors", "2", "--output", output], folder / "log")
    assert run.wait(PATIENCE_S) == 0, log.read_text()
    return read_result(output)


@pytest.mark.parametrize(
    ("v2", "as_ray_up", "may_grow_to"),
    [(True, False, "unknown"), (False, True, "2")],
    ids=["v2, as on Kubernetes", "v1, as after ray up"],
)
def test_from_zero_and_back(arguments, whole, tmp_path, v2, as_ray_up, may_grow_to):
    """Nodes come for the job, one is killed in the middle, all go after it; no row is missing.

    A job whose actors fit on no node is refused: at once if somebody tells what may come, else as
    soon as the autoscaler has said so.
    """
    output = tmp_path / "out"
    with growing_cluster(GROUPS, v2, as_ray_up) as head, Nodes(head).watched() as nodes:
        too_large = [*arguments[:-1], "64", "--output", str(tmp_path / "none")]
        run, log = _start(head, too_large, tmp_path / "refused.log")
        assert run.wait(PATIENCE_S) == 2, log.read_text()
        refusal = log.read_text()
        assert nodes.numbers == [0]

        run, log = _start(
            head, [*arguments, "--actors", "1:2", "--output", str(output)], tmp_path / "log"
        )
        try:
            # Two nodes, both with work, and some of it done.
            wait_until(lambda: _at_work(head) == 2 or run.poll() is not None, PATIENCE_S)
            assert run.poll() is None, "it was over before the second node came"
            n_done = _n_done(output)
            assert n_done
            os.kill(nodes.there()[0], signal.SIGKILL)
            assert run.wait(PATIENCE_S) == 0, log.read_text()
        finally:
            run.kill()
            run.wait()
        assert wait_until(lambda: nodes.numbers[-1] == 0, 120)
    text = log.read_text()
    print(f"autoscaler {'v2' if v2 else 'v1'}, nodes from second to second: {nodes.trace}")
    print(*(line for line in (refusal + text).splitlines() if "cluster" in line), sep="\n")
    assert nodes.numbers[0] == nodes.numbers[-1] == 0
    assert nodes.numbers.index(2) < nodes.numbers.index(1, nodes.numbers.index(2))  # one is killed
    assert max(nodes.numbers) == 2
    report = json.loads(text.splitlines()[-1])
    assert n_done < report["n_units"] == report["n_units_now"]
    result = read_result(str(output))
    assert result.digests == whole.digests
    assert result.letters == whole.letters
    assert (output / "_SUCCESS").exists()
    found = f"cluster nodes=1 cpus=0 gpus=0; .* room_for=0 may_grow_to={may_grow_to} used=1:2$"
    assert re.search(found, text, re.MULTILINE)
    assert re.search(r"waiting for nodes seconds=\d+ nodes=1 starting=", text)
    assert "first actor has a place" in text
    assert ("64 CPUs and 0 GPUs do not fit" if as_ray_up else "it can start none for it") in refusal


def _at_work(head: Head) -> int:
    return len(head.processes("ray::MapWorker"))


def _n_done(output: Path) -> int:
    return sum(map(is_data, names_in(str(output))))
