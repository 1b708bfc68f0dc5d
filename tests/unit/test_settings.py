from dataclasses import fields, replace

import pytest

from erniem_batch.errors import ConfigError
from erniem_batch.job import settings as module
from erniem_batch.job.config import JobConfig
from erniem_batch.job.settings import differences, fingerprint, settings_of, versions
from erniem_batch.model.config import ErnieMConfig

MODEL = ErnieMConfig(vocab_size=100)
BASE = JobConfig(input=["in"], output="out")


def changed(**values):
    """The base with other values, options of the task among them."""
    own = {name: values.pop(name) for name in NER if name in values}
    return replace(BASE, options=replace(BASE.options, **own), **values)


NER = [field.name for field in fields(BASE.options)]

# Another value of every field that decides results, with the words it is told in.
OTHER = {
    "text_column": ("body", "--text-column was text, now body"),
    "columns": ("id,text", "--columns was None, now ['id', 'text']"),
    "limit": (5, "--limit was None, now 5"),
    "input_format": ("jsonl", "--input-format was auto, now jsonl"),
    "output_format": ("jsonl", "--output-format was parquet, now jsonl"),
    "aggregation_strategy": ("max", "--aggregation-strategy was simple, now max"),
    "min_score": (0.5, "--min-score was 0.0, now 0.5"),
    "offset_unit": ("utf16", "--offset-unit was codepoint, now utf16"),
    "fields": ({"language": "lang"}, "--language-column was None, now lang"),
    "detect_language": (True, "--detect-language was False, now True"),
    "window_tokens": (300, "--window-tokens was 512, now 300"),
    "overlap_tokens": (5, "--overlap-tokens was 128, now 5"),
    "max_batch_tokens": (2048, "--max-batch-tokens was found, now 2048"),
    "dtype": ("bfloat16", "--dtype was float32, now bfloat16"),
    "num_gpus_per_actor": (1.0, "device was cpu, now cuda"),
}
# Fields that say where and how fast, not what: a resumed run may have others.
FREE = {
    "input": ["elsewhere"],
    "output": "elsewhere",
    "model": "elsewhere",  # what counts is its content
    "unit_bytes": 7,
    "actors": "2:3",
    "num_cpus_per_actor": 3,
    "address": "auto",
    "max_dead_letters": "5%",
    "max_row_bytes": 1 << 20,  # decides which rows are dead letters, not what is found
    "unit_timeout": 5.0,
    "overwrite": True,
    "compare": "yesterday",
    "fail_on_drift": False,  # goes with compare only
    "drift_threshold": 0.2,
    "report_samples": 3,
    "log_format": "json",
}


def of(config, before=None, digest="d" * 64, model=MODEL):
    return settings_of(config, config.predictor, model, digest, before)


def test_every_field_is_one_or_the_other():
    names = {field.name for field in fields(JobConfig)} - {"options"}
    assert {*names, *NER} == {*OTHER, *FREE}


@pytest.mark.parametrize("name", OTHER)
def test_a_field_that_decides_results(name):
    value, words = OTHER[name]
    before, now = of(BASE), of(changed(**{name: value}))
    found = differences(before, now)
    assert found == [words]
    assert fingerprint(before) != fingerprint(now)


@pytest.mark.parametrize("name", FREE)
def test_a_field_that_does_not(name):
    assert fingerprint(of(replace(BASE, **{name: FREE[name]}))) == fingerprint(of(BASE))


def test_the_model_and_the_package():
    (words,) = differences(of(BASE), of(BASE, digest="e" * 64))
    assert words == "--model has other content (dddddddddddd, now eeeeeeeeeeee)"


def test_a_package_that_answers_otherwise(monkeypatch):
    before = of(BASE)
    monkeypatch.setattr(module, "RESULTS_VERSION", 7)
    assert differences(before, of(BASE)) == ["results version was 2, now 7"]


def test_versions_are_recorded_and_not_compared(monkeypatch):
    assert {"erniem-batch", "python", "torch", "ray", "pyarrow"} <= versions().keys()
    monkeypatch.setattr(module, "version", lambda name: "0.0")
    assert versions()["torch"] == "0.0"
    assert not {"torch", "ray", "versions"} & of(BASE).keys()


def test_a_setting_of_another_release_is_told():
    """Either release may know one that the other does not."""
    settings = of(BASE)
    assert differences({**settings, "old": 1}, settings) == ["--old was 1, now None"]
    assert differences(settings, {**settings, "new": 1}) == ["--new was None, now 1"]


def test_the_token_budget_is_taken_over():
    """What was found at run time decides last digits only; what was asked for once stays."""
    before = {**of(BASE), "max-batch-tokens": 777}
    assert of(BASE, before)["max-batch-tokens"] == 777
    assert differences(before, of(BASE, before)) == []
    asked = replace(BASE, max_batch_tokens=999)
    assert differences(before, of(asked, before)) == ["--max-batch-tokens was 777, now 999"]
    assert of(BASE)["max-batch-tokens"] == "found"


def _recommending(score):
    return replace(MODEL, extra={"task_specific_params": {"ner": {"min_score": score}}})


def test_the_threshold_of_the_model_counts():
    model = _recommending(0.25)
    assert differences(of(BASE), of(BASE, model=model)) == ["--min-score was 0.0, now 0.25"]
    asked = changed(min_score=0.25)
    assert fingerprint(of(asked)) == fingerprint(of(BASE, model=model))
    broken = _recommending(7)
    with pytest.raises(ConfigError, match="min_score"):
        of(BASE, model=broken)


def test_fingerprints_survive_json():
    import json

    settings = of(changed(columns="b,a", min_score=0.1))
    assert fingerprint(json.loads(json.dumps(settings))) == fingerprint(settings)
    assert fingerprint(dict(reversed(settings.items()))) == fingerprint(settings)
