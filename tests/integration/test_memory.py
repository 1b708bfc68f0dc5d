"""Memory of the real command over a shard of 5 GB and over files that stand for gigabytes."""

import pytest

from tests.benchmarks.bombs import make_model, watched_run, write_bombs, write_shard

MOST_MB = 1500


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("corpus", ["shard", "bombs"])
def test_memory_of_each_process_is_bounded(tmp_path, corpus):
    (tmp_path / "in").mkdir()
    if corpus == "shard":
        write_shard(tmp_path / "in" / "ordinary.jsonl.gz", 5.0)
    else:
        write_bombs(tmp_path / "in")
    model = make_model(tmp_path / "model")
    found = watched_run(tmp_path / "in", tmp_path / "out", model)
    assert found["n_rows"] == found["n_ok"] + found["n_dead"]
    assert found["n_ok"] > 0
    assert all(peak < MOST_MB for peak in found["peak_mb"].values()), found
