"""The command line: `erniem-batch ner …`, and the same for `python pipelines/ner.py …`.

Flags, help and defaults come from the fields of JobConfig, of the task's options and of its
columns; nothing is said twice.
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
from cyclopts import App, CycloptsError, Parameter
from rich.console import Console
from rich.markup import escape

from erniem_batch import __version__, storage
from erniem_batch.config import DEMO
from erniem_batch.errors import CheckpointError, ConfigError, ErnieMBatchError
from erniem_batch.evaluate.cli import evaluate
from erniem_batch.job import JobConfig, RunReport, Stopped, replay_job, run_job
from erniem_batch.job.letters import DEAD_LETTERS
from erniem_batch.job.run import default_output
from erniem_batch.job.view import ResultView
from erniem_batch.options import (
    ChooseOptions,
    ClassifyOptions,
    EmbedOptions,
    ExtractOptions,
    NerOptions,
    Options,
    QaOptions,
)
from erniem_batch.serve.flags import ServeFlags
from erniem_batch.train.config import FinetuneConfig

EXIT_USAGE = 2
EXIT_INCOMPLETE = 3
EXIT_SIGTERM = 143
app = App(
    name="erniem-batch",
    help="Multilingual tagging with ErnieM, at any scale.",
    version=__version__,
    result_action="return_value",
)


EXIT_CODES = """

    Exit codes: 0 complete, 2 wrong usage or settings, 3 incomplete (run it again), 4 complete but
    more dead letters than --max-dead-letters, 143 stopped by SIGTERM (run it again).
    """

# Under which of these names a task has its text.
TEXT_COLUMNS = ("text_column", "premise_column", "context_column")

# A dataclass whose fields are flags of their own.
Flat = Parameter(name="*")
Column = Annotated[str | None, Parameter(negative=())]


@dataclass(frozen=True, kw_only=True)
class TextColumn:
    """Where the text is.

    Args:
        text_column: Column to read; a dot goes into nested ones: doc.body.
        language_column: Column with the language of the text, for thresholds by language.
    """

    text_column: str = "text"
    language_column: Column = None


@dataclass(frozen=True, kw_only=True)
class ClassifyColumns(TextColumn):
    """Where the texts are.

    Args:
        text_column: Column to read; a dot goes into nested ones: doc.body.
        text_pair_column: Column with a second text, read together with the first.
        language_column: Column with the language of the text, for thresholds by language.
    """

    text_pair_column: Column = None


@dataclass(frozen=True, kw_only=True)
class ChooseColumns:
    """Where premise and choices are.

    Args:
        premise_column: Column with the premise; a dot goes into nested ones: doc.body.
        choices_column: Column with a list of choices, any number of them in each row.
        question_column: Column with a question about the premise, such as cause or effect.
        language_column: Column with the language of the text, for thresholds by language.
    """

    premise_column: str = "premise"
    choices_column: str = "choices"
    question_column: Column = None
    language_column: Column = None


@dataclass(frozen=True, kw_only=True)
class QaColumns:
    """Where question and context are.

    Args:
        context_column: Column with the text to find answers in; a dot goes into nested ones.
        question_column: Column with the question.
        language_column: Column with the language of the text, for thresholds by language.
    """

    context_column: str = "context"
    question_column: str = "question"
    language_column: Column = None


@dataclass(frozen=True, kw_only=True)
class ExtractColumns(TextColumn):
    """Where text and schema are.

    Args:
        text_column: Column to read; a dot goes into nested ones: doc.body.
        schema_column: Column with a schema for each row, as text (JSON or YAML), list or mapping;
            where it is null, --schema counts.
        language_column: Column with the language of the text, for thresholds by language.
    """

    schema_column: Column = None


@app.command
def ner(
    *,
    columns: Annotated[TextColumn, Flat] | None = None,
    options: Annotated[NerOptions, Flat] | None = None,
    config: Annotated[JobConfig, Flat] | None = None,
) -> int:
    """Find named entities in Parquet or JSONL shards.

    Without flags: tags sample texts in some thirty languages with the demo model and shows what it
    found. Run again after an interruption, it finishes the rest; run again tomorrow, it takes what
    is new or changed.
    """
    return _run(config, options or NerOptions(), columns or TextColumn())


@app.command
def classify(
    *,
    columns: Annotated[ClassifyColumns, Flat] | None = None,
    options: Annotated[ClassifyOptions, Flat] | None = None,
    config: Annotated[JobConfig, Flat] | None = None,
) -> int:
    """Label texts or pairs of texts in Parquet or JSONL shards, or give each a number.

    Without flags: sorts sample texts by topic with the demo model. With --candidate-labels and a
    model trained for entailment: zero-shot classification.
    """
    return _run(config, options or ClassifyOptions(), columns or ClassifyColumns())


@app.command
def choose(
    *,
    columns: Annotated[ChooseColumns, Flat] | None = None,
    options: Annotated[ChooseOptions, Flat] | None = None,
    config: Annotated[JobConfig, Flat] | None = None,
) -> int:
    """Choose among several continuations of a premise in Parquet or JSONL shards.

    Without flags: sample premises with the demo model, which had little to learn this from.
    """
    return _run(config, options or ChooseOptions(), columns or ChooseColumns())


@app.command
def qa(
    *,
    columns: Annotated[QaColumns, Flat] | None = None,
    options: Annotated[QaOptions, Flat] | None = None,
    config: Annotated[JobConfig, Flat] | None = None,
) -> int:
    """Answer questions by parts of their contexts, in Parquet or JSONL shards.

    Without flags: answers sample questions with the demo model.
    """
    return _run(config, options or QaOptions(), columns or QaColumns())


@app.command
def embed(
    *,
    columns: Annotated[TextColumn, Flat] | None = None,
    options: Annotated[EmbedOptions, Flat] | None = None,
    config: Annotated[JobConfig, Flat] | None = None,
) -> int:
    """Turn texts in Parquet or JSONL shards into vectors.

    Without flags: embeds sample texts with the demo model.
    """
    return _run(config, options or EmbedOptions(), columns or TextColumn())


@app.command
def extract(
    *,
    columns: Annotated[ExtractColumns, Flat] | None = None,
    options: Annotated[ExtractOptions, Flat] | None = None,
    config: Annotated[JobConfig, Flat] | None = None,
) -> int:
    """Extract what a schema names from Parquet or JSONL shards (universal information extraction).

    Without flags: extracts persons, places and organizations from sample texts with the demo model.
    """
    return _run(config, options or ExtractOptions(), columns or ExtractColumns())


TASK_COMMANDS = (ner, classify, choose, qa, embed, extract)
for _command in TASK_COMMANDS:
    _command.__doc__ = (_command.__doc__ or "").rstrip() + EXIT_CODES


def _run(config: JobConfig | None, options: Options, columns: Any) -> int:
    """One job; shows its first results if it is the demo."""
    named = {field.name: getattr(columns, field.name) for field in dataclass_fields(columns)}
    (text_column,) = (named.pop(name) for name in TEXT_COLUMNS if name in named)
    given = {n.removesuffix("_column"): c for n, c in named.items() if c is not None}
    job = config or JobConfig()
    if job.is_demo:
        options = _demo_options(job, options)
        given |= DEMO_FIELDS.get(options.task, {})
    job = replace(job, options=options, text_column=text_column, fields=given)
    if job.is_demo and job.output is None:
        job = replace(job, output=default_output(job.task))
    configure_logging()
    show = None
    if job.is_demo and job.output_format == "parquet":
        show = ResultView(Console(), storage.normal(job.output or ""), job)
    return _finished(run_job(job, on_receipt=show))


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
    print(run_training(config).as_line())
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

    secret = None if token_env is None else os.environ.get(token_env)
    if token_env is not None and not secret:
        raise ConfigError(f"--token-env {token_env}: there is no such environment variable")
    with Client(endpoint, secret, timeout=timeout) as client:
        report = compare(output, client, n_rows=rows, tolerance=tolerance, seed=seed, model=model)
    show(report, Console(stderr=True))
    print(report.as_line())
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
