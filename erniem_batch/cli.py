"""The command line: `erniem-batch ner …`, and the same for `python pipelines/ner.py …`.

Flags, help and defaults come from the fields of JobConfig; nothing is said twice.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet as pq
from cyclopts import App, CycloptsError, Parameter
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from erniem_batch import __version__
from erniem_batch.errors import CheckpointError, ConfigError, ErnieMBatchError
from erniem_batch.job import JobConfig, RunReport, run_job
from erniem_batch.job.actor import Receipt
from erniem_batch.job.write import DEAD_LETTERS

EXIT_USAGE = 2
EXIT_INCOMPLETE = 3
SHOWN_ROWS = 6
SHOWN_CHARACTERS = 220
COLOURS = {
    "PER": "black on bright_yellow",
    "LOC": "black on bright_green",
    "ORG": "black on bright_cyan",
}
OTHER_COLOUR = "black on bright_magenta"

app = App(
    name="erniem-batch",
    help="Multilingual tagging with ErnieM, at any scale.",
    version=__version__,
    result_action="return_value",
)


@app.command
def ner(*, config: Annotated[JobConfig, Parameter(name="*")] | None = None) -> int:
    """Find named entities in Parquet or JSONL shards.

    Without flags: tags sample texts in some thirty languages with the demo model and shows what it
    found. Exit codes: 0 complete, 2 wrong usage, 3 incomplete, 4 complete but with dead letters.
    """
    job = config or JobConfig()
    configure_logging()
    console = Console()
    show = EntityView(console) if job.is_demo and job.output_format == "parquet" else None
    report = run_job(job, on_receipt=show)
    print_summary(report, Console(stderr=True))
    print(report.as_line())
    return report.exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; errors that a user can mend are one sentence, not a traceback."""
    try:
        result = app(arguments, exit_on_error=False, print_error=True)
    except CycloptsError:
        return EXIT_USAGE
    except (ConfigError, CheckpointError) as error:
        _say(error)
        return EXIT_USAGE
    except ErnieMBatchError as error:
        _say(error)
        return EXIT_INCOMPLETE
    return result if isinstance(result, int) else 0


def script(command: Callable[..., Any]) -> int:
    """`main` for a script that is one of the commands."""
    return main([command.__name__, *sys.argv[1:]])


def _say(error: Exception) -> None:
    Console(stderr=True, highlight=False).print(
        f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True
    )


def configure_logging() -> None:
    """Our own lines on stderr, with time and level."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    package = logging.getLogger("erniem_batch")
    package.handlers[:] = [handler]
    package.setLevel(logging.INFO)
    package.propagate = False


class EntityView:
    """Prints the first rows of each finished file with their entities in colour."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, receipt: Receipt) -> None:
        if receipt.error:
            return
        rows = pq.read_table(receipt.output).slice(0, SHOWN_ROWS).to_pylist()
        for row in rows:
            if row["entities"]:
                self._console.print(highlight(row["text"], row["entities"], row.get("lang", "")))


def highlight(text: str, entities: Sequence[dict[str, Any]], title: str = "") -> Text:
    """The text with its entities marked and named; long texts are cut in this view only."""
    line = Text(f"{title:>8}  ", style="dim")
    at = 0
    for entity in entities:
        if entity["end"] > SHOWN_CHARACTERS:
            break
        line.append(_flat(text[at : entity["start"]]), style="default not dim")
        style = COLOURS.get(entity["label"], OTHER_COLOUR)
        line.append(_flat(entity["text"]), style=f"not dim {style}")
        line.append(f" {entity['label']}", style="bold not dim")
        at = entity["end"]
    rest = text[at : max(at, SHOWN_CHARACTERS)]
    line.append(
        _flat(rest) + (" …" if len(text) > max(at, SHOWN_CHARACTERS) else ""),
        style="default not dim",
    )
    return line


def _flat(text: str) -> str:
    return "".join(" " if char.isspace() else char for char in text)


def print_summary(report: RunReport, console: Console) -> None:
    """The closing figures, for people."""
    rows = [
        ("rows in", f"{report.n_rows:,}"),
        ("rows out", f"{report.n_ok:,}"),
        ("dead letters", f"{report.n_dead:,}"),
        ("entities", f"{report.n_entities:,}"),
        ("tokens", f"{report.n_tokens:,}"),
        ("windows", f"{report.n_windows:,}"),
        ("padding", f"{report.padding_share:.1%}"),
        ("tokens/s", f"{report.tokens_per_s:,.0f} (with the start of the actors)"),
        ("seconds", f"{report.seconds:,.1f}"),
        ("output", report.output),
    ]
    if report.n_dead:
        rows.append(("dead letters in", str(Path(report.output) / DEAD_LETTERS)))
    for name, value in rows:
        console.print(f"[bold]{name:>16}[/]  {escape(value)}", highlight=False, soft_wrap=True)
    for receipt in report.failed_units:
        what = escape(f"{receipt.output}: {receipt.error}")
        console.print(f"[bold red]{'no output':>16}[/]  {what}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(main())
