"""The command line: `erniem-batch ner …`, and the same for `python pipelines/ner.py …`.

Flags, help and defaults come from the fields of JobConfig, of the task's options and of its
columns; nothing is said twice.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import pyarrow as pa
from cyclopts import App, CycloptsError, Parameter
from rich.console import Console

from erniem_batch import __version__, stopping, storage
from erniem_batch.columns import (
    COLUMNS,
    ChooseColumns,
    ClassifyColumns,
    Columns,
    ExtractColumns,
    QaColumns,
    TextColumn,
    columns_of,
)
from erniem_batch.config import DEMO
from erniem_batch.errors import CheckpointError, ConfigError, ErnieMBatchError
from erniem_batch.evaluate.cli import evaluate
from erniem_batch.job import JobConfig, RunReport, Stopped, replay_job, run_job
from erniem_batch.job.file import apply_job_file, as_yaml, json_schema
from erniem_batch.job.forecast import PlanFlags
from erniem_batch.job.letters import DEAD_LETTERS
from erniem_batch.job.run import default_output
from erniem_batch.job.view import ResultView
from erniem_batch.options import (
    OPTIONS,
    TASKS,
    ChooseOptions,
    ClassifyOptions,
    EmbedOptions,
    ExtractOptions,
    NerOptions,
    Options,
    QaOptions,
)
from erniem_batch.serve.flags import ServeFlags
from erniem_batch.terminal import PrintableFormatter, printable_json, safe_markup
from erniem_batch.train.config import FinetuneConfig

EXIT_USAGE = 2
EXIT_INCOMPLETE = 3
app = App(
    name="erniem-batch",
    help="Multilingual tagging with ErnieM, at any scale.",
    version=__version__,
    result_action="return_value",
    config=(apply_job_file,),
)


EXIT_CODES = """

    Exit codes: 0 complete, 2 wrong usage or settings, 3 incomplete (run it again), 4 complete but
    more dead letters than --max-dead-letters, 5 complete but drifted (--fail-on-drift), 130 stopped
    by Ctrl-C, 143 by SIGTERM (run it again).
    """

# A dataclass whose fields are flags of their own.
Flat = Parameter(name="*")


@dataclass(frozen=True, kw_only=True)
class JobFile:
    """Where a job is written down.

    Args:
        config: YAML file with any of these flags, by their names without --; flags given here come
            first. ${NAME} stands for an environment variable. What may stand in it:
            erniem-batch config-schema TASK.
        print_config: Print the whole configuration as such a file, and do nothing else.
    """

    config: Annotated[str | None, Parameter(negative=())] = None
    print_config: Annotated[bool, Parameter(negative=())] = False


@app.command
def ner(
    *,
    columns: Annotated[TextColumn, Flat] | None = None,
    options: Annotated[NerOptions, Flat] | None = None,
    config: Annotated[JobConfig, Flat] | None = None,
    file: Annotated[JobFile, Flat] | None = None,
) -> int:
    """Find named entities in Parquet or JSONL shards.

    Without flags: tags sample texts in some thirty languages with the demo model and shows what it
    found. Run again after an interruption, it finishes the rest; run again tomorrow, it takes what
    is new or changed.
    """
    return _run(job_of(config, options or NerOptions(), columns or TextColumn()), file)


@app.command
def classify(
    *,
    columns: Annotated[ClassifyColumns, Flat] | None = None,
    options: Annotated[ClassifyOptions, Flat] | None = None,
    config: Annotated[JobConfig, Flat] | None = None,
    file: Annotated[JobFile, Flat] | None = None,
) -> int:
    """Label texts or pairs of texts in Parquet or JSONL shards, or give each a number.

    Without flags: sorts sample texts by topic with the demo model. With --candidate-labels and a
    model trained for entailment: zero-shot classification.
    """
    return _run(job_of(config, options or ClassifyOptions(), columns or ClassifyColumns()), file)


@app.command
def choose(
    *,
    columns: Annotated[ChooseColumns, Flat] | None = None,
    options: Annotated[ChooseOptions, Flat] | None = None,
    config: Annotated[JobConfig, Flat] | None = None,
    file: Annotated[JobFile, Flat] | None = None,
) -> int:
    """Choose among several continuations of a premise in Parquet or JSONL shards.

    Without flags: sample premises with the demo model, which had little to learn this from.
    """
    return _run(job_of(config, options or ChooseOptions(), columns or ChooseColumns()), file)


@app.command
def qa(
    *,
    columns: Annotated[QaColumns, Flat] | None = None,
    options: Annotated[QaOptions, Flat] | None = None,
    config: Annotated[JobConfig, Flat] | None = None,
    file: Annotated[JobFile, Flat] | None = None,
) -> int:
    """Answer questions by parts of their contexts, in Parquet or JSONL shards.

    Without flags: answers sample questions with the demo model.
    """
    return _run(job_of(config, options or QaOptions(), columns or QaColumns()), file)


@app.command
def embed(
    *,
    columns: Annotated[TextColumn, Flat] | None = None,
    options: Annotated[EmbedOptions, Flat] | None = None,
    config: Annotated[JobConfig, Flat] | None = None,
    file: Annotated[JobFile, Flat] | None = None,
) -> int:
    """Turn texts in Parquet or JSONL shards into vectors.

    Without flags: embeds sample texts with the demo model.
    """
    return _run(job_of(config, options or EmbedOptions(), columns or TextColumn()), file)


@app.command
def extract(
    *,
    columns: Annotated[ExtractColumns, Flat] | None = None,
    options: Annotated[ExtractOptions, Flat] | None = None,
    config: Annotated[JobConfig, Flat] | None = None,
    file: Annotated[JobFile, Flat] | None = None,
) -> int:
    """Extract what a schema names from Parquet or JSONL shards (universal information extraction).

    Without flags: extracts persons, places and organizations from sample texts with the demo model.
    """
    return _run(job_of(config, options or ExtractOptions(), columns or ExtractColumns()), file)


TASK_COMMANDS = (ner, classify, choose, qa, embed, extract)
for _command in TASK_COMMANDS:
    _command.__doc__ = (_command.__doc__ or "").rstrip() + EXIT_CODES


def _run(job: JobConfig, file: JobFile | None) -> int:
    """One job; shows its first results if it is the demo."""
    if _printed(job, file):
        return 0
    if job.is_demo and job.output is None:
        job = replace(job, output=default_output(job.task))
    configure_logging(job.log_format)
    show = None
    if job.is_demo and job.output_format == "parquet":
        show = ResultView(Console(), storage.normal(job.output or ""), job)
    return _finished(run_job(job, on_receipt=show), with_table=job.log_format == "text")


def _printed(job: JobConfig, file: JobFile | None) -> bool:
    """Whether the configuration was all that was wanted."""
    if file is None or not file.print_config:
        return False
    print(as_yaml(job), end="")
    return True


def job_of(config: JobConfig | None, options: Options, columns: Columns) -> JobConfig:
    """The configuration of a job, from the three parts that are flags."""
    job = config or JobConfig()
    text_column, given = columns_of(columns)
    if job.is_demo:
        options = _demo_options(job, options)
        given = {**given, **DEMO_FIELDS.get(options.task, {})}
    return replace(job, options=options, text_column=text_column, fields=given)


# Columns of the sample data that a task does not read unless told.
DEMO_FIELDS = {"choose": {"question": "question"}}


def _demo_options(job: JobConfig, options: Options) -> Options:
    """What the demo needs and nobody said."""
    if isinstance(options, ExtractOptions) and options.schema is None:
        schema = "Person, Location, Organization"
        return replace(options, schema=schema, schema_lang="en")
    zero_shot = isinstance(options, ClassifyOptions) and options.candidate_labels is not None
    if zero_shot and job.model == DEMO:
        raise ConfigError(
            "there is no demo model for zero-shot classification, since no data at hand teaches "
            "it: give a model trained for entailment with --model"
        )
    return options


@app.command
def status(output: str, *, watch: float | None = None) -> int:
    """Tell how far a run is, from its folder alone: running, stopped, ended or dead.

    On stdout one line of JSON. Works on object storage too, from any machine. Where only the run's
    own sign of life can tell, it waits for it up to a quarter of a minute.

    Args:
        output: Folder or URL of the run.
        watch: Look again every so many seconds, until the run is no longer running.
    """
    from erniem_batch.job.status import RUNNING
    from erniem_batch.job.status import status as status_of
    from erniem_batch.job.view import show_status

    configure_logging()
    while True:
        found = status_of(output)
        show_status(found, Console(stderr=True))
        print(printable_json(found.as_line()), flush=True)
        if watch is None or found.state != RUNNING:
            return 0
        time.sleep(watch)


@app.command
def verify(output: str) -> int:
    """Read all results of a folder and say what is damaged, and how to repair it.

    Compares sizes, checksums, numbers of rows, columns, offsets and dead letters with the manifest,
    and names files that are missing or that no manifest names. Works on object storage too, and on
    the output of compact. On stdout one line of JSON.

    Exit codes: 0 sound, 1 damaged, 2 no folder of a completed run, 3 storage failed.

    Args:
        output: Folder or URL of the run.
    """
    from erniem_batch.job.verify import verify as verify_folder
    from erniem_batch.job.view import show_verification

    configure_logging()
    found = verify_folder(output)
    show_verification(found, Console(stderr=True))
    print(printable_json(found.as_line()))
    return found.exit_code


@app.command
def compact(
    output: str,
    *,
    to: Annotated[str | None, Parameter(negative=())] = None,
    partition_by: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = (),
    target_mb: int = 256,
) -> int:
    """Write the results of a complete run once more, as few large files, in Hive's layout.

    Into folders like lang=de/, for DuckDB, Spark, Athena and the like. The new files count all at
    once, when the manifest names them; those of an earlier compaction go after that. On stdout one
    line of JSON.

    Args:
        output: Folder or URL of the run.
        to: Folder or URL of the second dataset. Default: that of the run, with -compact behind it.
        partition_by: Columns that become folders, outermost first; with few values. Default: none.
        target_mb: Size of a file; smaller ones only where there is no more for them.
    """
    from erniem_batch.job.compact import compact as compact_run

    configure_logging()
    report = compact_run(output, to, partition_by, target_mb)
    print(printable_json(report.as_line()))
    return 0


# ---- plan --------------------------------------------------------------------------------------

plan_app = App(
    name="plan",
    help="Tell what a run would take, before it runs: the flags are those of the task.",
    result_action="return_value",
)
app.command(plan_app)


def _plan_command(task: str) -> Callable[..., int]:
    """`plan TASK`, with the flags of TASK."""
    columns_class, options_class = COLUMNS[task], OPTIONS[task]

    def plan(
        *,
        flags: Annotated[PlanFlags, Flat] | None = None,
        columns: Annotated[columns_class, Flat] | None = None,  # type: ignore[valid-type]
        options: Annotated[options_class, Flat] | None = None,  # type: ignore[valid-type]
        config: Annotated[JobConfig, Flat] | None = None,
        file: Annotated[JobFile, Flat] | None = None,
    ) -> int:
        from erniem_batch.job.forecast import forecast, save
        from erniem_batch.job.view import show_forecast

        job = job_of(config, options or options_class(), columns or columns_class())
        if _printed(job, file):
            return 0
        configure_logging(job.log_format)
        made = forecast(job, flags or PlanFlags())
        save(job, made)
        show_forecast(made, Console(stderr=True))
        print(printable_json(made.as_line()))
        return 0

    plan.__doc__ = f"""Tell what `erniem-batch {task}` would do with the same flags.

    Does nothing of it: reads some rows, tries the model, and prints rows, tokens, lengths, scripts,
    units, time and cost, with warnings; on stdout as one line of JSON. With --output, what is done
    there already does not count, and the report of the run will say how good the forecast was.
    """
    return plan


for _task in TASKS:
    plan_app.command(_plan_command(_task), name=_task)


@app.command
def completion(shell: Literal["bash", "zsh", "fish"]) -> int:
    """Print a script that completes commands and flags in a shell.

    For bash: source <(erniem-batch completion bash); for good, put that into ~/.bashrc.

    Args:
        shell: Which one.
    """
    print(app.generate_completion(shell=shell))
    return 0


@app.command
def config_schema(task: str) -> int:
    """Print the JSON schema of the files that --config of a task takes.

    Args:
        task: ner, classify, choose, qa, embed or extract.
    """
    print(json.dumps(json_schema(task), indent=1, ensure_ascii=False))
    return 0


@app.command
def convert(
    source: Path,
    target: Path,
    *,
    layout: Literal["hf", "paddle"] | None = None,
    head: str | None = None,
    mask_mode: Literal["pad", "paddle", "paddle_padded"] | None = None,
    storage: Literal["int8"] | None = None,
) -> int:
    """Convert a model folder between the layouts of transformers and PaddleNLP.

    The new folder is checked before it appears: both give the same outputs and the same tokens.
    With --storage int8, max_difference tells how far the rounding changes outputs.

    Args:
        source: Model folder.
        target: New folder.
        layout: Of the new folder. Default: the other one than that of the source.
        head: Class of the model, such as ErnieMForTokenClassification, where it cannot be told.
        mask_mode: Which tokens are hidden, see the README. Default: as in the source.
        storage: int8 halves the size of float16, for download; only erniem-batch reads it. Implies
            --layout hf. Default: floats, also of an int8 source.
    """
    from erniem_batch.model.convert import convert as convert_folder

    report = convert_folder(
        source, target, layout=layout, head=head, mask_mode=mask_mode, storage=storage
    )
    print(json.dumps(asdict(report), default=str))
    return 0


@app.command
def finetune(config: Annotated[FinetuneConfig, Flat]) -> int:
    """Train a model on annotated rows: one task, or several that share an encoder.

    Ray Train runs it, on one process of this machine or on many of a cluster. Run again after an
    interruption, it goes on from the last checkpoint. Beside the model: training_results.json
    and curve.png with losses and scores.
    """
    from erniem_batch.train.run import finetune as run_training

    configure_logging()
    print(printable_json(run_training(config).as_line()))
    return 0


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
    max_row_bytes: int | None = None,
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
        max_row_bytes: Largest row of the input in bytes. Default: as in the run.
    """
    given = dict(locals())
    configure_logging()
    changes = {name: value for name, value in given.items() if value is not None} | {
        "address": address
    }
    del changes["output"]
    return _finished(replay_job(output, changes))


app.command(evaluate)


@app.command
def serve(flags: Annotated[ServeFlags, Flat] | None = None) -> int:
    """Serve a model over HTTP, with a page to try it: the same answers as the batch runs.

    Without flags: the demo model with all its tasks, on http://127.0.0.1:8000/, for this machine
    only. On a cluster, and to change models without a pause: deploy/serve.yaml.
    """
    from erniem_batch.serve.run import serve as run_service

    configure_logging()
    run_service(flags or ServeFlags())
    return 0


@app.command
def parity(
    output: str,
    *,
    endpoint: str,
    rows: int = 200,
    tolerance: float | None = None,
    seed: int = 7,
    model: str | None = None,
    token_env: str | None = None,
    timeout: float = 60.0,
) -> int:
    """Ask a service for rows of a batch output, and demand equal answers.

    With the options of the run, and those of its dead letters that can be sent, which the service
    must refuse too. On stdout one line of JSON with figures; ids and places only, never text.

    Exit codes: 0 equal, 1 different (or another model), 2 wrong usage or settings, 3 the service
    cannot be reached.

    Args:
        output: Folder or URL of a finished run, which carries what it has read.
        endpoint: Address of the service, such as http://127.0.0.1:8000.
        rows: How many to ask for, drawn from all files.
        tolerance: Largest difference between numbers that counts as none. Default: 1e-5, or 2e-2
            for a run in half precision.
        seed: Of the drawing.
        model: Which model of the service to ask. Default: its first for the task.
        token_env: Environment variable with the bearer token.
        timeout: Seconds for one request.
    """
    from erniem_batch.client import Client
    from erniem_batch.serve.parity import compare, show

    configure_logging()
    secret = None if token_env is None else os.environ.get(token_env)
    if token_env is not None and not secret:
        raise ConfigError(f"--token-env {token_env}: there is no such environment variable")
    with Client(endpoint, secret, timeout=timeout) as client:
        report = compare(output, client, n_rows=rows, tolerance=tolerance, seed=seed, model=model)
    show(report, Console(stderr=True))
    print(printable_json(report.as_line()))
    return report.exit_code


@app.command
def token() -> int:
    """Make a bearer token for `erniem-batch serve --tokens-file`.

    The token goes to who will ask, its hash as a line into the file; only the hash is needed again.
    """
    from erniem_batch.serve.tokens import new_token

    made, digest = new_token()
    print(json.dumps({"token": made, "sha256": digest}))
    return 0


def _finished(report: RunReport, with_table: bool = True) -> int:
    if with_table:
        print_summary(report, Console(stderr=True))
    print(printable_json(report.as_line()))
    return report.exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; errors that a user can mend are one sentence, not a traceback."""
    # Arrow's own pool keeps what was freed: a quarter more memory for a plan of a million units.
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        with stopping.orderly():
            return _main(arguments)
    except Stopped as stopped:
        stopping.say()
        return stopped.exit_code
    except BaseException:
        if not stopping.is_asked():
            raise
        stopping.say()  # what a library made of the signal is of no interest
        return stopping.exit_code()


def _main(arguments: Sequence[str] | None) -> int:
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


def program() -> int:
    """`main` for `erniem-batch`; `entry.program` hears signals earlier."""
    stopping.install()
    return leave(main())


def leave(code: int) -> int:
    """After a signal at once: Ray and torch need seconds to be taken down in good order."""
    if code in stopping.EXIT_CODES:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _say(error: Exception) -> None:
    Console(stderr=True, highlight=False).print(
        f"[bold red]error:[/] {safe_markup(str(error))}", soft_wrap=True
    )


class _JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return printable_json(json.dumps(line, ensure_ascii=False))


def configure_logging(log_format: str = "text") -> None:
    """Our own lines on stderr, with time and level.

    Args:
        log_format: text or json.
    """
    handler = logging.StreamHandler()
    text = PrintableFormatter("%(asctime)s %(levelname)s %(name)s %(message)s")
    handler.setFormatter(_JsonLines() if log_format == "json" else text)
    package = logging.getLogger("erniem_batch")
    package.handlers[:] = [handler]
    package.setLevel(logging.INFO)
    package.propagate = False


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
        (report.noun, f"{report.n_found:,}"),
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
        rows.append(("most of them", report.most_dead))
    if report.n_removed_inputs:
        rows.append(("inputs gone", f"{report.n_removed_inputs:,} (their results stay)"))
    for name, value in rows:
        console.print(f"[bold]{name:>16}[/]  {safe_markup(value)}", highlight=False, soft_wrap=True)
    for receipt in report.failed_units:
        what = safe_markup(f"{receipt.output}: {receipt.error}")
        console.print(f"[bold red]{'no output':>16}[/]  {what}", highlight=False, soft_wrap=True)
    for what in report.drifted:
        console.print(f"[bold red]{'drifted':>16}[/]  {safe_markup(what)}", soft_wrap=True)
    if (why := report.unpublished) is not None:
        name = "incomplete" if report.n_missing else "not published"
        console.print(f"[bold red]{name:>16}[/]  {safe_markup(why)}", soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(program())
