"""The command line: `erniem-batch ner …`, and the same for `python pipelines/ner.py …`.

Flags, help and defaults come from the fields of JobConfig; nothing is said twice.
"""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any

import pyarrow as pa
from cyclopts import App, CycloptsError, Parameter
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from erniem_batch import __version__, storage
from erniem_batch.errors import CheckpointError, ConfigError, ErnieMBatchError
from erniem_batch.job import JobConfig, RunReport, Stopped, replay_job, run_job
from erniem_batch.job.actor import Receipt
from erniem_batch.job.letters import DEAD_LETTERS
from erniem_batch.job.run import default_output

EXIT_USAGE = 2
EXIT_INCOMPLETE = 3
EXIT_SIGTERM = 143
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
    found. Run again after an interruption, it finishes the rest; run again tomorrow, it takes what
    is new or changed.

    Exit codes: 0 complete, 2 wrong usage or settings, 3 incomplete (run it again), 4 complete but
    more dead letters than --max-dead-letters, 143 stopped by SIGTERM (run it again).
    """
    job = config or JobConfig()
    if job.is_demo and job.output is None:
        job = replace(job, output=default_output())
    configure_logging()
    show = None
    if job.is_demo and job.output_format == "parquet":
        show = EntityView(Console(), storage.normal(job.output or ""))
    return _finished(run_job(job, on_receipt=show))


@app.command
def replay(
    output: str,
    *,
    actors: str | None = None,
    num_gpus_per_actor: float | None = None,
    num_cpus_per_actor: int | None = None,
    address: str | None = None,
    max_dead_letters: str | None = None,
    unit_timeout: float | None = None,
) -> int:
    """Work on the dead letters of a complete run once more.

    Settings are those of the run, from its folder. What succeeds goes into NAME.replay-1.parquet
    beside NAME.parquet; what does not stays in the dead letters.

    Args:
        output: Folder or URL of the run.
        actors: Smallest and largest number of model actors, MIN:MAX. Default: as in the run.
        num_gpus_per_actor: GPUs of an actor. Default: as in the run.
        num_cpus_per_actor: CPUs of an actor. Default: as in the run.
        address: Ray cluster to use. Default: as for ner.
        max_dead_letters: Rows that may remain, a number or a share. Default: as in the run.
        unit_timeout: Seconds without progress after which an actor is replaced.
    """
    given = dict(locals())
    configure_logging()
    changes = {name: value for name, value in given.items() if value is not None} | {
        "address": address
    }
    del changes["output"]
    return _finished(replay_job(output, changes))


def _finished(report: RunReport) -> int:
    print_summary(report, Console(stderr=True))
    print(report.as_line())
    return report.exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; errors that a user can mend are one sentence, not a traceback."""
    # Arrow's own pool keeps what was freed: a quarter more memory for a plan of a million units.
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        result = app(arguments, exit_on_error=False, print_error=True)
    except CycloptsError:
        return EXIT_USAGE
    except Stopped:
        Console(stderr=True).print("stopped; run the same command again to go on")
        return EXIT_SIGTERM
    except (ConfigError, CheckpointError) as error:
        _say(error)
        return EXIT_USAGE
    except ErnieMBatchError as error:
        _say(error)
        return EXIT_INCOMPLETE
    return result if isinstance(result, int) else 0


def program() -> int:
    """`main` for `erniem-batch`."""
    return _leave(main())


def script(command: Callable[..., Any]) -> int:
    """`main` for a script that is one of the commands."""
    return _leave(main([command.__name__, *sys.argv[1:]]))


def _leave(code: int) -> int:
    """After SIGTERM at once: Ray and torch need seconds to be taken down in good order."""
    if code == EXIT_SIGTERM:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


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

    def __init__(self, console: Console, output: str) -> None:
        self._console = console
        self._output = output

    def __call__(self, receipt: Receipt) -> None:
        if receipt.error:
            return
        table = storage.read_table(storage.join(self._output, receipt.output))
        rows = table.slice(0, SHOWN_ROWS).to_pylist()
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
        (
            "units",
            f"{report.n_units - report.n_missing:,} done, {report.n_units_now:,} by this run",
        ),
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
    if not report.n_units_now:
        rows = [row for row in rows if row[0] not in ("padding", "tokens/s")]
    if report.n_dead:
        rows.append(("dead letters in", storage.join(report.output, DEAD_LETTERS)))
    if report.n_removed_inputs:
        rows.append(("inputs gone", f"{report.n_removed_inputs:,} (their results stay)"))
    for name, value in rows:
        console.print(f"[bold]{name:>16}[/]  {escape(value)}", highlight=False, soft_wrap=True)
    for receipt in report.failed_units:
        what = escape(f"{receipt.output}: {receipt.error}")
        console.print(f"[bold red]{'no output':>16}[/]  {what}", highlight=False, soft_wrap=True)
    if report.n_missing:
        console.print(
            f"[bold red]{'incomplete':>16}[/]  run the same command again", soft_wrap=True
        )


if __name__ == "__main__":
    raise SystemExit(program())
