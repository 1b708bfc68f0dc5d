import json

import pytest
import yaml

from erniem_batch.errors import ConfigError
from erniem_batch.thresholds import Thresholds, read_thresholds

TUNED = {"*": 0.5, "PER": 0.7, "de": {"PER": 0.6}, "sw": {"*": 0.9, "LOC": 0.1}}


@pytest.mark.parametrize(
    ("label", "language", "expected"),
    [
        ("PER", None, 0.7),
        ("LOC", None, 0.5),
        ("PER", "de", 0.6),
        ("LOC", "de", 0.5),
        ("PER", "sw", 0.9),
        ("LOC", "sw", 0.1),
        ("PER", "xx", 0.7),
        ("LOC", "", 0.5),
    ],
)
def test_the_nearest_number_counts(label, language, expected):
    """Label of the language, "*" of the language, label, "*"."""
    assert Thresholds(TUNED)(label, language) == expected


@pytest.mark.parametrize(
    ("value", "default", "expected"),
    [(None, 0.0, 0.0), (None, -1.0, -1.0), (0.25, -1.0, 0.25), (1, 0.0, 1.0), ({}, 0.3, 0.3)],
)
def test_one_number_for_all(value, default, expected):
    assert Thresholds(value, default)("PER", "de") == expected


def test_default_is_for_labels_that_nothing_names():
    thresholds = Thresholds({"PER": 0.7, "de": {"LOC": 0.2}}, default=0.4)
    assert thresholds("LOC") == thresholds("ORG", "de") == 0.4
    assert (thresholds("LOC", "de"), thresholds("PER", "de")) == (0.2, 0.7)


def test_whether_the_language_matters():
    assert Thresholds(TUNED).by_language
    assert not Thresholds({"PER": 0.5}).by_language
    assert not Thresholds(0.5).by_language


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.5, "min_score must be from 0 to 1, got 1.5$"),
        (-0.1, "got -0.1$"),
        (float("nan"), "got nan$"),
        (True, "got True$"),
        ({"PER": 2}, "got 2 for 'PER'$"),
        ({"PER": "high"}, "got 'high' for 'PER'$"),
        ({"PER": None}, "got None for 'PER'$"),
        ({"PER": [0.5]}, r"got \[0.5\] for 'PER'$"),
        ({"de": {"PER": 2}}, "got 2 for 'de.PER'$"),
        ({"de": {"PER": {"x": 0.5}}}, "got {'x': 0.5} for 'de.PER'$"),
    ],
)
def test_impossible_values_are_named_with_their_place(value, message):
    with pytest.raises(ConfigError, match=message):
        Thresholds(value)


@pytest.mark.parametrize("name", ["t.json", "t.yaml", "t.yml", "thresholds"])
def test_a_file(tmp_path, name):
    """JSON or YAML; the same numbers however they are written."""
    path = tmp_path / name
    text = json.dumps(TUNED) if name == "t.json" else yaml.safe_dump(TUNED)
    path.write_text(text, encoding="utf-8")
    assert read_thresholds(str(path)) == TUNED


def test_json_written_for_people(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(TUNED, indent=4), encoding="utf-8")
    assert read_thresholds(str(path)) == TUNED


def test_names_of_a_file_stay_strings(tmp_path):
    """Once, Norwegian ("no") became false, and with it the run ended in a traceback."""
    path = tmp_path / "t.yaml"
    path.write_text("no: {on: 0.6}\nde: {1: 0.7, 北京: 0.8}\nnull: 0.5\n", encoding="utf-8")
    content = read_thresholds(str(path))
    assert content == {"no": {"on": 0.6}, "de": {"1": 0.7, "北京": 0.8}, "null": 0.5}
    assert Thresholds(content)("on", "no") == 0.6
    assert json.loads(json.dumps(content, sort_keys=True)) == content


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON or YAML"),
        ("- 0.5", "expected a mapping from labels to numbers"),
        ("0.5", "expected a mapping from labels to numbers"),
        ("", "expected a mapping from labels to numbers"),
        ("PER: 2", r"got 2.0 for 'PER'"),
        ("PER: yes", "got 'yes' for 'PER'"),
        ("PER: .nan", "for 'PER'"),
        ("de: {PER: -1}", "for 'de.PER'"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, message):
    path = tmp_path / "t.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        read_thresholds(str(path))
    assert str(caught.value).startswith(f"--min-score {path}: ")


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid JSON or YAML"):
        read_thresholds(str(path))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"--min-score: there is no file .*absent.json"):
        read_thresholds(str(tmp_path / "absent.json"))
