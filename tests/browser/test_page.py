"""The page at `/`, in a real browser, asking the real service with the demo model."""

import json
import subprocess
from itertools import pairwise
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

pytestmark = pytest.mark.timeout(30, func_only=True)

TASKS = ("ner", "extract", "classify", "qa", "choose", "embed")
LANGUAGES = ("en", "de", "fr", "es", "pt", "ru", "zh", "ja", "ar", "hi")
EMOJI = "😀🚲 Amina Mwangi lives in Nairobi and rode to Mombasa."
HEBREW = "עמוס עוז נולד בירושלים."
# What a shell, JSON or HTML could take for something else.
NASTY = "It's \"Ada\" in $HOME `id` \\n !! <b> %s\nLondon 😀\u2028 O'Brien & Söhne"
XSS = "<img src=x onerror=alert(1)>"
NESTED = {
    "text": "abcdefgh 😀 ij",
    "entities": [
        {"start": 0, "end": 4, "label": "A", "text": "abcd", "score": 0.9},
        {"start": 1, "end": 2, "label": "B", "text": "b", "score": 0.8},
        {"start": 2, "end": 6, "label": "C", "text": "cdef", "score": 0.7},
        {"start": 9, "end": 13, "label": "D", "text": "😀 ij", "score": 0.6},
    ],
}

# What is marked: the words of each mark, without the label behind them. Parts of a mark that was
# cut by another one follow each other.
MARKS = """() => [...document.querySelectorAll('#output mark, #rows mark')].map((mark) => {
  const copy = mark.cloneNode(true);
  copy.querySelectorAll('.tag').forEach((tag) => tag.remove());
  return copy.textContent;
})"""
# The text as it is read, without labels.
TEXT = """(node) => {
  const copy = node.cloneNode(true);
  copy.querySelectorAll('.tag').forEach((tag) => tag.remove());
  return copy.textContent;
}"""


def choose(page: Any, task: str) -> None:
    page.locator(f"#tasks label:has(input[value={task}])").click()


def fill(page: Any, **fields: str) -> None:
    for name, value in fields.items():
        page.locator(f"#field-{name}").fill(value)


def run(page: Any) -> Any:
    """Runs and gives the response, when it is on the page."""
    with page.expect_response("**/v1/*") as response:
        page.locator("#run").click()
    page.locator("#copies").wait_for()
    return response.value.json()


def example(page: Any, language: str) -> Any:
    with page.expect_response("**/v1/*") as response:
        page.locator(f"#examples button[lang={language}]").click()
    page.locator("#run[aria-busy=false]").wait_for()
    return response.value.json()


def options(page: Any) -> None:
    """Unfolds the options."""
    if not page.locator("#more").evaluate("(node) => node.open"):
        page.locator("#more summary").click()


def copied(page: Any, button: str) -> str:
    page.locator(button).click()
    page.get_by_role("button", name="Copied").wait_for()
    return page.evaluate("() => navigator.clipboard.readText()")


def overflow(page: Any) -> int:
    return page.evaluate("() => document.documentElement.scrollWidth - window.innerWidth")


# ---- the tasks ----------------------------------------------------------------------------------


def test_colours_are_right_behind_emoji(page, service):
    fill(page, text=EMOJI)
    run(page)
    (result,) = service.ask("ner", EMOJI)["results"]  # in code points
    expected = [EMOJI[e["start"] : e["end"]] for e in result["entities"]]
    assert "Amina Mwangi" in expected
    assert "Nairobi" in expected
    assert page.evaluate(MARKS) == expected
    assert page.locator("#output .text").evaluate(TEXT) == EMOJI
    assert page.locator("#output mark").first.get_attribute("title").startswith("PER 0.")
    assert "score 0." in page.locator("#output .tag").first.text_content()
    assert page.locator("#status").text_content() == f"Found: {len(expected)} entities"
    legend = page.locator(".legend").text_content()
    assert "PER 1" in legend
    facts = page.locator("#facts").text_content()
    for name in ("tokens", "windows", "truncated", "round trip", "queue", "forward", "decode"):
        assert name in facts


@pytest.mark.parametrize("task", TASKS)
def test_examples_in_ten_languages(page, task):
    choose(page, task)
    buttons = page.locator("#examples button")
    assert buttons.evaluate_all("(all) => all.map((b) => b.lang)") == list(LANGUAGES)
    for language in LANGUAGES if task == "ner" else ("en", "zh", "ar"):
        answer = example(page, language)
        (result, *_) = answer["results"]
        assert page.locator("#alert").text_content() == ""
        if task == "ner":
            assert result["entities"], language
            assert page.evaluate(MARKS) == [e["text"] for e in result["entities"]]


def test_extraction_as_a_tree_and_in_the_text(page):
    choose(page, "extract")
    text = "👋 Ada Lovelace was born in London and met Charles Babbage."
    fill(page, text=text, schema='[{"Person": ["Place of birth"]}, "Location"]')
    (result,) = run(page)["results"]
    found = result["extracted"]
    assert {item["name"] for item in found} == {"Person", "Place of birth", "Location"}
    inner = [item for item in found if item["parent"] is not None]
    assert inner
    for item in inner:
        (parent,) = [other for other in found if other["id"] == item["parent"]]
        place = page.locator(".tree > li", has_text=parent["text"]).locator("ul > li")
        assert [item["name"], item["text"]] == place.locator("bdi").all_text_contents()
    spans = {(item["start"], item["end"], item["name"]): item["text"] for item in found}
    assert sorted(page.evaluate(MARKS)) == sorted(spans.values())
    assert page.locator("#output .text").evaluate(TEXT) == text


def test_a_schema_may_be_yaml_or_names(page):
    choose(page, "extract")
    fill(page, text="Ada Lovelace lived in London.", schema="Person, Location")
    (result,) = run(page)["results"]
    assert {item["name"] for item in result["extracted"]} == {"Person", "Location"}


def test_an_answer_in_its_context(page):
    choose(page, "qa")
    context = "😀 The clock stood still. In May the watchmaker Clara Whitlow repaired the clock."
    fill(page, question="Who repaired the clock?", context=context)
    (result,) = run(page)["results"]
    assert page.evaluate(MARKS) == [result["predicted_answer"]]
    assert page.locator("#output .text").evaluate(TEXT) == context
    others = page.locator(".bars bdi").all_text_contents()
    assert others == [answer["text"] for answer in result["predicted_answers"][1:]]
    options(page)
    page.locator("#field-null_threshold").check()
    fill(page, question="How much is a ticket to the moon?")
    (result,) = run(page)["results"]
    assert "“no answer”" in page.locator("#output").text_content()


def test_labels_as_bars(page):
    choose(page, "classify")
    fill(page, text="The team won the cup after extra time.")
    (result,) = run(page)["results"]
    assert page.locator(".big").text_content() == result["predicted_label"] == "sports"
    meters = page.get_by_role("meter")
    assert meters.count() == len(result["label_scores"]) == 5
    for meter, row in zip(meters.all(), result["label_scores"], strict=True):
        assert meter.get_attribute("aria-label") == row["label"]
        assert float(meter.get_attribute("aria-valuenow")) == row["score"]


def test_choices_as_bars(page):
    choose(page, "choose")
    fill(page, premise="Der Weg war vereist.", choices="Ich backte Kuchen.\n\nIch rutschte aus.")
    page.locator("#field-question_kind").select_option("effect")
    (result,) = run(page)["results"]
    assert len(result["choice_scores"]) == 2
    best = page.locator(".bars .best bdi").text_content()
    choices = ["Ich backte Kuchen.", "Ich rutschte aus."]
    assert best == f"{choices[result['predicted_choice']]} (best)"


def test_the_cosine_of_two_texts(page, service):
    choose(page, "embed")
    texts = ["Good morning", "Guten Morgen"]
    fill(page, text=texts[0], second=texts[1])
    options(page)
    fill(page, dimensions="100")
    run(page)
    rows = service.ask("embed", texts, dimensions=100)["results"]
    one, two = (np.array(row["embedding"]) for row in rows)
    cosine = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
    assert float(page.locator(".big").text_content()) == pytest.approx(cosine, abs=1e-3)
    assert page.locator(".strip").count() == 2
    assert "100 numbers" in page.locator("#output").text_content()
    assert page.locator(".strip").first.locator("rect").count() == 64


def test_options_reach_the_service(page):
    options(page)
    page.locator("#field-aggregation_strategy").select_option("none")
    fill(page, text="Ada Lovelace lived in London.", min_score="0.5")
    with page.expect_request("**/v1/ner") as request:
        run(page)
    assert request.value.post_data_json == {
        "inputs": {"text": "Ada Lovelace lived in London."},
        "options": {"offset_unit": "utf16", "aggregation_strategy": "none", "min_score": 0.5},
    }
    assert "-PER" in page.locator(".legend").text_content()  # as the tokens are labelled


# ---- scripts and HTML in texts ------------------------------------------------------------------


def test_arabic_runs_from_right_to_left(page):
    example(page, "ar")
    text = page.locator("#output .text")
    assert text.evaluate("(node) => getComputedStyle(node).direction") == "rtl"
    marks = page.locator("#output mark")
    first, second = (marks.nth(i).bounding_box() for i in (0, 1))
    assert first["x"] > second["x"]
    # Labels are isolated, and stand behind their word, which is on its left.
    tag = marks.first.locator(".tag")
    assert tag.evaluate("(node) => getComputedStyle(node).unicodeBidi") == "isolate"
    assert tag.bounding_box()["x"] < first["x"] + first["width"] / 2
    # As it is on the right in the box where it is written.
    box = page.locator("#field-text")
    assert box.evaluate("(node) => getComputedStyle(node).direction") == "rtl"


def test_html_in_a_text_is_text(page, drop, as_jsonl):
    text = f"{XSS} Ada Lovelace lived in London. {XSS}"
    fill(page, text=text)
    run(page)
    assert page.locator("#output .text").evaluate(TEXT) == text
    choose(page, "extract")
    fill(page, text=text, schema=json.dumps([XSS, {"Person": [XSS]}]))
    run(page)
    choose(page, "choose")
    fill(page, premise=text, choices=f"{XSS}\nb")
    run(page)
    assert page.locator(".bars bdi").first.text_content().startswith(XSS)
    entity = {"start": 0, "end": 4, "label": XSS, "text": "<img", "score": XSS}
    row = {"id": XSS, "text": XSS, XSS: XSS, "entities": [entity]}
    drop(page, "body", f"{XSS}.jsonl", as_jsonl([row, XSS]))
    page.locator("#rows mark").wait_for()
    page.locator("#rows details", has_text="All columns").locator("summary").click()
    assert XSS in page.locator("#rows pre").first.text_content()
    assert page.locator("img").count() == 0


# ---- errors -------------------------------------------------------------------------------------


def test_a_wrong_option_is_shown_at_its_field(page, watch):
    watch.statuses.add(422)
    choose(page, "classify")
    options(page)
    fill(page, text="x", top_k="0")
    answer = run(page)
    alert = page.get_by_role("alert")
    assert answer["error"]["message"] in alert.text_content()
    assert "How many:" in alert.text_content()
    assert "options.top_k" in alert.text_content()
    field = page.locator("#field-top_k")
    assert field.get_attribute("aria-invalid") == "true"
    assert page.locator(":focus").get_attribute("id") == "field-top_k"
    fill(page, top_k="2")
    run(page)
    assert alert.text_content() == ""
    assert field.get_attribute("aria-invalid") is None


def test_a_wrong_schema_is_shown_at_its_field(page, watch):
    watch.statuses.add(422)
    choose(page, "extract")
    fill(page, text="x", schema="[unfinished")
    run(page)
    assert page.get_by_role("alert").text_content() != ""


def test_what_is_empty_is_not_sent(page):
    page.locator("#run").click()
    assert "empty" in page.get_by_role("alert").text_content()
    assert page.locator(":focus").get_attribute("id") == "field-text"


def test_a_long_text_is_refused_and_its_command_works(page, watch, service):
    watch.statuses.add(413)
    # Pasted: typing takes long.
    page.locator("#field-text").evaluate(
        "(box, text) => { box.value = text; box.dispatchEvent(new Event('input')); }",
        "It's 長い. " * 20_000,
    )
    answer = run(page)
    assert answer["error"]["message"] in page.get_by_role("alert").text_content()
    command = copied(page, "#copy-curl")  # too long for an argument of a command
    assert shell(command)["error"]["code"] == answer["error"]["code"]


def shell(command: str, **env: str) -> Any:
    """What a command prints when it is pasted into bash."""
    done = subprocess.run(
        ["bash", "--norc"],
        input=command + "\n",
        env={"PATH": "/usr/bin:/bin", "HOME": "/nowhere", "no_proxy": "*", **env},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.mark.parametrize("task", ["ner", "qa"])
def test_the_command_does_what_the_page_did(page, task):
    choose(page, task)
    if task == "ner":
        fill(page, text=NASTY)
    else:
        fill(page, question=NASTY.replace("\n", " "), context=NASTY)
    answer = run(page)
    command = copied(page, "#copy-curl")
    assert "Authorization" not in command
    again = shell(command)
    assert again["model"] == answer["model"]
    _assert_close(again["results"], answer["results"])
    page.get_by_role("button", name="Copy curl").wait_for()
    assert json.loads(copied(page, "#copy-json")) == answer


def _assert_close(one: Any, two: Any) -> None:
    """Equal; scores nearly so, since passes differ in what else was in them."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            _assert_close(one[key], two[key])
    elif isinstance(one, list):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            _assert_close(a, b)
    else:
        assert one == (pytest.approx(two, abs=1e-4) if isinstance(two, float) else two)


def test_a_token_is_asked_for_and_kept_out_of_the_command(open_page, guarded, watch):
    watch.statuses.update((401, 429))
    page = open_page(guarded)
    page.locator("#token-form").wait_for()
    assert "token" in page.get_by_role("alert").text_content()
    assert not page.locator("#form").is_visible()
    page.get_by_label("Bearer token").fill("wrong")
    page.keyboard.press("Enter")
    page.locator("#token-form").wait_for()
    page.get_by_label("Bearer token").fill(guarded.token)
    page.keyboard.press("Enter")
    page.locator("#form").wait_for()
    assert page.get_by_role("alert").text_content() == ""
    # Only what is served is offered.
    tasks = page.locator("#tasks input").evaluate_all("(all) => all.map((i) => i.value)")
    assert tasks == ["ner", "embed"]
    fill(page, text="Ada Lovelace lived in London.")
    answer = run(page)
    command = copied(page, "#copy-curl")
    assert '"Authorization: Bearer $TOKEN"' in command
    assert guarded.token not in command
    _assert_close(shell(command, TOKEN=guarded.token)["results"], answer["results"])
    page.reload()
    page.locator("#form").wait_for()  # the tab remembers it
    assert guarded.token not in page.url
    fill(page, text="Ada Lovelace lived in London.")
    with guarded.busy("names", "ner"):
        run(page)
        assert "Try again in" in page.get_by_role("alert").text_content()
    run(page)
    assert page.get_by_role("alert").text_content() == ""


def test_one_of_several_models(open_page, guarded, watch):
    watch.statuses.add(401)
    page = open_page(guarded)
    page.get_by_label("Bearer token").fill(guarded.token)
    page.keyboard.press("Enter")
    page.locator("#form").wait_for()  # it appears when the models have come
    models = page.get_by_label("Model", exact=True)
    assert models.locator("option").all_text_contents() == ["names", "both"]
    models.select_option("both")
    fill(page, text="Ada Lovelace lived in London.")
    assert run(page)["model"] == "both"
    assert parse_qs(urlsplit(page.url).fragment) == {"task": ["ner"], "model": ["both"]}
    page.reload()
    page.locator("#form").wait_for()
    assert models.input_value() == "both"
    choose(page, "embed")
    assert models.locator("option").all_text_contents() == ["both"]


# ---- files --------------------------------------------------------------------------------------


def ner_row(i: int, **more: Any) -> dict[str, Any]:
    text = f"😀 Row {i}: Ada met Zoë in København."
    names = [("Ada", "PER"), ("København", "LOC")] if i % 2 else [("Ada", "PER")]
    entities = [
        {"start": text.index(name), "end": text.index(name) + len(name), "label": label,
         "text": name, "score": 0.9}
        for name, label in names
    ]  # fmt: skip
    return {"id": f"{i:04}", "text": text, "entities": entities, **more}


def drop_rows(page: Any, drop: Any, content: str, name: str = "part-00000.jsonl") -> str:
    drop(page, "main", name, content)
    page.locator("#rows > *").first.wait_for()
    return page.locator("#file-status").text_content()


def test_a_file_of_results_row_by_row(page, drop, as_jsonl):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    lines = [*(ner_row(i) for i in range(58)), "{broken", "", "[1, 2]"]
    status = drop_rows(page, drop, as_jsonl(lines))
    assert status == "part-00000.jsonl: 58 rows, 2 lines that are not JSON objects, 1 empty line"
    assert page.locator("#rows article").count() == 25
    assert page.locator("#place").text_content() == "1–25 of 60 lines"
    assert page.locator("#rows .warn").count() == 0
    assert page.evaluate(MARKS)[:3] == ["Ada", "Ada", "København"]
    page.get_by_role("button", name="Next").click()
    page.get_by_role("button", name="Next").click()
    assert page.locator("#rows article").count() == 10
    assert page.get_by_role("button", name="Next").is_disabled()
    assert "Line 59" in page.locator("#rows").text_content()
    assert page.locator("#rows pre").first.text_content() == "{broken"
    page.get_by_label("Show").select_option("=LOC")
    assert page.locator("#place").text_content() == "1–25 of 29 lines"
    page.get_by_label("Show").select_option("broken")
    assert page.locator("#place").text_content() == "1–2 of 2 lines"
    page.get_by_label("Show").select_option("")
    page.get_by_label("Search").fill("row 41:")
    page.get_by_text("1–1 of 1 line").wait_for()
    assert "0041" in page.locator("#rows h3").text_content()
    page.get_by_role("button", name="Close the file").click()
    assert page.locator("#rows article").count() == 0
    assert asked == []


def test_offset_units_of_a_file(page, drop, as_jsonl):
    row = ner_row(1)
    before = [row["text"][: e["start"]] for e in row["entities"]]
    for unit, length in (
        ("utf16", lambda text: len(text.encode("utf-16-le")) // 2),
        ("byte", lambda text: len(text.encode())),
    ):
        entities = [
            {**e, "start": length(b), "end": length(b + e["text"])}
            for e, b in zip(row["entities"], before, strict=True)
        ]
        drop_rows(page, drop, as_jsonl([{**row, "entities": entities}]))
        page.locator("#rows .warn").wait_for()
        warning = page.locator("#rows .warn").text_content()
        assert "2 of 2 spans do not fit" in warning
        assert {"utf16": "UTF-16 units", "byte": "bytes"}[unit] in warning.split(".")[1]
        page.get_by_label("Offsets count").select_option(unit)
        assert page.locator("#rows .warn").count() == 0
        assert page.evaluate(MARKS) == ["Ada", "København"]
        page.get_by_role("button", name="Close the file").click()


def test_spans_within_and_across_each_other(page, drop, as_jsonl):
    drop_rows(page, drop, as_jsonl([NESTED]))
    assert page.locator("#rows .text").evaluate(TEXT) == NESTED["text"]
    # C crosses A: it is cut where A ends.
    assert page.evaluate(MARKS) == ["abcd", "b", "cd", "ef", "😀 ij"]
    assert page.locator("#rows .tag").count() == 4
    lifted = page.locator("#rows mark").first
    assert lifted.evaluate("(node) => node.style.getPropertyValue('--lift')") == "1"


def test_hebrew_in_a_file(page, drop, as_jsonl):
    name, town = "עמוס עוז", "ירושלים"
    spans = [
        {"start": HEBREW.index(word), "end": HEBREW.index(word) + len(word), "label": label,
         "text": word, "score": 1.0}
        for word, label in ((name, "PER"), (town, "LOC"))
    ]  # fmt: skip
    drop_rows(page, drop, as_jsonl([{"body": {"he": HEBREW}, "entities": spans}]))
    assert page.evaluate(MARKS) == [name, town]
    text = page.locator("#rows .text")
    assert text.evaluate("(node) => getComputedStyle(node).direction") == "rtl"
    first, second = (page.locator("#rows mark").nth(i).bounding_box() for i in (0, 1))
    assert first["x"] > second["x"]
    page.get_by_label("Text column").select_option("body.he")
    assert page.evaluate(MARKS) == [name, town]


def test_rows_of_all_tasks_in_a_file(page, drop, as_jsonl):
    extracted = [
        {"id": 0, "parent": None, "name": "Person", "text": "Ada", "start": 2, "end": 5,
         "probability": 0.9},
        {"id": 1, "parent": 0, "name": "City", "text": "London", "start": 9, "end": 15,
         "probability": 0.8},
        {"id": 2, "parent": 0, "name": "Mood [good, bad]", "text": "good", "start": None,
         "end": None, "probability": 0.7},
    ]  # fmt: skip
    text = "😀 Ada in London"
    answer = {"start": 9, "end": 15, "text": "London", "score": 0.5}
    rows = [
        {"text": text, "extracted": extracted},
        {"text": text, "predicted_label": "travel", "predicted_score": 0.9,
         "label_scores": [{"label": "travel", "score": 0.9}, {"label": "sports", "score": 0.1}]},
        {"text": text, "predicted_label": None, "predicted_score": None, "label_scores": []},
        {"question": "Where?", "context": text, "predicted_answer": "London",
         "predicted_answers": [answer], "null_score": None},
        {"question": "Who?", "context": text, "predicted_answer": None, "predicted_answers": [],
         "null_score": 0.9},
        {"premise": text, "choices": ["a", "b"], "predicted_choice": 1,
         "choice_scores": [0.2, 0.8]},
        {"text": text, "embedding": [0.5, -0.5, 0.1]},
        {"text": text, "entities": "not a list", "extracted": 7},
        {"something": "else"},
    ]  # fmt: skip
    drop_rows(page, drop, as_jsonl(rows))
    cards = page.locator("#rows article")
    assert cards.count() == len(rows)
    assert cards.nth(0).locator(".tree ul > li").count() == 2
    assert page.evaluate(MARKS) == ["Ada", "London", "London"]
    assert cards.nth(1).get_by_role("meter").count() == 2
    assert "No answer" in cards.nth(4).text_content()
    assert cards.nth(5).locator(".best bdi").text_content() == "b (best)"
    assert cards.nth(6).locator(".strip rect").count() == 3
    assert "no results of a known task" in cards.nth(8).text_content()


def test_a_large_file_does_not_freeze_the_page(page):
    longest = page.evaluate(
        """async () => {
          const line = JSON.stringify({text: 'Ada lived in London. '.repeat(20), entities: [
            {start: 0, end: 3, label: 'PER', text: 'Ada', score: 0.9}]}) + '\\n';
          const block = line.repeat(2000);
          const n = Math.ceil(16e6 / block.length);
          const transfer = new DataTransfer();
          transfer.items.add(new File(Array(n).fill(block), 'large.jsonl'));
          let longest = 0, last = performance.now();
          const timer = setInterval(() => {
            longest = Math.max(longest, performance.now() - last);
            last = performance.now();
          }, 5);
          const event = new DragEvent('drop', {dataTransfer: transfer, bubbles: true});
          document.body.dispatchEvent(event);
          while (!document.querySelector('#rows article')) {
            await new Promise((resume) => setTimeout(resume, 20));
          }
          const search = document.querySelector('#search');
          search.value = 'nowhere';
          search.dispatchEvent(new Event('input'));
          while (document.querySelector('#rows article')) {
            await new Promise((resume) => setTimeout(resume, 20));
          }
          clearInterval(timer);
          return longest;
        }"""
    )
    assert "rows" in page.locator("#file-status").text_content()
    assert longest < 1000  # ms; other programs may take their time too


def test_parquet_and_plain_text(page, drop):
    drop(page, "body", "part.parquet", "PAR1…")
    page.get_by_text("this is Parquet").wait_for()
    drop(page, "#field-text", "notes.txt", f"{EMOJI}\nzwei")
    page.get_by_text("notes.txt loaded").wait_for()
    assert page.locator("#field-text").input_value() == f"{EMOJI}\nzwei"
    choose(page, "embed")  # the text goes along
    assert page.locator("#field-text").input_value() == f"{EMOJI}\nzwei"


# ---- for everybody ------------------------------------------------------------------------------


def test_by_keyboard_alone(page):
    page.keyboard.press("Tab")
    assert page.locator(":focus").text_content() == "Skip to the form"
    page.keyboard.press("Enter")
    assert page.locator(":focus").get_attribute("id") == "main"
    page.keyboard.press("Tab")
    assert page.locator(":focus").get_attribute("value") == "ner"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Tab")
    assert page.locator(":focus").get_attribute("id") == "field-text"
    page.keyboard.type("Ada Lovelace lived in London.")
    with page.expect_response("**/v1/ner"):
        page.keyboard.press("Control+Enter")
    page.locator("#output mark").first.wait_for()
    assert page.evaluate(MARKS) == ["Ada Lovelace", "London"]
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.locator(":focus").get_attribute("id") == "copy-json":
            break
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Copied").wait_for()
    assert page.locator("#toast").text_content() == "JSON copied"
    outline = page.locator(":focus").evaluate("(node) => getComputedStyle(node).outlineStyle")
    assert outline == "solid"


def test_the_address_holds_options_and_no_text(open_page, service, page):
    choose(page, "qa")
    options(page)
    fill(page, question="secret question", context="secret text", top_k="7")
    page.locator("#field-null_threshold").check()
    fragment = urlsplit(page.url).fragment
    assert parse_qs(fragment) == {"task": ["qa"], "top_k": ["7"], "null_threshold": ["true"]}
    other = open_page(service, f"#{fragment}")
    other.locator("#form").wait_for()
    assert other.locator("#field-top_k").input_value() == "7"
    assert other.locator("#field-null_threshold").is_checked()
    assert other.locator("#field-top_k").is_visible()
    assert other.locator("#field-question").input_value() == ""
    other.evaluate("() => { location.hash = '#task=classify&top_k=2'; }")
    other.get_by_text("Several of them may be true").wait_for()
    assert other.locator("#field-top_k").input_value() == "2"
    other.evaluate("() => { location.hash = '#task=nonsense&x=%E0'; }")
    assert other.locator("#field-text").is_visible()


def test_a_narrow_phone(open_page, service, drop, as_jsonl):
    page = open_page(service, viewport={"width": 320, "height": 640}, has_touch=True)
    page.locator("#form").wait_for()
    assert overflow(page) <= 0
    for task in TASKS:
        choose(page, task)
        options_shown = page.locator("#more").is_visible()
        if options_shown:
            options(page)
        example(page, "de")
        assert overflow(page) <= 0, task
    fill(page, text="Donaudampfschifffahrt" * 20, second="x")
    run(page)
    assert overflow(page) <= 0
    drop_rows(page, drop, as_jsonl([ner_row(1), NESTED, "x" * 500]))
    assert overflow(page) <= 0


# Text whose contrast with what is behind it is below that of AA.
FAINT = """() => {
  const canvas = document.createElement('canvas');
  canvas.width = canvas.height = 1;
  const pen = canvas.getContext('2d', {willReadFrequently: true});
  const mixed = (colours) => {
    pen.clearRect(0, 0, 1, 1);
    for (const colour of colours) { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); }
    return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((c) => (c /= 255) <= 0.04045 ? c / 12.92
      : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text; (text = walker.nextNode()); ) {
    const node = text.parentElement;
    if (!text.data.trim() || !node.checkVisibility() || node.closest('.hidden, noscript')) continue;
    const layers = [];
    for (let outer = node; outer; outer = outer.parentElement) {
      layers.unshift(getComputedStyle(outer).backgroundColor);
    }
    const style = getComputedStyle(node);
    const [a, b] = [mixed([...layers, style.color]), mixed(layers)].map(light);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`${text.data.trim().slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_in_both_themes(open_page, service, watch, drop, as_jsonl, scheme):
    watch.statuses.add(422)
    page = open_page(service, color_scheme=scheme, reduced_motion="reduce")
    page.locator("#form").wait_for()
    labels = [
        {"start": i, "end": i + 1, "label": f"L{i}", "text": "a", "score": 0.5} for i in range(12)
    ]
    drop_rows(page, drop, as_jsonl([{"text": "a" * 12, "entities": labels}, NESTED, "broken"]))
    for task in TASKS:
        choose(page, task)
        if page.locator("#more").is_visible():
            options(page)
        example(page, "en")
        assert page.evaluate(FAINT) == [], task
    choose(page, "classify")
    fill(page, top_k="0")
    run(page)
    assert page.get_by_role("alert").text_content() != ""
    assert page.evaluate(FAINT) == []


def test_the_theme_can_be_changed_and_stays(page):
    def is_dark() -> bool:
        colour = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour[4:-1].split(",")) < 3 * 128

    assert not is_dark()
    button = page.get_by_role("button", name="Dark")
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    assert is_dark()
    assert button.get_attribute("aria-pressed") == "true"
    page.reload()
    page.locator("#form").wait_for()
    assert is_dark()


UNNAMED = """() => {
  const named = (node) => (node.labels?.length && node.labels[0].textContent.trim())
    || node.getAttribute('aria-label')
    || (node.matches('button, a, summary') && node.textContent.trim());
  const wanted = document.querySelectorAll('input, select, textarea, button, a, summary');
  return [...wanted].filter((node) => !named(node)).map((node) => node.outerHTML);
}"""
BROKEN_IDS = """() => {
  const ids = [...document.querySelectorAll('[id]')].map((node) => node.id);
  const twice = ids.filter((id, i) => ids.indexOf(id) !== i);
  const missing = [...document.querySelectorAll('[aria-describedby], [aria-labelledby], [for]')]
    .flatMap((node) => ['aria-describedby', 'aria-labelledby', 'for']
      .map((name) => node.getAttribute(name)).filter(Boolean))
    .filter((id) => !document.getElementById(id));
  return [...twice, ...missing];
}"""


def test_names_and_landmarks(page, drop, as_jsonl):
    drop_rows(page, drop, as_jsonl([ner_row(i) for i in range(3)]))
    for task in TASKS:
        choose(page, task)
        example(page, "en")
        assert page.evaluate(UNNAMED) == []
        assert page.evaluate(BROKEN_IDS) == []
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.locator("h1").count() == 1
    for landmark in ("main", "header", "footer"):
        assert page.locator(landmark).count() == 1
    levels = page.locator("h1, h2, h3").evaluate_all("(all) => all.map((h) => +h.tagName[1])")
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_no_motion_for_those_who_want_none(open_page, service):
    page = open_page(service, reduced_motion="reduce")
    page.locator("#form").wait_for()
    moving = """() => [...document.querySelectorAll('*')].filter((node) => {
      const style = getComputedStyle(node);
      return style.animationName !== 'none' || style.transitionDuration !== '0s';
    }).length"""
    assert page.evaluate(moving) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures(open_page, service, screenshots, drop, as_jsonl, scheme):
    page = open_page(service, color_scheme=scheme, reduced_motion="reduce")
    page.locator("#form").wait_for()
    for task in TASKS:
        choose(page, task)
        example(page, "en" if task != "ner" else "ar")
        page.evaluate("() => { document.activeElement.blur(); scrollTo(0, 0); }")
        page.screenshot(path=screenshots / f"{task}-{scheme}.png", full_page=True)
    drop_rows(page, drop, as_jsonl([*(ner_row(i) for i in range(4)), "{broken", NESTED]))
    page.screenshot(path=screenshots / f"file-{scheme}.png", full_page=True)
    page.set_viewport_size({"width": 320, "height": 640})
    page.screenshot(path=screenshots / f"phone-{scheme}.png", full_page=True)
