import json
from dataclasses import FrozenInstanceError, asdict, fields

import pytest

from erniem_batch.errors import ConfigError
from erniem_batch.options import (
    OPTIONS,
    TASKS,
    ChooseOptions,
    ClassifyOptions,
    EmbedOptions,
    ExtractOptions,
    NerOptions,
    demo_data,
    demo_model,
    option_names,
    options_of,
)

# What each task cannot do without.
NEEDED = {"extract": {"schema": "Person"}}
WITH_MIN_SCORE = [task for task in TASKS if "min_score" in option_names(task)]


def test_tasks():
    assert TASKS == ("ner", "classify", "choose", "qa", "embed", "extract")
    assert WITH_MIN_SCORE == ["ner", "classify", "choose", "qa", "extract"]


@pytest.mark.parametrize("task", TASKS)
def test_defaults_of_every_task(task):
    """They are possible, ready to travel, frozen, and come back from JSON, as a replay needs."""
    options = options_of(task, NEEDED.get(task, {}))
    assert options.task == task
    assert type(options) is OPTIONS[task]
    assert options.resolved() == options_of(task, NEEDED.get(task, {}))
    assert set(options.output_columns) <= set(options.added_columns)
    kept = json.loads(json.dumps(asdict(options.resolved())))
    again = options_of(task, kept)
    assert json.loads(json.dumps(asdict(again.resolved()))) == kept
    with pytest.raises(FrozenInstanceError):
        setattr(options, fields(options)[0].name, None)


@pytest.mark.parametrize("task", TASKS)
def test_every_option_has_its_help(task):
    """The command line takes it from the docstring."""
    text = OPTIONS[task].__doc__ or ""
    for name in option_names(task):
        assert f"\n        {name}: " in text


@pytest.mark.parametrize(
    ("task", "values", "message"),
    [
        ("sing", {}, "task must be one of ner, classify, .* got 'sing'"),
        ("ner", {"top_k": 3}, "ner has no option 'top_k'; there are aggregation_strategy,"),
        ("ner", {"aggregation_strategy": "best"}, "must be one of none, simple, .* got 'best'"),
        ("ner", {"offset_unit": "char"}, "offset_unit must be one of codepoint, utf16, byte"),
        ("qa", {"offset_unit": ""}, "offset_unit must be one of codepoint, utf16, byte, got ''"),
        ("classify", {"function_to_apply": "exp"}, "must be one of softmax, sigmoid, none"),
        ("classify", {"pooling": "cls"}, "pooling must be one of mean, max, first, got 'cls'"),
        ("classify", {"top_k": 0}, "top_k must be at least 1, got 0"),
        ("classify", {"multi_label": True}, "multi_label goes with candidate_labels"),
        ("classify", {"candidate_labels": " , "}, "candidate_labels must name at least one"),
        ("classify", {"candidate_labels": ()}, "candidate_labels must name at least one"),
        ("classify", {"hypothesis_template": "It is."}, "must have a place {} for the label"),
        (
            "classify",
            {"hypothesis_template": "{:>200000000}"},
            "must have a place {} for the label",
        ),
        ("classify", {"hypothesis_template": "{} {0.__class__}"}, "and no other braces"),
        ("classify", {"hypothesis_template": "{} {}"}, "exactly one"),
        ("classify", {"hypothesis_template": "{{}}"}, "and no other braces"),
        (
            "choose",
            {"question_template": ("why={premise}{premise}",)},
            "{premise} in TEMPLATE, exac",
        ),
        ("choose", {"question_template": ("why={premise}{question}{question}",)}, "at most once"),
        ("choose", {"pooling": "min"}, "pooling must be one of mean, max, first"),
        ("choose", {"question_template": ("why",)}, "must be VALUE=TEMPLATE, with {premise}"),
        ("choose", {"question_template": ("why=so",)}, "must be VALUE=TEMPLATE, with {premise}"),
        ("qa", {"top_k": 0}, "top_k must be at least 1, got 0"),
        ("qa", {"max_answer_tokens": 0}, "max_answer_tokens must be at least 1, got 0"),
        ("embed", {"pooling": "sum"}, "pooling must be one of mean, cls, max, pooler, none"),
        ("embed", {"dimensions": 0}, "dimensions must be at least 1, got 0"),
        ("embed", {"output_dtype": "int4"}, "must be one of float32, float16, int8"),
        ("embed", {"output_dtype": "int8", "normalize": False}, "int8 needs normalize"),
        ("extract", {"schema_lang": "de"}, "schema_lang must be one of zh, ch, en, got 'de'"),
        ("extract", {"span_pairing": "any"}, "must be one of nearest, nested, all, got 'any'"),
        ("extract", {"position_prob": 1.0}, "position_prob must be from 0 to 1, got 1.0"),
        ("extract", {"position_prob": -0.1}, "position_prob must be from 0 to 1, got -0.1"),
        (
            "extract",
            {"taskflow_compat": True, "span_pairing": "all"},
            "taskflow_compat knows span_pairing=nearest only",
        ),
        (
            "extract",
            {"taskflow_compat": True, "offset_unit": "byte"},
            "taskflow_compat knows offset_unit=codepoint only",
        ),
        ("extract", {"taskflow_compat": True, "min_score": 0.5}, "knows no min_score"),
        *(
            (task, {"min_score": value}, f"min_score must be from 0 to 1, got {told}")
            for task in WITH_MIN_SCORE
            for value, told in ((1.5, "1.5"), (True, "True"), ({"de": {"x": -1}}, "-1 for 'de.x'"))
        ),
    ],
)
def test_impossible_values(task, values, message):
    with pytest.raises(ConfigError, match=message):
        options_of(task, {**NEEDED.get(task, {}), **values})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("sports, art ,,sports", ["sports", "art"]),
        (("sports", " art", "a, b"), ["sports", "art", "a, b"]),
        (["one"], ["one"]),
        ("体育,艺术", ["体育", "艺术"]),
    ],
)
def test_candidate_labels(given, expected):
    """Text is split at commas, a list is not; each label once, in order."""
    assert ClassifyOptions(candidate_labels=given).labels == expected


def test_no_candidate_labels():
    assert ClassifyOptions().labels == []


@pytest.mark.parametrize("task", WITH_MIN_SCORE)
def test_a_file_of_thresholds_is_read_once(tmp_path, task):
    """What travels is its content: the file may be gone by then, or differ on another machine."""
    path = tmp_path / "t.json"
    path.write_text('{"*": 0.5, "de": {"PER": 0.25}}', encoding="utf-8")
    options = options_of(task, {**NEEDED.get(task, {}), "min_score": str(path)})
    resolved = options.resolved()
    path.unlink()
    assert resolved.min_score == {"*": 0.5, "de": {"PER": 0.25}}
    assert resolved.resolved() == resolved
    with pytest.raises(ConfigError, match=r"--min-score: there is no file .*t.json"):
        options.resolved()


def test_a_schema_file_is_read_once(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("Person: [City]\n", encoding="utf-8")
    options = ExtractOptions(schema=str(path))
    resolved = options.resolved()
    path.unlink()
    assert resolved.schema == {"Person": ["City"]}
    assert resolved.resolved() == resolved
    assert [node.name for node in resolved.nodes] == ["Person"]
    with pytest.raises(ConfigError, match=r"--schema: there is no file .*s.yaml"):
        options.resolved()


def test_a_schema_as_text():
    assert ExtractOptions(schema="Person, City").resolved().schema == ["Person", "City"]
    assert ExtractOptions().nodes is None


def test_added_columns():
    assert NerOptions().added_columns == ("entities",)
    assert ChooseOptions().added_columns == ("predicted_choice", "choice_scores")
    assert EmbedOptions(dimensions=3).added_columns == ("embedding",)
    assert ExtractOptions(output_json=True).added_columns == ("extracted", "extracted_json")
    assert ExtractOptions().added_columns == ("extracted",)


@pytest.mark.parametrize("task", TASKS)
def test_demos(task):
    """Sample input and a model for every task."""
    assert any(demo_data(task).iterdir())
    assert (demo_model(task) / "config.json").is_file()
