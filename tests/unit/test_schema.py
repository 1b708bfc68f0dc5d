import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erniem_batch.errors import ConfigError
from erniem_batch.text.schema import (
    MAX_DEPTH,
    Node,
    options_of_prompt,
    parse_schema,
    prompt_of,
    read_schema,
    schema_of_text,
    taskflow_prompt,
)


def tree(*nodes):
    """Node by node: a name, or (name, *children)."""
    made = [node if isinstance(node, tuple) else (node,) for node in nodes]
    return tuple(Node(name, tree(*children)) for name, *children in made)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Person", tree("Person")),
        (["Person", "City"], tree("Person", "City")),
        (("Person", "City"), tree("Person", "City")),
        ([], ()),
        ({}, ()),
        (None, ()),
        ({"Person": None}, tree("Person")),
        ({"Person": []}, tree("Person")),
        ({"Person": "City"}, tree(("Person", "City"))),
        ({"Person": ["City", "Boss"], "Time": None}, tree(("Person", "City", "Boss"), "Time")),
        ([{"Person": ["City"]}, "Time"], tree(("Person", "City"), "Time")),
        ({"A": {"B": {"C": ["D", {"E": "F"}]}}}, tree(("A", ("B", ("C", "D", ("E", "F")))))),
        (["A", ["B", ["C"]]], tree("A", "B", "C")),
        ("Mood [good, bad]", tree("Mood [good, bad]")),
    ],
)
def test_trees(value, expected):
    assert parse_schema(value) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "^schema must be a name, a list of names or a mapping, got int$"),
        (True, "^schema must be .* got bool$"),
        (b"Person", "^schema must be .* got bytes$"),
        (["Person", None], r"^schema\[1\] must be .* got null$"),
        (["Person", 0.5], r"^schema\[1\] must be .* got float$"),
        ({"Person": 7}, r"^schema.Person must be .* got int$"),
        ({"Person": ["City", {"Boss": [1]}]}, r"^schema.Person\[1\].Boss\[0\] must be .* got int$"),
        ({7: "City"}, "^schema: a name must be a string, got int$"),
        ("", "^schema: a name is blank$"),
        (["Person", " \u3000"], "^schema, 1 levels deep: a name is blank$"),
        ({"Person": {"\t": "City"}}, "^schema, 1 levels deep: a name is blank$"),
        ({"Person": {None: "City"}}, "^schema.Person: a name must be a string, got NoneType$"),
    ],
)
def test_errors_say_where(value, message):
    with pytest.raises(ConfigError, match=message):
        parse_schema(value)


def nested(depth):
    value = "end"
    for _ in range(depth):
        value = {"a": value}
    return value


def test_depth_has_an_end():
    """As deep as is allowed, and one level deeper; also in lists."""
    node = parse_schema(nested(MAX_DEPTH))[0]
    for _ in range(MAX_DEPTH):
        (node,) = node.children
    assert node == Node("end")
    with pytest.raises(ConfigError, match="nested more than 16 levels deep"):
        parse_schema(nested(MAX_DEPTH + 1))
    with pytest.raises(ConfigError, match="nested more than 16 levels deep"):
        parse_schema(json.loads("[" * 50 + '"a"' + "]" * 50))


# ---- text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Person", tree("Person")),
        ("Person, City", tree("Person", "City")),
        ("人物，城市", tree("人物", "城市")),
        ("Mood [good, bad], City", tree("Mood [good, bad]", "City")),
        ("情感［正向，负向］，城市", tree("情感［正向，负向］", "城市")),
        ('"Person"', tree('"Person"')),
        ('["Person", "City"]', tree("Person", "City")),
        ('{"Person": ["City"]}', tree(("Person", "City"))),
        (' {"Person": null} ', tree("Person")),
        ("{Person: [City, Boss]}", tree(("Person", "City", "Boss"))),
        ("[Person, City]", tree("Person", "City")),
        ("Person:\n- City\n- Boss:\n    Age:\n", tree(("Person", "City", ("Boss", "Age")))),
        ("- Person\n- City\n", tree("Person", "City")),
        ("- Yes\n- No\n- 1\n- null\n", tree("Yes", "No", "1", "null")),
    ],
)
def test_text(text, expected):
    """JSON, YAML in which every name stays a string, or names with commas between them."""
    assert parse_schema(schema_of_text(text)) == expected


def test_text_that_may_not_be_split():
    """A row's own schema, whose names may have commas."""
    assert schema_of_text("Person, City", may_split=False) == "Person, City"
    assert schema_of_text('["Person"]', may_split=False) == ["Person"]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("[Person", "line 1, column 8"),
        ("{a: b", "line 1, column 6"),
        ("Person:\n  - City\n Boss:", "line 3, column"),
        ("- &a\n  - *b\n", "line 2, column"),
    ],
)
def test_text_that_is_neither(text, where):
    """The place is told, and no word of the text: it may come from a row."""
    with pytest.raises(ConfigError, match=f"no JSON or YAML: neither .* at {where}") as caught:
        schema_of_text(text)
    assert "Person" not in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 5000])
def test_text_nested_without_end(text):
    """An error like any other; once, it cost a row its whole unit."""
    with pytest.raises(ConfigError):
        parse_schema(schema_of_text(text))


def test_aliases_are_refused():
    """Nine lines of them took half a minute."""
    bomb = "a: &a [x]\n" + "".join(
        f"{n}: &{n} [*{m}, *{m}, *{m}]\n" for m, n in pairwise("abcdefgh")
    )
    with pytest.raises(ConfigError, match="neither JSON nor YAML at line 2"):
        schema_of_text(bomb)


NAMES = st.text(st.characters(categories=["L", "Nd"]), min_size=1, max_size=8)
SCHEMAS = st.recursive(
    st.none() | NAMES,
    lambda inner: (
        st.lists(inner.filter(lambda value: value is not None), max_size=3)
        | st.dictionaries(NAMES, inner, max_size=3)
    ),
    max_leaves=8,
)


@given(SCHEMAS.filter(lambda value: isinstance(value, dict | list)))
def test_json_means_what_python_means(value):
    """A schema is the same tree as a value, as JSON text and as indented JSON text."""
    expected = parse_schema(value)
    for indent in (None, 2):
        text = json.dumps(value, ensure_ascii=False, indent=indent)
        assert parse_schema(schema_of_text(text)) == expected


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("s.json", '{"Person": ["City"], "Time": null}'),
        ("s.JSON", '{"Person": ["City"], "Time": null}'),
        ("s.yaml", "Person: [City]\nTime:\n"),
        ("s.yml", "Person:\n  - City\nTime:\n"),
    ],
)
def test_a_file(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert parse_schema(read_schema(str(path))) == tree(("Person", "City"), "Time")


def test_text_instead_of_a_file():
    assert read_schema("Person, City") == ["Person", "City"]
    assert read_schema('{"Person": null}') == {"Person": None}


def test_a_wrong_file_is_named(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("a:\n  - b\n c:", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"--schema .*s.yaml: neither JSON nor YAML at line 3"):
        read_schema(str(path))
    with pytest.raises(ConfigError, match=r"--schema: there is no file .*absent.json"):
        read_schema(str(tmp_path / "absent.json"))
    (tmp_path / "b.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"--schema .*b.json: "):
        read_schema(str(tmp_path / "b.json"))


# ---- prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parent", "lang", "expected"),
    [
        ("Person", None, "en", "Person"),
        ("City", "Ada", "en", "City of Ada"),
        ("城市", "张三", "zh", "张三的城市"),
        ("城市", "张三", "ch", "张三的城市"),
        ("Mood [good, bad]", None, "en", "Mood [good, bad]"),
        ("Mood [good, bad]", "soup", "en", "Mood of soup [good, bad]"),
        ("情感［正向，负向］", "汤", "zh", "汤的情感[正向,负向]"),
        ("Ｐｅｒｓｏｎ　ｎａｍｅ ", None, "en", "Person name"),
    ],
)
def test_prompts(name, parent, lang, expected):
    """Full-width forms are ASCII, as the models were trained."""
    assert prompt_of(name, parent, lang) == expected
    if "　" not in name:  # which Taskflow leaves alone
        assert taskflow_prompt(name, parent, lang) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Person", []),
        ("Mood [good, bad]", ["good", "bad"]),
        ("Mood [good]", ["good"]),
        ("汤的情感[正向,负向]", ["正向", "负向"]),
        ("Mood [ good ,, bad ] ", ["good", "bad"]),
        ("Mood []", []),
        ("[a] and more", []),
    ],
)
def test_options_of_a_prompt(prompt, expected):
    """Only at its end; empty ones are none."""
    assert [prompt[a:b] for a, b in options_of_prompt(prompt)] == expected
