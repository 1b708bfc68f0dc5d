"""The one typed configuration of a job, checked when it is made; flags are made from it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from cyclopts import Parameter

from erniem_batch.config import PredictorConfig
from erniem_batch.errors import ConfigError
from erniem_batch.job.drift import THRESHOLD
from erniem_batch.language import require_detector
from erniem_batch.options import (
    ClassifyOptions,
    EmbedOptions,
    ExtractOptions,
    NerOptions,
    Options,
    flag_name,
)

# Columns that every job adds to those of the input, beside those of its task.
COUNTED_COLUMNS = ("n_tokens", "n_windows", "truncated")
LANGUAGE_COLUMN = "detected_language"

# Flags of the text column where it is not --text-column.
TEXT_FLAGS = {"choose": "--premise-column", "qa": "--context-column"}

# Bytes; see `JobConfig.max_row_bytes`.
MAX_ROW_BYTES = 64 << 20

# What a task reads beside the text and its language.
TASK_FIELDS = {
    "classify": ("text_pair",),
    "choose": ("choices", "question"),
    "qa": ("question",),
    "extract": ("schema",),
}


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """One run over a corpus.

    Args:
        input: Parquet or JSONL: a file, a folder or a glob, local or a URL (s3://, gs://, az://);
            repeatable. Default: sample texts that come with the package.
        output: Folder or URL for the results. A run into the folder of an earlier one goes on where
            that ended, and takes only files that are new or changed. Needed with --input.
        model: Model folder of transformers or PaddleNLP, its URL, hf://org/name of the
            Hugging Face Hub, or "demo".
        columns: Input columns to carry into the output, comma-separated. Default: all.
        limit: Stop after so many rows of the input.
        input_format: Default: by file name (.parquet; .jsonl, .ndjson or .json, also with .gz or
            .zst).
        output_format: One output file for each unit of work, in this format.
        window_tokens: Longest model input, special tokens included; longer texts are read in
            overlapping windows.
        overlap_tokens: Tokens that neighbouring windows share (the doc_stride of Hugging Face's
            fast tokenizers, not SQuAD's, which is a step).
        max_batch_tokens: Tokens in one forward pass. Default: tried at the start, then known.
        unit_bytes: Size of a unit of work in bytes of text: 30 to 120 seconds of one actor are
            good. Default: 1 MiB on CPU, 16 MiB on GPU. A Parquet row group is never divided, and
            a file once planned keeps its units.
        max_row_bytes: Largest row of the input in bytes. A longer JSONL line, or a Parquet row of
            more decoded bytes, is never held in memory and becomes a dead letter; replay with a
            larger value reads it.
        actors: Smallest and largest number of model actors, MIN:MAX. Default: what the machine or
            cluster holds; where a cluster may grow, up to 4 if that is more.
        num_gpus_per_actor: GPUs of an actor; 0 runs on CPU.
        num_cpus_per_actor: CPUs (and threads) of an actor. Default: all cores up to 4 on one
            machine, else 4; 1 with a GPU.
        dtype: Of weights and computation; float32 is exact; int8
            is for the linear layers of the encoder, on a CPU.
        address: Ray cluster to use: auto, an IP:PORT or ray://HOST:PORT. Default: inside a Ray job
            its own cluster, else a local one just for this run.
        max_dead_letters: Rows that may end as dead letters, a number or a share such as 0.1%; with
            more of them the exit code is 4 and there is no _SUCCESS.
        unit_timeout: Seconds without progress after which an actor counts as hung and is replaced.
        overwrite: Start anew although there are results with other settings; these stay valid until
            the new ones are complete.
        compare: Folder or URL of an earlier run to compare with: what was found, in which shares,
            with which scores; --output itself compares what has come since the last run that ended
            with 0 with what was there.
        fail_on_drift: End with exit code 5 and without _SUCCESS if what was found has drifted away
            from the run of --compare.
        drift_threshold: Jensen-Shannon distance of two distributions above which it has, 0 to 1.
        report_samples: Rows to show in report.html, with their text.
        log_format: Of the lines on stderr: text, or json for those who collect logs.
        detect_language: Find out the language of each text, for thresholds by language, and add it
            as a column (pip install 'erniem-batch[lang]').
        options: Of the task, and by their class which task it is.
        text_column: Column of the text (the context of qa, the premise of choose); a dot goes into
            nested ones: doc.body.
        fields: Columns of what else the task reads, by its name in Record.fields.

    Raises:
        ConfigError: a value is impossible; says what was expected and what came.
    """

    input: Annotated[list[str], Parameter(negative=())] = field(default_factory=list)
    output: str | None = None
    model: str = PredictorConfig.model
    columns: str | None = None
    limit: int | None = None
    input_format: Literal["auto", "parquet", "jsonl"] = "auto"
    output_format: Literal["parquet", "jsonl"] = "parquet"
    window_tokens: int = PredictorConfig.window_tokens
    overlap_tokens: int = PredictorConfig.overlap_tokens
    max_batch_tokens: int | None = None
    unit_bytes: int | None = None
    max_row_bytes: int = MAX_ROW_BYTES
    actors: str | None = None
    num_gpus_per_actor: float = 0.0
    num_cpus_per_actor: int | None = None
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    address: str | None = None
    max_dead_letters: str = "0"
    unit_timeout: float | None = 1800.0
    overwrite: bool = False
    compare: Annotated[str | None, Parameter(negative=())] = None
    fail_on_drift: Annotated[bool, Parameter(negative=())] = False
    drift_threshold: float = THRESHOLD
    report_samples: int = 0
    log_format: Literal["text", "json"] = "text"
    detect_language: Annotated[bool, Parameter(negative=())] = False
    options: Annotated[Options, Parameter(parse=False)] = field(default_factory=NerOptions)
    text_column: Annotated[str, Parameter(parse=False)] = "text"
    fields: Annotated[Mapping[str, str], Parameter(parse=False)] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, minimum in (
            ("limit", 1),
            ("unit_bytes", 1),
            ("max_row_bytes", 1),
            ("num_cpus_per_actor", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ConfigError(f"{flag_name(name)} must be at least {minimum}, got {value}")
        gpus = self.num_gpus_per_actor
        if not (0 <= gpus < 1 or (gpus >= 1 and float(gpus).is_integer())):
            raise ConfigError(
                f"--num-gpus-per-actor must be a whole number or a part of one GPU, got {gpus}"
            )
        if self.input and not self.output:
            raise ConfigError("--output is needed with --input: give a folder for the results")
        if not self.text_column:
            raise ConfigError(f"{self.text_flag} must name a column")
        needs_schema = isinstance(self.options, ExtractOptions) and self.options.schema is None
        if needs_schema and "schema" not in self.fields:
            raise ConfigError("--schema is needed, or --schema-column: what to extract")
        if isinstance(self.options, EmbedOptions) and self.options.pooling == "none":
            raise ConfigError("--pooling none is for pipeline('feature-extraction') alone")
        known = (*TASK_FIELDS.get(self.task, ()), "language")
        unknown = [name for name in self.fields if name not in known]
        if unknown:
            raise ConfigError(
                f"{self.task} reads no field {unknown[0]!r}; there are {', '.join(known)}"
            )
        zero_shot = isinstance(self.options, ClassifyOptions) and self.options.labels
        if zero_shot and "text_pair" in self.fields:
            raise ConfigError("--text-pair-column does not go with --candidate-labels (zero-shot)")
        if self.fail_on_drift and self.compare is None:
            raise ConfigError("--fail-on-drift needs --compare: with which run?")
        if not 0 < self.drift_threshold <= 1:
            raise ConfigError(
                f"--drift-threshold must be more than 0 and at most 1, got {self.drift_threshold}"
            )
        if self.report_samples < 0:
            raise ConfigError(f"--report-samples must be at least 0, got {self.report_samples}")
        if self.detect_language:
            require_detector()
        if self.unit_timeout is not None and self.unit_timeout <= 0:
            raise ConfigError(
                f"--unit-timeout must be more than 0 seconds, got {self.unit_timeout}"
            )
        _ = self.actor_range, self.predictor, self.allowed_dead_letters  # they check themselves
        clash = [name for name in self.carried_columns or () if name in self.added_columns]
        if clash:
            raise ConfigError(
                f"--columns {', '.join(clash)}: the job adds columns of this name; "
                f"rename them in the input or leave them out"
            )

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.options.task

    @property
    def text_flag(self) -> str:
        """The flag that names the text column."""
        return TEXT_FLAGS.get(self.task, "--text-column")

    @property
    def added_columns(self) -> tuple[str, ...]:
        """Columns that the job adds to those of the input."""
        language = (LANGUAGE_COLUMN,) if self.detect_language else ()
        return (*self.options.added_columns, *language, *COUNTED_COLUMNS)

    @property
    def is_demo(self) -> bool:
        """Whether the sample texts are the input."""
        return not self.input

    @property
    def carried_columns(self) -> list[str] | None:
        """Names of input columns to carry, each once; None: all."""
        if self.columns is None:
            return None
        names = (name.strip() for name in self.columns.split(","))
        return list(dict.fromkeys(name for name in names if name))

    @property
    def actor_range(self) -> tuple[int, int] | None:
        """Smallest and largest number of actors, if given."""
        if self.actors is None:
            return None
        match = re.fullmatch(r"(\d+)(?::(\d+))?", self.actors)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high:
            raise ConfigError(
                f"--actors must be MIN:MAX with 1 <= MIN <= MAX, or one number; got {self.actors!r}"
            )
        return low, high

    @property
    def allowed_dead_letters(self) -> tuple[int | None, float | None]:
        """Number or share of rows that may be dead letters; one of the two is None."""
        match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)%", self.max_dead_letters.strip())
        if not match or (match[2] and float(match[2]) > 100):
            raise ConfigError(
                f"--max-dead-letters must be a number of rows or a share such as 0.1%, "
                f"got {self.max_dead_letters!r}"
            )
        return (int(match[1]), None) if match[1] else (None, float(match[2]) / 100)

    @property
    def predictor(self) -> PredictorConfig:
        """What each actor loads; see `Pool.predictor`, once the CPUs of an actor are known."""
        return PredictorConfig(
            model=self.model,
            options=self.options,
            detect_language=self.detect_language,
            window_tokens=self.window_tokens,
            overlap_tokens=self.overlap_tokens,
            max_batch_tokens=self.max_batch_tokens,
            dtype=self.dtype,
            device="cuda" if self.num_gpus_per_actor else "cpu",
        )

    @property
    def bytes_per_unit(self) -> int:
        """`unit_bytes`, or its default for the device."""
        return self.unit_bytes or (16 << 20 if self.num_gpus_per_actor else 1 << 20)
