import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest
from fakes import Alone

from erniem_batch import storage
from erniem_batch.errors import ConfigError, JobError, StorageError
from erniem_batch.job import lease as module
from erniem_batch.job.lease import ENDED, STOPPED, Holder, Lease
from erniem_batch.job.manifest import Manifest, publish


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    monkeypatch.setattr(module, "STALE_S", 0.5)


@pytest.fixture
def hold(tmp_path):
    """Leases of this process, all given back in the end."""
    made = []

    def call():
        made.append(Lease(str(tmp_path)).acquire())
        return made[-1]

    yield call
    for lease in made:
        lease.release("test over")


def _holder(tmp_path):
    return Holder(**json.loads((tmp_path / "_run" / "lease.json").read_bytes()))


def _asleep(lease):
    """The owner's process stands still: it does not renew, and does not know."""
    lease._stop.set()
    lease._thread.join()


def _plant(tmp_path, **changes):
    values = Holder("other", "another machine", "host7", 4321)
    storage.write(f"{tmp_path}/_run/lease.json", replace(values, **changes).encode())


def test_the_lease_is_renewed_and_given_back(tmp_path, hold):
    lease = hold()
    assert lease.last_ended == ENDED
    time.sleep(0.3)
    holder = _holder(tmp_path)
    assert (holder.owner, holder.pid, holder.released) == (lease.holder.owner, os.getpid(), "")
    assert holder.beat >= 2
    lease.check()
    lease.release(ENDED)
    assert _holder(tmp_path).released == ENDED


@pytest.mark.parametrize("how", [ENDED, STOPPED, "failed"])
def test_a_released_lease_is_free_at_once(hold, how):
    hold().release(how)
    started = time.monotonic()
    assert hold().last_ended == how
    assert time.monotonic() - started < 0.4


def test_a_busy_lease_is_refused(tmp_path, hold):
    first = hold()
    with pytest.raises(ConfigError, match=rf"another run is writing there .*process {os.getpid()}"):
        hold()
    first.check()
    assert _holder(tmp_path).owner == first.holder.owner


def test_of_two_at_once_one_gets_it(tmp_path):
    got, refused = [], []

    def take():
        try:
            got.append(Lease(str(tmp_path)).acquire())
        except ConfigError:
            refused.append(1)

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 5)
    got[0].check()
    got[0].release(ENDED)


def test_a_dead_process_is_known_at_once(tmp_path, hold, monkeypatch):
    monkeypatch.setattr(module, "STALE_S", 60.0)
    code = "import os; print(os.getpid())"
    dead = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    _plant(tmp_path, machine=module._machine(), pid=int(dead.stdout))
    started = time.monotonic()
    assert hold().last_ended == ""
    assert time.monotonic() - started < 5


def test_an_owner_elsewhere_is_given_time(tmp_path, hold):
    """Whether a process of another machine lives, only time tells."""
    _plant(tmp_path, pid=1)
    started = time.monotonic()
    assert hold().last_ended == ""
    assert time.monotonic() - started >= 0.5


def test_a_lease_that_is_released_while_we_wait(tmp_path, hold):
    _plant(tmp_path)
    timer = threading.Timer(0.2, _plant, [tmp_path], {"released": STOPPED})
    timer.start()
    assert hold().last_ended == STOPPED
    timer.join()


def test_the_old_owner_is_told_of_a_takeover(hold):
    old = hold()
    _asleep(old)
    new = hold()
    with pytest.raises(JobError, match="another run has taken over"):
        old.check()
    new.check()


def test_the_old_owner_is_told_by_its_own_renewal(hold, monkeypatch):
    old = hold()
    monkeypatch.setattr(module, "is_dead", lambda holder: True)
    new = hold()
    time.sleep(0.3)
    assert old._lost.is_set()
    with pytest.raises(JobError, match="another run has taken over"):
        old.check()
    old.release(ENDED)
    new.check()


def test_an_owner_that_wakes_up_in_time_goes_on(hold):
    lease = hold()
    _asleep(lease)
    time.sleep(0.3)
    lease.check()


def test_storage_that_stops_for_a_while(tmp_path, hold, monkeypatch):
    """Renewing is tried again; whoever wants to be sure meanwhile gets the error."""
    lease = hold()

    def broken(*_):
        raise StorageError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "swap", broken)
        time.sleep(0.3)
        with pytest.raises(StorageError, match="no answer"):
            lease.check()
    time.sleep(0.2)
    lease.check()


def test_a_lease_that_is_deleted_is_lost(tmp_path, hold):
    lease = hold()
    (tmp_path / "_run" / "lease.json").unlink()
    time.sleep(0.3)
    with pytest.raises(JobError):
        lease.check()


def test_a_run_that_lost_its_lease_leaves_it_alone(tmp_path, hold):
    old = hold()
    _asleep(old)
    new = hold()
    old.release(ENDED)  # it does not know yet
    assert _holder(tmp_path).owner == new.holder.owner
    assert _holder(tmp_path).released == ""


# ---- fencing ----------------------------------------------------------------------------------


def test_each_owner_has_a_higher_generation(tmp_path, hold):
    generations = []
    for _ in range(3):
        lease = hold()
        generations.append(lease.fence.generation)
        lease.release(ENDED)
    assert generations == [1, 2, 3]
    (tmp_path / "_run" / "lease.json").unlink()
    publish(str(tmp_path), Manifest(1, "f", [], []), Alone(generation=7))
    assert hold().fence.generation == 8


def test_it_is_known_from_whom_the_lease_was_taken(tmp_path, hold):
    """Who had not released it may wake up, as long as the folder is in use."""
    first = hold()
    first.release(ENDED)
    second = hold()
    assert second.taken_over == 0
    _asleep(second)
    third = hold()
    assert third.taken_over == third.fence.generation == 3
    third.release(ENDED)
    assert hold().taken_over == 3


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff", b'{"owner": 7}', b'{"owner": "x", "beat": "many"}'],
)
def test_a_damaged_lease_is_waited_for_and_written_anew(tmp_path, hold, content):
    """Its owner may be alive: then it is renewed."""
    storage.write(f"{tmp_path}/_run/lease.json", content)
    publish(str(tmp_path), Manifest(1, "f", [], []), Alone(generation=4))
    started = time.monotonic()
    lease = hold()
    assert time.monotonic() - started >= 0.5
    assert (lease.fence.generation, lease.taken_over, lease.last_ended) == (5, 5, "")
    assert Lease.look(str(tmp_path))[0].owner == lease.holder.owner


def test_a_lease_of_a_newer_release(tmp_path, hold):
    values = {**asdict(Holder("other", "m", "h", 1, released=ENDED, generation=6)), "colour": 1}
    storage.write(f"{tmp_path}/_run/lease.json", json.dumps(values).encode())
    assert hold().fence.generation == 7


def test_ownership_is_proven_by_storage(tmp_path, hold):
    lease = hold()
    lease.prove()
    _asleep(lease)
    hold()
    with pytest.raises(JobError, match="another run has taken over"):
        lease.prove()
    for effect in (
        lambda: lease.write(f"{tmp_path}/_run/report.json", b"late"),
        lambda: lease.replace_file(f"{tmp_path}/model", b"late"),
        lambda: lease.remove(f"{tmp_path}/_SUCCESS"),
    ):
        (tmp_path / "_SUCCESS").write_bytes(b"of the later run")
        with pytest.raises(JobError, match="another run has taken over"):
            effect()
    assert (tmp_path / "_SUCCESS").read_bytes() == b"of the later run"
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "_run" / "report.json").exists()


@pytest.mark.parametrize("there", [None, b"before"])
@pytest.mark.parametrize("write", ["write", "replace_file"])
def test_a_write_that_comes_after_a_takeover(tmp_path, hold, monkeypatch, write, there):
    """The owner sleeps after it has proven that it is the owner."""
    path = tmp_path / "file"
    if there is not None:
        path.write_bytes(there)
    lease = hold()
    prove = lease.prove

    def slept():
        prove()
        _asleep(lease)
        getattr(hold(), write)(str(path), b"of the later run")

    monkeypatch.setattr(lease, "prove", slept)
    with pytest.raises((JobError, ConfigError)):  # it sleeps once more, and the lease is not free
        getattr(lease, write)(str(path), b"late")
    assert path.read_bytes() == b"of the later run"


def test_a_renewal_whose_answer_was_lost(tmp_path, hold, monkeypatch):
    """It has arrived, so that the version we know is not the one that stands there."""
    lease = hold()
    swap = storage.swap

    def cut(*arguments):
        swap(*arguments)
        raise StorageError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "swap", cut)
        with pytest.raises(StorageError):
            lease.prove()
    lease.prove()
    lease.check()


@pytest.mark.parametrize("write", ["write", "replace_file"])
def test_a_file_that_never_keeps_still(tmp_path, hold, monkeypatch, write):
    """A storage without versions would have us try for ever."""
    lease = hold()
    path = str(tmp_path / "file")
    storage.write(path, b"0")
    prove = lease.prove

    def changed():
        prove()
        storage.write(path, time.monotonic_ns().to_bytes(8))

    monkeypatch.setattr(lease, "prove", changed)
    with pytest.raises(StorageError, match="it changed 5 times while it was written"):
        getattr(lease, write)(path, b"ours")


def test_who_has_released_the_lease_writes_nothing_more(tmp_path, hold):
    """The next run may be at work, and takes us for one that has ended."""
    lease = hold()
    lease.release(STOPPED)
    for effect in (lease.check, lease.prove, lambda: lease.write(f"{tmp_path}/file", b"late")):
        with pytest.raises(JobError, match="this run is being stopped and writes nothing more"):
            effect()
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 5000, b"null", b"[]", b'{"owner": 7}'])
def test_a_damaged_lease_is_waited_for_and_taken_over(tmp_path, hold, content):
    hold().release(ENDED)
    (tmp_path / "_run" / "lease.json").write_bytes(content)
    lease = hold()
    lease.check()
    assert _holder(tmp_path).owner == lease.holder.owner
