"""report.html in a real browser: readable in light and dark, on a phone, on paper."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import write_jsonl

LANGUAGES = ("de", "ar", "ja")
TEXTS = ("Ada lebte in London", "عاشت آدا في لندن", "エイダはロンドンに住んでいた")
# WCAG: of small text against what lies behind it.
CONTRAST = 4.5

# Elements with text of their own whose colour is too near to that of the first opaque parent.
PALE = """
limit => {
  const parse = text => {
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const pale = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || element.closest('style')) continue;
    const style = getComputedStyle(element);
    const ink = parse(element instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [light(ink), light(ground(element))].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < limit) pale.push(`${element.tagName} ${contrast.toFixed(2)}`);
  }
  return pale;
}
"""


@pytest.fixture
def report(tmp_path: Path, job: Any) -> Path:
    """Of two nights, the second unlike the first, with samples."""
    for night, texts in (("in", TEXTS), ("more", TEXTS[::-1] + TEXTS[:1] * 4)):
        for i in range(3):
            rows = [
                {"text": f"{texts[j % len(texts)]} {j}", "lang": LANGUAGES[j % 3]}
                for j in range(150)
            ]
            write_jsonl(tmp_path / night / f"{i}.jsonl", [*rows, {"text": None}])
    settings = {"fields": {"language": "lang"}, "max_dead_letters": "50%"}
    job(**settings)
    second = {"input": [str(tmp_path / "more")], "output": str(tmp_path / "next")}
    job(compare=str(tmp_path / "out"), report_samples=60, **settings, **second)
    return tmp_path / "next" / "_run" / "report.html"


@pytest.fixture
def opened(chromium: Any, watch: Any, report: Path) -> Iterator[Any]:
    contexts = []

    def open_(**options: Any) -> Any:
        context = chromium.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        watch.over(page, report.as_uri())
        page.goto(report.as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()


# Numbers in tables that do not stand in one line, and headings of columns broken within a word.
BROKEN = r"""[...document.querySelectorAll('td.n, thead th')].filter(cell => {
  const range = document.createRange();
  range.selectNodeContents(cell);
  const lines = new Set([...range.getClientRects()].map(box => Math.round(box.top))).size;
  return lines > (cell.matches('td') ? 1 : cell.innerText.split(/[\s-]+/).length);
}).map(cell => cell.innerText)"""

SCREENS = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "narrow": {"color_scheme": "light", "viewport": {"width": 360, "height": 800}},
}


def test_it_can_be_read_everywhere(opened: Any) -> None:
    for name, options in SCREENS.items():
        page = opened(**options)
        assert page.evaluate(PALE, CONTRAST) == [], name
        width, inner = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert width <= inner, f"{name}: nothing reaches beyond the screen"
        assert page.evaluate(BROKEN) == [], f"{name}: a number or a heading goes over several lines"
        for heading in ("Labels", "Scores", "Lengths of texts", "Labels by language", "Samples"):
            assert page.get_by_role("heading", name=heading, exact=True).is_visible()
        assert page.locator("section svg").count() >= 3
    page = opened(color_scheme="dark")
    page.emulate_media(media="print")
    ink = page.evaluate("getComputedStyle(document.querySelector('h1')).color")
    assert ink == "rgb(32, 40, 43)", "dark ink on paper, whatever the screen has"
    assert len(page.pdf()) > 10_000


def test_what_a_night_brought_is_told(opened: Any) -> None:
    page = opened()
    text = page.inner_text("body")
    assert "distributions have drifted" in text
    assert "encode: RecordError" in text
    assert page.locator("mark").count() > 3
    directions = "[...document.querySelectorAll('.sample')].map(e => getComputedStyle(e).direction)"
    assert set(page.evaluate(directions)) == {"ltr", "rtl"}, "Arabic from the right"


def test_pictures(opened: Any, screenshots: Path) -> None:
    for name, options in SCREENS.items():
        page = opened(**options)
        page.screenshot(path=screenshots / f"report-{name}.png", full_page=True)
