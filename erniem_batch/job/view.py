"""Results as people like to see them on a terminal: the first rows of each finished file."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from erniem_batch import storage
from erniem_batch.job.actor import Receipt
from erniem_batch.job.config import JobConfig
from erniem_batch.job.rowgroups import take_rows
from erniem_batch.terminal import printable, safe_markup

if TYPE_CHECKING:
    from erniem_batch.job.forecast import Forecast
    from erniem_batch.job.status import Status
    from erniem_batch.job.verify import Verification

SHOWN_ROWS = 6
SHOWN_CHARACTERS = 220
SHOWN_NUMBERS = 6
COLOURS = {
    "PER": "black on bright_yellow",
    "LOC": "black on bright_green",
    "ORG": "black on bright_cyan",
    "Person": "black on bright_yellow",
    "Location": "black on bright_green",
    "Organization": "black on bright_cyan",
}
OTHER_COLOUR = "black on bright_magenta"

Row = Mapping[str, Any]


class ResultView:
    """Prints the first rows of each finished file with what was found in them."""

    def __init__(self, console: Console, output: str, config: JobConfig) -> None:
        self._console = console
        self._output = output
        self._config = config

    def __call__(self, receipt: Receipt) -> None:
        if receipt.error:
            return
        tables = take_rows(storage.join(self._output, receipt.output), range(SHOWN_ROWS))
        show = VIEWS[self._config.task]
        for row in (row for table in tables for row in table.to_pylist()):
            line = show(row, row[self._config.text_column])
            if line is not None:
                self._console.print(line)


def show_entities(row: Row, text: str) -> Text | None:
    """Named entities in colour; nothing for a text without any."""
    spans = row["entities"]
    return highlight(text, spans, row.get("lang", "")) if spans else None


def show_items(row: Row, text: str) -> Text | None:
    """Extracted spans in colour, those that do not overlap."""
    spans, at = [], 0
    for item in sorted((i for i in row["extracted"] if i["start"] is not None), key=_start):
        if item["start"] >= at:
            spans.append({**item, "label": item["name"]})
            at = item["end"]
    return highlight(text, spans, row.get("lang", "")) if spans else None


def _start(item: Row) -> int:
    start: int = item["start"]
    return start


def show_labels(row: Row, text: str) -> Text:
    """The best label before the text."""
    line = _title(row)
    if row["predicted_label"] is not None:
        line.append(_flat(row["predicted_label"]), style=f"not dim {OTHER_COLOUR}")
        line.append(f" {row['predicted_score']:.2f}  ", style="bold not dim")
    return line.append(_short(text), style="default not dim")


def show_choice(row: Row, text: str) -> Text:
    """The best choice behind the premise."""
    line = _title(row).append(_short(text) + " ", style="default not dim")
    if row["predicted_choice"] is not None:
        best = row["predicted_choice"]
        line.append(_short(row["choices"][best]), style=f"not dim {OTHER_COLOUR}")
        line.append(f" {row['choice_scores'][best]:.2f}", style="bold not dim")
    return line


def show_answer(row: Row, context: str) -> Text:
    """The question, and its answer in the context."""
    line = _title(row).append(_short(row["question"]), style="bold not dim")
    answers = row["predicted_answers"][:1] if row["predicted_answer"] is not None else []
    if not answers:
        return line.append("  no answer", style="not dim")
    line.append("\n")
    spans = [{**answer, "label": f"{answer['score']:.2f}"} for answer in answers]
    first = max(0, spans[0]["start"] - SHOWN_CHARACTERS // 2)
    moved = [{**s, "start": s["start"] - first, "end": s["end"] - first} for s in spans]
    return line.append_text(highlight(context[first:], moved, ""))


def show_embedding(row: Row, text: str) -> Text:
    """The first numbers of the vector."""
    numbers = ", ".join(f"{x:+.3f}" for x in row["embedding"][:SHOWN_NUMBERS])
    line = _title(row).append(f"[{numbers}, … ] ", style="not dim cyan")
    return line.append(_short(text), style="default not dim")


VIEWS: dict[str, Callable[[Row, str], Text | None]] = {
    "ner": show_entities,
    "classify": show_labels,
    "choose": show_choice,
    "qa": show_answer,
    "embed": show_embedding,
    "extract": show_items,
}


def highlight(text: str, entities: Sequence[Row], title: str = "") -> Text:
    """The text with its entities marked and named; long texts are cut in this view only."""
    line = Text(f"{_flat(title):>8}  ", style="dim")
    at = 0
    for entity in entities:
        if entity["end"] > SHOWN_CHARACTERS:
            break
        line.append(_flat(text[at : entity["start"]]), style="default not dim")
        style = COLOURS.get(entity["label"], OTHER_COLOUR)
        line.append(_flat(entity["text"]), style=f"not dim {style}")
        line.append(f" {_flat(entity['label'])}", style="bold not dim")
        at = entity["end"]
    rest = text[at : max(at, SHOWN_CHARACTERS)]
    line.append(
        _flat(rest) + (" …" if len(text) > max(at, SHOWN_CHARACTERS) else ""),
        style="default not dim",
    )
    return line


def _title(row: Row) -> Text:
    return Text(f"{_flat(str(row.get('lang', ''))):>8}  ", style="dim")


def _short(text: str) -> str:
    flat = _flat(text[:SHOWN_CHARACTERS])
    return flat + (" …" if len(text) > SHOWN_CHARACTERS else "")


def _flat(text: str) -> str:
    return printable("".join(" " if char.isspace() else char for char in text))


# ---- a forecast -------------------------------------------------------------------------------

BAR = 30  # characters


def show_forecast(made: "Forecast", console: Console) -> None:
    """What `plan` found, as tables."""
    figures = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _figures(made):
        figures.add_row(f"[bold]{name:>16}[/]", value)
    console.print(figures)
    for title, shares in (
        ("tokens of a text", _length_shares(made)),
        ("scripts", made.scripts),
        ("languages", made.languages),
        ("dead letters", _of_rows(made)),
    ):
        if shares:
            console.print(_bars(title, shares))
    for warning in made.warnings:
        console.print(f"[bold yellow]warning:[/] {safe_markup(warning)}", soft_wrap=True)


def _figures(made: "Forecast") -> Iterator[tuple[str, str]]:
    if made.units_done:
        yield "done already", f"{made.units_done:,} units"
    yield "files", f"{made.files:,} with {_bytes(made.bytes)} of text"
    yield "units", f"{made.units:,}"
    yield "rows", f"{made.rows:,}{_error(made.rows_error)}"
    yield "tokens", f"{made.tokens:,}{_error(made.tokens_error)}"
    padding = f"{made.padding_share:.1%} padding" if made.padding_share else "no padding"
    yield "windows", f"{made.windows:,}, {made.distinct_share:.1%} of them distinct; {padding}"
    yield "sample", f"{made.sample_rows:,} rows"
    yield "token budget", f"{made.max_batch_tokens:,} tokens a pass, on this machine"
    parts = f"{made.cpus_per_actor} CPUs"
    if made.gpus_per_actor:
        parts += f" and {made.gpus_per_actor:g} GPUs"
    yield "actors", f"{made.actors:,} of {parts}"
    if made.tokens_per_s is not None and made.seconds is not None:
        yield "speed", f"{made.tokens_per_s:,.0f} tokens/s of an actor"
        yield "time", f"{_duration(made.seconds)} ({made.start_seconds:.0f} s of it to start)"
    if made.cost is not None:
        yield "cost", f"{made.cost:,.2f}"


def _error(share: float) -> str:
    return f" ± {share:.1%}" if share else " (exact)"


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _length_shares(made: "Forecast") -> dict[str, float]:
    total = sum(item["rows"] for item in made.lengths)
    return {f"{item['from']:,} to {item['to']:,}": item["rows"] / total for item in made.lengths}


def _of_rows(made: "Forecast") -> dict[str, float]:
    return {name: n / made.sample_rows for name, n in made.dead_letters.items()}


def _bars(title: str, shares: Mapping[str, float]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    largest = max(shares.values())
    for name, share in shares.items():
        bar = "█" * round(BAR * share / largest) or ("▏" if share else "")
        table.add_row(f"{safe_markup(name):>16}", f"[cyan]{bar}[/]", f"{share:.1%}")
    return table


# ---- how far ----------------------------------------------------------------------------------


SHOWN_FAULTS = 20


def show_verification(found: "Verification", console: Console) -> None:
    """The outcome of `verify` in a few lines."""

    def line(name: str, value: str, style: str = "bold") -> None:
        console.print(
            f"[{style}]{name:>16}[/]  {safe_markup(value)}", highlight=False, soft_wrap=True
        )

    line("files", f"{found.files:,} with {found.rows:,} rows, {_bytes(found.bytes)}")
    line("dead letters", f"{found.dead_letters:,} in {found.dead_letter_files:,} files")
    line("checksums", f"{found.checksums:,} of {found.files:,} files have one")
    if found.spans:
        line("offsets", f"{found.spans:,} compared with their text")
    for damage in found.damaged[:SHOWN_FAULTS]:
        line("damaged", f"{damage.name}: {damage.what}: {damage.repair}", "bold red")
    for name in found.unnamed[:SHOWN_FAULTS]:
        line("not named", f"{name}: no part of the result", "bold red" if found.success else "bold")
    more = len(found.damaged) + len(found.unnamed) - 2 * SHOWN_FAULTS
    if more > 0:
        line("and more", f"{len(found.damaged)} damaged, {len(found.unnamed)} not named")
    line("verdict", "damaged" if found.exit_code else "sound", "bold")


def show_status(found: "Status", console: Console) -> None:
    """A run in a few lines."""
    bar = round(BAR * found.done_share)
    task, words = safe_markup(found.task), safe_markup(found.words)
    console.print(f"[bold]{task}[/] into {safe_markup(found.output)} {words}")
    console.print(f"[cyan]{'█' * bar}[/][dim]{'░' * (BAR - bar)}[/] {found.done_share:.1%}")
    rows = [
        ("units", f"{found.units_done:,} of {found.units:,}"),
        ("rows out", f"{found.n_ok:,}"),
        ("dead letters", f"{found.n_dead:,}"),
        ("tokens", f"{found.n_tokens:,}"),
    ]
    if found.tokens_per_s is not None:
        rows.append(("speed", f"{found.tokens_per_s:,.0f} tokens/s"))
    if found.eta_seconds is not None:
        rows.append(("left", _duration(found.eta_seconds)))
    if found.n_repeated:
        rows.append(("tried again", f"{found.n_repeated:,} units that have cost an actor before"))
    if found.pid:
        rows.append(("process", f"{found.pid} on {found.host}"))
    rows.append(("published", "yes, _SUCCESS stands" if found.success else "no"))
    for name, value in rows:
        console.print(f"[bold]{name:>16}[/]  {safe_markup(value)}", highlight=False, soft_wrap=True)
