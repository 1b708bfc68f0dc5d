"""Charts of a run's report: SVG that takes its colours from the page, light or dark."""

import io
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from erniem_batch.config import cache_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that the page chooses: matplotlib draws with these, and the names of CSS take their place.
INK, LINE = "#010203", "#010204"
NOW, BEFORE, SECOND = "#010205", "#010206", "#010207"
CSS = {
    INK: "var(--soft)",
    LINE: "var(--line)",
    NOW: "var(--now)",
    BEFORE: "var(--before)",
    SECOND: "var(--second)",
}
METADATA = ("Creator", "Date", "Format", "Type")  # left out
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: the browser has the fonts, whatever the script
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": LINE,
    "legend.frameon": False,
}
# Inches; the page scales them.
WIDTH, HALF = 8.6, 4.8
MOST_STRETCHES, LEAST_SECONDS = 60, 5.0
MOST_LABELS = 20
MOST_SCORES = 8

Report = Mapping[str, Any]


def timeline(report: Report) -> str | None:
    """Tokens a second and actors, over time."""
    points = report["timeline"]
    if len(points) < 3:
        return None
    seconds, _, actors = zip(*points, strict=True)
    ends, rates = speeds(points)

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import MaxNLocator

        axes.step(ends, rates, where="pre", color=NOW, linewidth=1.2)
        axes.set(xlabel="seconds", ylabel="tokens/s", ylim=(0, None), xlim=(0, seconds[-1]))
        axes.yaxis.label.set_color(NOW)
        right = axes.twinx()
        right.step(seconds, actors, where="post", color=SECOND, linewidth=1.2)
        right.set(ylabel="actors at work", ylim=(0, max(actors) + 1))
        right.yaxis.label.set_color(SECOND)
        right.yaxis.set_major_locator(MaxNLocator(integer=True))

    return chart("timeline", 2.4, draw, width=WIDTH)


def speeds(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Tokens a second in some stretches of time of about the same length, and their ends.

    Tokens come in chunks: from one second to the next there would be nothing, then thousands.
    """
    stretch = max(LEAST_SECONDS, points[-1][0] / MOST_STRETCHES)
    ends, rates = [0.0], [0.0]
    start, before, _ = points[0]
    for end, tokens, _ in points[1:]:
        if end - start >= stretch or (end == points[-1][0] and end > start):
            ends.append(end)
            rates.append((tokens - before) / (end - start))
            start, before = end, tokens
    return ends, rates


def stages(report: Report) -> str | None:
    """Seconds of each stage, of all threads of all actors."""
    spent = report["stage_seconds"]
    total = sum(spent.values())
    if not total:
        return None

    def draw(axes: "Axes") -> None:
        names = list(spent)[::-1]
        bars = axes.barh(names, [spent[name] for name in names], color=NOW, height=0.6)
        texts = [f"{spent[name]:,.1f} s, {spent[name] / total:.1%}" for name in names]
        axes.bar_label(bars, texts, padding=4)
        axes.set(xlim=(0, 1.25 * max(spent.values())), xlabel="seconds")

    return chart("stages", 1.9, draw)


def labels(report: Report) -> str | None:
    """Share of each label, and what it was before."""
    found = report["labels"][:MOST_LABELS]
    if not found:
        return None
    before = _by_label(report)

    def draw(axes: "Axes") -> None:
        total = sum(item["n"] for item in report["labels"])
        old = sum(item["n"] for item in before.values())
        names = [item["label"] or "(nothing found)" for item in found][::-1]
        shares = [item["n"] / total for item in found][::-1]
        bars = axes.barh(range(len(names)), shares, color=NOW, height=0.6, label="this run")
        axes.bar_label(bars, [f"{item['n']:,}" for item in found][::-1], padding=4)
        if old:
            marks = [before.get(item["label"], {"n": 0})["n"] / old for item in found][::-1]
            axes.plot(marks, range(len(marks)), "D", color=BEFORE, markersize=5, label="before")
            axes.legend(loc="lower right")
        axes.set_yticks(range(len(names)), [_short(name) for name in names])
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
        axes.set(xlim=(0, 1.15 * max(shares)))

    return chart("labels", 0.7 + 0.26 * len(found), draw)


def scores(report: Report) -> str | None:
    """Histograms of scores of the most frequent labels."""
    found = [item for item in report["labels"] if sum(item["scores"])][:MOST_SCORES]
    if not found:
        return None
    before = _by_label(report)

    def draw(figure: "Figure") -> None:
        columns = min(4, len(found))
        rows = -(-len(found) // columns)
        grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
        for axes in grid.flat[len(found) :]:
            axes.set_axis_off()
        for axes, item in zip(grid.flat, found, strict=False):
            _histogram(axes, item["scores"], before.get(item["label"], {}).get("scores"))
            axes.set(title=_short(item["label"], 18), xlim=(0, 1), yticks=[])
            axes.set_xticks([0, 0.5, 1], ["0", ".5", "1"])

    return chart("scores", 1.35 * -(-len(found) // 4) + 0.3, draw, whole=True)


def lengths(report: Report) -> str | None:
    """How many texts have how many tokens."""
    found = report["lengths"]
    if not found:
        return None
    before = [item["rows"] for item in (report.get("before") or {}).get("lengths", [])]

    def draw(axes: "Axes") -> None:
        total, old = sum(item["rows"] for item in found), sum(before)
        places = range(max(len(found), len(before)))
        shares = [found[i]["rows"] / total if i < len(found) else 0 for i in places]
        axes.bar(places, shares, color=NOW, width=0.8)
        if old:
            marks = [before[i] / old if i < len(before) else 0 for i in places]
            axes.plot(places, marks, "D", color=BEFORE, markersize=5)
        axes.set_xticks(places, [_tokens(i) for i in places])
        axes.set(xlabel="tokens, up to")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")

    return chart("lengths", 2.2, draw)


def chart(
    name: str,
    height: float,
    draw: Callable[[Any], None],
    *,
    whole: bool = False,
    width: float = HALF,
) -> str:
    """An SVG element.

    Args:
        name: makes ids unique within the page.
        height, width: in inches.
        whole: whether `draw` wants the figure instead of one pair of axes.
    """
    # It keeps a list of the machine's fonts; without this, in the home folder.
    os.environ.setdefault("MPLCONFIGDIR", str(cache_folder() / "matplotlib"))
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    text = io.StringIO()
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}), warnings.catch_warnings():
        # Only measured with matplotlib's font, and drawn by the browser with its own.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure if whole else figure.subplots())
        figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(METADATA))
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in CSS.items():
        svg = svg.replace(colour, variable)
    return svg


def _histogram(axes: "Axes", now: Sequence[int], before: Sequence[int] | None) -> None:
    width = 1 / len(now)
    places = [(i + 0.5) * width for i in range(len(now))]
    axes.bar(places, [n / sum(now) for n in now], width * 0.9, color=NOW)
    if before and sum(before):
        axes.step(places, [n / sum(before) for n in before], where="mid", color=BEFORE)


def _by_label(report: Report) -> dict[str, Any]:
    """Labels of the run before, by name."""
    return {item["label"]: item for item in (report.get("before") or {}).get("labels", [])}


def _tokens(number: int) -> str:
    """The longest of a bin."""
    longest = 2**number - 1
    return f"{longest // 1000}k" if longest > 9999 else str(longest)


def _short(text: str, most: int = 28) -> str:
    # A dollar sign would begin a formula.
    return (text if len(text) <= most else text[: most - 1] + "…").replace("$", r"\$")
