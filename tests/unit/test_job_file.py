"""Jobs as files: keys, environment variables, mistakes, and back again."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from erniem_batch.cli import main
from erniem_batch.errors import ConfigError
from erniem_batch.job.config import JobConfig
from erniem_batch.job.file import as_yaml, flags_of, json_schema, read_job_file
from erniem_batch.options import OPTIONS, TASKS, ExtractOptions


def write(tmp_path, text, name="job.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def printed(capsys, *arguments):
    """The configuration that a command line comes to."""
    code = main([*arguments, "--print-config"])
    out, error = capsys.readouterr()
    assert code == 0, error
    return yaml.safe_load(out)


def refused(capsys, *arguments):
    assert main(list(arguments)) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in error
    return " ".join(error.replace("│", " ").split())


FILE = """
# Tonight's job.
task: ner
input: ["${CORPUS}/a", "${CORPUS}/b"]
output: ${OUT:-tagged}/x
min-score: {PER: 0.7, "*": 0.5, no: {LOC: 0.9}}
text_column: doc.body
actors: "1:8"
limit: 20
detect-language: false
"""


def test_a_file_in_place_of_flags(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CORPUS", "s3://corpus/2026-11-27")
    monkeypatch.delenv("OUT", raising=False)
    path = write(tmp_path, FILE)
    found = printed(capsys, "ner", "--config", path)
    assert found["input"] == ["s3://corpus/2026-11-27/a", "s3://corpus/2026-11-27/b"]
    assert (found["output"], found["text-column"], found["limit"]) == ("tagged/x", "doc.body", 20)
    assert found["min-score"] == {"PER": 0.7, "*": 0.5, "no": {"LOC": 0.9}}
    # The command line comes first.
    found = printed(capsys, "ner", f"--config={path}", "--limit", "7", "--input", "c")
    assert (found["limit"], found["input"], found["actors"]) == (7, ["c"], "1:8")


def test_what_is_printed_is_a_file_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CORPUS", "corpus")
    first = printed(capsys, "ner", "--config", write(tmp_path, FILE))
    again = write(tmp_path, yaml.safe_dump(first), "again.yaml")
    assert printed(capsys, "ner", "--config", again) == first


def test_a_schema_as_yaml(tmp_path, capsys):
    schema = ["Person", {"Company": ["Founder", "Seat"]}]
    path = write(tmp_path, yaml.safe_dump({"schema": schema, "schema-lang": "en"}))
    assert printed(capsys, "extract", "--config", path)["schema"] == schema
    config = JobConfig(options=ExtractOptions(schema=json.dumps(schema)))
    nodes = config.options.resolved().nodes
    assert [node.name for node in nodes] == ["Person", "Company"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("limt: 3", 'Unknown option: "[limt]" from {path}. Did you mean --limit?'),
        ("limit: five", 'unable to convert "five" into int'),
        ("dtype: float64", "float64"),
        ("actors: 4:2", "--actors must be MIN:MAX"),
        ("output: ${NOT_SET_ANYWHERE}", "the environment variable NOT_SET_ANYWHERE is not set"),
        ("task: qa", "is for the task qa, not for ner"),
        ("config: other.yaml", "config is for the command line only"),
        ("- a\n- b", "expected a mapping"),
        ("a: [", "not valid YAML"),
        ("fail-on-drift: true", "--fail-on-drift needs --compare"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, text, words):
    path = write(tmp_path, text)
    found = refused(capsys, "ner", "--config", path)
    compact = found.replace(" ", "")  # long paths are broken over lines
    assert words.format(path=path).replace(" ", "") in compact


def test_a_file_that_is_not_there(capsys):
    assert "there is no file nowhere.yaml" in refused(capsys, "ner", "--config", "nowhere.yaml")


def test_dollars_that_are_no_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("A", "x")
    path = write(tmp_path, r"output: 'a$A \${A} ${A}'")
    assert read_job_file(path)["output"] == "a$A ${A} x"
    with pytest.raises(ConfigError, match="no file"):
        read_job_file(str(tmp_path / "no.yaml"))


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["ner", "--min-score", "{no: 0.5}"], "min-score", {"no": 0.5}),
        (["extract", "--schema", "[no, yes]"], "schema", ["no", "yes"]),
        (["embed", "--prefix", "a ${HOME} b"], "prefix", r"a \${HOME} b"),
    ],
)
def test_what_yaml_or_the_environment_could_take_for_something_else(
    tmp_path, capsys, flags, name, value
):
    first = printed(capsys, *flags, "--input", "a", "--output", "b")
    assert first[name] == value
    again = write(tmp_path, yaml.safe_dump(first))
    assert printed(capsys, flags[0], "--config", again) == first


def test_a_service_has_files_of_its_own(tmp_path, monkeypatch):
    """They have the same flag: once, none of their keys was known."""
    path = write(tmp_path, "models: [{model: demo, tasks: [ner]}]\nrequest_timeout_s: 5")
    served = []
    monkeypatch.setattr("erniem_batch.serve.run.serve", served.append)
    assert main(["serve", "--config", path]) == 0
    assert served[0].config == path
    assert served[0].app_config(2).request_timeout_s == 5


def test_plan_prints_it_too(tmp_path, capsys):
    path = write(tmp_path, "limit: 3")
    assert printed(capsys, "plan", "ner", "--config", path)["limit"] == 3


@pytest.mark.parametrize("task", TASKS)
def test_the_schema_says_what_a_file_may_say(task):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema(task)
    jsonschema.Draft202012Validator.check_schema(schema)
    names = {flag.name for flag in flags_of(task)}
    assert set(schema["properties"]) == {*names, "task"}
    for field in (*fields(OPTIONS[task]), *fields(JobConfig)):
        inner = field.name in ("options", "text_column", "fields")
        assert inner or field.name.replace("_", "-") in names
    assert all(schema["properties"][name]["description"] for name in names)
    options = OPTIONS[task](**({"schema": "Person"} if task == "extract" else {}))
    made = yaml.safe_load(as_yaml(JobConfig(options=options, input=["a"], output="b")))
    jsonschema.validate(made, schema)
    for wrong in ({"limt": 3}, {"limit": "many"}, {"dtype": "float64"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**made, **wrong}, schema)


def test_the_schema_is_a_command(capsys):
    assert main(["config-schema", "qa"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema("qa")
    assert "task must be one of" in refused(capsys, "config-schema", "parse")


def test_the_example_is_good(capsys, monkeypatch):
    jsonschema = pytest.importorskip("jsonschema")
    monkeypatch.delenv("CORPUS", raising=False)
    monkeypatch.setenv("OUTPUT", "s3://b/tagged")
    path = str(Path(__file__).parents[2] / "deploy" / "job.yaml")
    found = printed(capsys, "ner", "--config", path)
    jsonschema.validate(found, json_schema("ner"))
    assert found["actors"] == "1:8"
    assert (found["output"], found["compare"]) == ("s3://b/tagged", "s3://b/tagged")
    assert found["min-score"]["de"] == {"PER": 0.6}
