"""What the job tells Prometheus: names, labels, and numbers that only grow."""

import sys
import threading
from collections import Counter as Sums

import pytest
from fakes import KILLER, RefusingTagger, ner_config, tag_files, write_jsonl
from manifests.figures import BATCH_METRICS

from erniem_batch.job.config import JobConfig
from erniem_batch.job.metrics import ActorMetrics, DriverMetrics

metrics = pytest.importorskip("ray.util.metrics")


@pytest.fixture
def told(monkeypatch):
    """What is told of each metric, by its labels; as Ray would hand it on."""
    found, kinds = Sums(), {}

    def note(kind):
        def made(name, description="", boundaries=None, tag_keys=()):
            assert description.endswith(".")
            kinds[name] = (kind, tuple(tag_keys))

            class Metric:
                info = {"name": name}  # noqa: RUF012

                def add(self, value=1.0, tags=None):
                    assert set(tags) == set(tag_keys)
                    assert value > 0 or kind != "counter"
                    key = (name, *(tags[key] for key in tag_keys))
                    found[key] = value if kind == "gauge" else found[key] + value

                inc = set = add

                def observe(self, value, tags):
                    self.add(1, tags)

            return Metric()

        return made

    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics, kind, note(kind.lower()))
    found.kinds = kinds
    return found


def test_names_are_those_of_the_dashboard(told):
    ActorMetrics("ner")
    DriverMetrics("ner", "out")
    assert told.kinds == BATCH_METRICS


def test_an_actor_tells_what_its_receipts_say(tmp_path, told, ner_model_dir):
    for i in range(3):
        rows = [{"text": f"Ada {i} {j}"} for j in range(9)] + [{"text": None}, {"text": KILLER}]
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", rows)
    config = ner_config(
        JobConfig, input=[str(tmp_path / "in")], output=str(tmp_path / "out"),
        model=str(ner_model_dir),
    )  # fmt: skip
    receipts, tagger = tag_files(config, RefusingTagger)

    def total(name):
        return sum(receipt[name] for receipt in receipts)

    assert told["erniem_batch_rows", "ner", "ok"] == total("n_ok") == 27
    assert told["erniem_batch_rows", "ner", "dead"] == total("n_dead") == 6
    for name in ("tokens", "windows", "found"):
        assert told[f"erniem_batch_{name}", "ner"] == total(f"n_{name}") > 0
    assert told["erniem_batch_read_bytes", "ner"] == total("n_bytes")
    assert told["erniem_batch_dead_letters", "ner", "encode", "RecordError"] == 3
    assert told["erniem_batch_dead_letters", "ner", "forward", "RuntimeError"] == 3
    assert told["erniem_batch_unit_seconds", "ner"] == 3
    assert ("erniem_batch_padding_tokens", "ner") not in told
    for stage in ("read", "tokenize", "forward", "decode", "write"):
        assert told["erniem_batch_stage_seconds", "ner", stage] > 0
    assert tagger._metrics._told.keys() == {key for key in tagger._metrics._told if key[1] == ""}, (
        "nothing is remembered of units that are done"
    )


def test_a_driver_tells_how_far_it_is(told):
    driver = DriverMetrics("qa", "s3://b/out")
    driver.report(2, 1, 10, 4, 0.25, 90.0)
    driver.report(3, 1, 10, 5, 0.5, 60.0)
    driver.report(3, 1, 10, 5, 0.5, None)  # not known: what was said last stands
    assert {key[1:3] for key in told} == {("qa", "s3://b/out")}
    found = {(key[0], *key[3:]): value for key, value in told.items()}
    assert found == {
        ("erniem_batch_units", "done"): 3,
        ("erniem_batch_units", "failed"): 1,
        ("erniem_batch_units", "todo"): 6,
        ("erniem_batch_actors",): 5,
        ("erniem_batch_done_share",): 0.5,
        ("erniem_batch_eta_seconds",): 60.0,
    }


def test_units_side_by_side_count_once(told):
    """An actor works on several units: once, one that ended took another's counts along."""
    metrics = ActorMetrics("ner")
    figures = {"padded_tokens": 0, "real_tokens": 0, "read_seconds": 0.0}
    adding, errors = threading.Lock(), []

    def work(name):
        try:
            for unit in range(60):
                for n in range(1, 6):
                    with adding:
                        figures["read_seconds"] += 1
                        now = dict(figures)
                    counts = dict.fromkeys(("n_ok", "n_tokens", "n_windows", "n_found"), n)
                    reasons = {("encode", f"Error{i}"): n for i in range(40)}
                    metrics.report({**counts, "n_dead": 0}, reasons, now, f"{name} {unit}")
                metrics.unit_done(f"{name} {unit}", 1.0, 1)
        except Exception as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []
    assert told["erniem_batch_rows", "ner", "ok"] == 3 * 60 * 5
    assert told["erniem_batch_stage_seconds", "ner", "read"] == figures["read_seconds"]
