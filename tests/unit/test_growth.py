"""Parsers of what strangers write: the same answers as ever, in linear time."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erniem_batch.errors import ConfigError
from erniem_batch.records import Record
from erniem_batch.tasks.choose import OTHER_TEMPLATE, asked
from erniem_batch.tasks.extract import merged
from erniem_batch.text.schema import (
    _schema_of_text,
    options_of_prompt,
    parse_schema,
    prompt_of,
    split_names,
    taskflow_prompt,
)

# ---- what the regular expressions said that these functions replace -----------------------------

COMMA_OUTSIDE = re.compile(r"[,，](?![^\[［]*[\]］])")
OPTIONS_OF_PROMPT = re.compile(r"\[(.*?)\]\s*$", re.DOTALL)
OPTIONS_OF_NAME = re.compile(r"\[.*?\]$")
NASTY = st.text(st.sampled_from("[]［］,， \n\t\x1f\u2003ab"), max_size=14)


def old_options_of_prompt(prompt: str) -> list[tuple[int, int]]:
    match = OPTIONS_OF_PROMPT.search(prompt)
    if match is None:
        return []
    spans, at = [], match.start(1)
    for part in match.group(1).split(","):
        start = at + len(part) - len(part.lstrip())
        if part.strip():
            spans.append((start, start + len(part.strip())))
        at += len(part) + 1
    return spans


def old_question(name: str, parent: str) -> str:
    options = OPTIONS_OF_NAME.search(name)
    if options:
        return f"{name[: name.find('[', 1)].strip()} of {parent} {options.group()}"
    return f"{name} of {parent}"


@settings(max_examples=600, deadline=None)
@given(NASTY)
def test_brackets_and_commas_mean_what_they_meant(text: str) -> None:
    assert list(split_names(text)) == COMMA_OUTSIDE.split(text)
    assert options_of_prompt(text) == old_options_of_prompt(text)
    question = old_question(text, "x")
    assert taskflow_prompt(text, "x", "en") == question.translate(
        {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
    )


# ---- growth -------------------------------------------------------------------------------------

# Ten times the size may take so many times as long: twice what is linear, and the noise of a busy
# machine. What was quadratic took a hundred times as long.
MOST = 25
N = 20_000


def seconds(function: Callable[[Any], Any], value: Any) -> float:
    """CPU time of the shortest of several runs."""

    def runs() -> Iterator[float]:
        for _ in range(3):
            started = time.thread_time()  # which other processes do not change
            with suppress(ConfigError):
                function(value)
            yield time.thread_time() - started

    return min(runs())


def names_of(text: str) -> Any:
    return _schema_of_text(text, may_split=True)  # without its cache


def same_names(n: int) -> Any:
    return parse_schema([{"a": ["b"]}] * n)


GROWTH: dict[str, tuple[Callable[[Any], Any], Callable[[int], Any]]] = {
    "commas": (names_of, lambda n: "," * n),
    "commas before a bracket": (names_of, lambda n: "," * n + "["),
    "open brackets and commas": (names_of, lambda n: "a[," * n),
    "closed brackets and commas": (names_of, lambda n: "a,]" * n),
    "a prompt of open brackets": (options_of_prompt, lambda n: "[" * n),
    "a prompt of closed brackets and spaces": (options_of_prompt, lambda n: "[" + "] " * n + "x"),
    "a prompt of spaces": (options_of_prompt, lambda n: "[a]" + " " * n + "x"),
    "a prompt of options": (options_of_prompt, lambda n: "[" + "a, " * n + "]"),
    "a name of brackets": (lambda v: prompt_of(v, "x", "en"), lambda n: "[" * n + "x"),
    "a name of lines": (lambda v: prompt_of(v, "x", "en"), lambda n: "[\n" * n + "]"),
    "names that stand often": (merged, lambda n: same_names(n // 10)),
    "parts below a long name": (
        parse_schema, lambda n: {"x" * 10 * n: ["a"] * n},
    ),
    "names with nothing around": (parse_schema, lambda n: [["a"]] * n),
    "JSON": (names_of, lambda n: "[" + '"a",' * n + '"a"]'),
    "a question of premises": (
        lambda v: asked(v), lambda n: Record("", "p" * 10, {"question": "{premise}" * n}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", GROWTH)
def test_ten_times_the_size_takes_about_ten_times_as_long(kind: str) -> None:
    function, make = GROWTH[kind]
    short, long = (seconds(function, make(n)) for n in (N // 10, N))
    assert long < max(MOST * short, 0.2), f"{short:.4f} s, then {long:.4f} s"


def test_yaml_grows_as_its_text_does() -> None:
    """Slow, but in proportion; what is nested too deeply ends soon."""
    lists = [seconds(names_of, "- a\n" * n) for n in (40, 400)]
    assert lists[1] < max(MOST * lists[0], 0.5)
    nested = [seconds(names_of, "[a, " * n) for n in (100, 1000)]
    assert nested[1] < max(MOST * nested[0], 2)


def test_a_question_does_not_stand_for_many_premises() -> None:
    record = Record("", "p" * 1000, {"question": "{premise}" * 1000})
    assert asked(record) == OTHER_TEMPLATE.replace("{premise}", "p" * 1000).replace(
        "{question}", "{premise}" * 1000
    )
