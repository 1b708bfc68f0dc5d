import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from erniem_batch import storage
from erniem_batch.errors import ConfigError, JobError, StorageError
from erniem_batch.job import lease as module
from erniem_batch.job.lease import ENDED, STOPPED, Holder, Lease


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
