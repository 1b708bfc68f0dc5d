"""The command `erniem-batch evaluate`."""

from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from erniem_batch.evaluate.config import EvaluateConfig
from erniem_batch.terminal import printable_json

LOG_WIDTH = 160


def evaluate(*, config: Annotated[EvaluateConfig, Parameter(name="*")] | None = None) -> int:
    """Say how good a batch run or a model is, by annotated rows (pip install 'erniem-batch[eval]').

    Figures with 95 % intervals, overall, by language and by label. Gold rows have, beside the
    columns that the task reads: for ner spans [[start, end, label], ...] (or tokens and tags);
    classify label; choose label (an index); qa answers [{text, start}, ...]; extract spans and
    relations [[subject, name, object], ...], or PaddleNLP's content, prompt, result_list; and in
    all of them id and lang.

    Exit codes: 0 done, 2 wrong usage or settings, 3 storage failed, 6 a figure is lower than
    --fail-below.
    """
    # Later than at the top: `--help` should not wait for them.
    from erniem_batch.cli import configure_logging
    from erniem_batch.evaluate.report import show
    from erniem_batch.evaluate.run import evaluate as run

    configure_logging()
    outcome = run(config or EvaluateConfig())
    console = Console(stderr=True)
    if not console.is_terminal:  # a log has room for whole tables
        console.width = max(console.width, LOG_WIDTH)
    show(outcome, console)
    print(printable_json(outcome.as_line()))
    return outcome.exit_code
