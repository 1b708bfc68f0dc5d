"""`plan`: what a run would do. Reads a sample, tries the model, writes no results.

Rows of Parquet are known from its footers; all else is estimated from pieces of units all over the
corpus, with the error that the choice of pieces brings. When everything is read, it is exact.
"""

import json
import logging
import math
import os
import random
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
from cyclopts import Parameter

from erniem_batch import storage
from erniem_batch.errors import ConfigError
from erniem_batch.job.cluster import local_pool
from erniem_batch.job.config import JobConfig
from erniem_batch.job.findings import length_bin, length_range
from erniem_batch.job.plan import plan_run, run_info
from erniem_batch.job.read import UnitReader
from erniem_batch.job.rundir import RunFolder, RunInfo, current_units
from erniem_batch.job.units import Unit, find_files, from_table
from erniem_batch.model.fetch import local_folder, model_digest
from erniem_batch.options import demo_data
from erniem_batch.predictor import Predictor
from erniem_batch.records import Encoded, Failure, Record

logger = logging.getLogger(__name__)

# A local Ray, its actors' processes, and their end.
RAY_SECONDS = 10.0
MEASURED_SECONDS = 15.0
WARM_UP_ROWS = 8
PIECES = 40  # of the sample, in as many units if there are so many
CHARACTERS = 300  # of a text that tell its script
LONG_SHARE = 0.2
UNKNOWN_SHARE = 0.02
LONG_UNIT_S, SHORT_UNIT_S = 600, 5
Z95 = 1.96


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """How a forecast is made.

    Args:
        sample_rows: Rows to read, all over the corpus.
        read_all: Read every row: then rows and tokens are exact.
        tokens_per_s: Tokens of text a second of one actor, for machines that are not this one; from
            the report of an earlier run. Default: measured here, in a quarter of a minute.
        price_per_hour: What one actor costs in an hour: a machine's price, divided by its actors.
    """

    sample_rows: int = 2000
    read_all: Annotated[bool, Parameter(negative=())] = False
    tokens_per_s: float | None = None
    price_per_hour: float | None = None

    def __post_init__(self) -> None:
        for name in ("sample_rows", "tokens_per_s", "price_per_hour"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} must be more than 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run would do.

    Attributes:
        units, units_done: to work on; done already.
        rows, tokens, windows: to work on. The errors are half 95 % intervals, as shares; 0: exact.
        distinct_share: of the windows, that are computed.
        padding_share: of the tokens computed; 0 unless the model reads padding.
        tokens_per_s: of one actor, tokens of text.
        start_seconds, seconds: until the first unit is begun; in all.
        cost: of all actors, at --price-per-hour.
        lengths: rows of the sample by tokens. scripts, languages: shares of the sample.
        dead_letters: rows of the sample without a prediction, by reason.
    """

    fingerprint: str
    files: int
    bytes: int
    units: int
    units_done: int
    rows: int
    rows_error: float
    tokens: int
    tokens_error: float
    windows: int
    distinct_share: float
    padding_share: float
    sample_rows: int
    max_batch_tokens: int
    actors: int
    cpus_per_actor: int
    gpus_per_actor: float
    tokens_per_s: float | None
    start_seconds: float
    seconds: float | None
    cost: float | None
    lengths: list[dict[str, int]]
    scripts: dict[str, float]
    languages: dict[str, float]
    dead_letters: dict[str, int]
    warnings: list[str]

    def as_line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)


@dataclass
class Sample:
    """What the rows that were read tell.

    Attributes:
        pieces: of each, rows, tokens, and bytes of its unit.
        records: with their tokens, those that can be tagged.
    """

    pieces: list[tuple[int, int, float]] = field(default_factory=list)
    records: list[tuple[Record, int]] = field(default_factory=list)
    lengths: Counter[int] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    windows: int = 0
    distinct: set[bytes] = field(default_factory=set)
    real: int = 0
    computed: int = 0
    long_texts: int = 0
    unknown_tokens: int = 0
    is_all: bool = True

    @property
    def n_rows(self) -> int:
        return sum(rows for rows, _, _ in self.pieces)

    @property
    def n_tokens(self) -> int:
        return sum(tokens for _, tokens, _ in self.pieces)


def forecast(config: JobConfig, flags: PlanFlags) -> Forecast:
    """What a run with these settings would do now.

    Raises:
        ConfigError, CheckpointError: the run would end with it.
    """
    config = replace(config, options=config.options.resolved())
    folder = RunFolder(storage.normal(config.output or "out/plan"))
    found = find_files(config.input or [str(demo_data(config.task))], config.input_format)
    model = local_folder(config.model, config.task)
    info = run_info(folder, config, found, model, model_digest(model))
    state = folder.assess(
        current_units(plan_run(folder, config, info, found, dry=True)), info, dry=True
    )
    pool = local_pool(config, os.cpu_count() or 1)
    started = time.monotonic()
    predictor = Predictor.load(
        replace(config.predictor, model=str(model), n_threads=pool.cpus, device=None)
    )
    loading = time.monotonic() - started
    try:
        sample = read_sample(config, info, state.todo, predictor, flags)
        speed = flags.tokens_per_s or measured_speed(predictor, sample)
    finally:
        predictor.close()
    actors = config.actor_range[1] if config.actor_range else pool.max_actors
    made = extrapolated(state.todo, sample)
    actors = max(1, min(actors, len(state.todo)))
    # The driver loads the model too, to find its faults before the actors do.
    start = RAY_SECONDS + 2 * loading
    seconds = None if speed is None else start + made["tokens"] / (speed * actors)
    forecast = Forecast(
        fingerprint=info.fingerprint,
        files=len(state.todo["path"].unique()),
        bytes=pc.sum(state.todo["n_bytes"]).as_py() or 0,
        units=len(state.todo),
        units_done=len(state.done),
        **made,
        windows=_scaled(sample.windows, made["rows"], sample),
        distinct_share=round(len(sample.distinct) / sample.windows, 4) if sample.windows else 1.0,
        padding_share=round(1 - sample.real / sample.computed, 4) if sample.computed else 0.0,
        sample_rows=sample.n_rows,
        max_batch_tokens=predictor.max_batch_tokens,
        actors=actors,
        cpus_per_actor=pool.cpus,
        gpus_per_actor=pool.gpus,
        tokens_per_s=None if speed is None else round(speed, 1),
        start_seconds=round(start, 1),
        seconds=None if seconds is None else round(seconds, 1),
        cost=_cost(seconds, actors, flags.price_per_hour),
        lengths=_lengths(sample.lengths),
        scripts=_shares(sample.scripts),
        languages=_shares(sample.languages),
        dead_letters=dict(sample.reasons.most_common()),
        warnings=[],
    )
    return replace(forecast, warnings=list(warnings_of(config, forecast, sample, predictor)))


def save(config: JobConfig, forecast: Forecast) -> None:
    """Beside the results to come, whose report will say how good it was."""
    if config.output is not None:
        RunFolder(storage.normal(config.output)).write_forecast(asdict(forecast))


# ---- the sample -------------------------------------------------------------------------------


def read_sample(
    config: JobConfig, info: RunInfo, todo: pa.Table, predictor: Predictor, flags: PlanFlags
) -> Sample:
    """Reads and tokenizes rows of units all over the corpus."""
    sample = Sample()
    n_units = len(todo) if flags.read_all else min(len(todo), PIECES)
    places = sorted({i * len(todo) // n_units for i in range(n_units)}) if n_units else []
    each = None if flags.read_all else max(1, math.ceil(flags.sample_rows / max(1, len(places))))
    for unit in from_table(todo.take(pa.array(places, pa.int64()))):
        read_piece(config, info, unit, each, predictor, sample)
    sample.is_all = sample.is_all and len(places) == len(todo)
    return sample


def read_piece(
    config: JobConfig,
    info: RunInfo,
    unit: Unit,
    most: int | None,
    predictor: Predictor,
    sample: Sample,
) -> None:
    """Adds rows of a unit to a sample, spread over what has to be read for them.

    Args:
        most: how many; None: all.
    """
    reader = UnitReader(
        unit,
        config.text_column,
        config.carried_columns,
        info.arrow_schema,
        fields=config.fields,
        added=config.added_columns,
        text_flag=config.text_flag,
    )
    read, before = 0, 0.0
    for chunk in reader.chunks():
        records = chunk.records()
        n_bad = sum(bad.n_rows or 1 for bad in chunk.bad)
        for bad in chunk.bad:
            sample.reasons[f"{bad.failure.stage}: {bad.failure.error}"] += bad.n_rows or 1
        share = chunk.share - before
        kept = records if most is None else _spread(records, most - read)
        if len(kept) < len(records):
            share *= len(kept) / len(records)
            sample.is_all = False
        before = chunk.share
        n_tokens = _encode(predictor, kept, sample)
        sample.pieces.append((len(kept) + n_bad, n_tokens, share * unit.n_bytes))
        read += len(kept)
        if most is not None and read >= most:
            sample.is_all = sample.is_all and chunk.share >= 1
            break


def _spread(records: Sequence[Record], most: int) -> Sequence[Record]:
    """So many records, drawn from all places: neighbours are often alike."""
    if len(records) <= most:
        return records
    places = sorted(random.Random(len(records)).sample(range(len(records)), most))
    return [records[i] for i in places]


def _encode(predictor: Predictor, records: Sequence[Record], sample: Sample) -> int:
    """Tokens of records, whose properties are noted."""
    total = 0
    unknown = predictor.tokenizer.unk_token_id
    for record, item in zip(records, predictor.encode(records), strict=True):
        if isinstance(item, Failure):
            sample.reasons[f"{item.stage}: {item.error}"] += 1
            continue
        total += item.n_tokens
        sample.records.append((record, item.n_tokens))
        sample.lengths[length_bin(item.n_tokens)] += 1
        sample.windows += len(item.windows)
        sample.distinct.update(window.ids.tobytes() for window in item.windows)
        sample.real += sum(len(window.ids) for window in item.windows)
        sample.computed += sum(map(predictor.size, item.windows))
        sample.long_texts += _is_long(item)
        sample.unknown_tokens += int((item.token_ids == unknown).sum())
        sample.scripts.update(scripts_of(record.text))
        sample.languages[record.language or ""] += 1
    return total


def _is_long(item: Encoded) -> bool:
    """Whether its text takes several windows."""
    return any(window.first > 0 for window in item.windows)


def scripts_of(text: Any) -> Iterator[str]:
    """The script of each letter at the beginning of a text, by the first word of its name."""
    for char in text[:CHARACTERS] if isinstance(text, str) else "":
        if char.isalpha():
            yield unicodedata.name(char, "OTHER").partition(" ")[0].capitalize()


# ---- from the sample to the corpus ------------------------------------------------------------


def extrapolated(todo: pa.Table, sample: Sample) -> dict[str, Any]:
    """Rows and tokens of all units, with their errors."""
    planned = pc.coalesce(todo["max_rows"], todo["n_rows"])
    n_known = pc.sum(planned).as_py() or 0
    unknown = todo.filter(pc.is_null(planned))
    if sample.is_all:
        return {
            "rows": sample.n_rows, "rows_error": 0.0, "tokens": sample.n_tokens,
            "tokens_error": 0.0,
        }  # fmt: skip
    rows_error = 0.0
    n_rows = n_known
    if len(unknown):
        n_bytes = pc.sum(unknown["n_bytes"]).as_py()
        per_byte, error = ratio([(rows, size) for rows, _, size in sample.pieces])
        n_rows += round(per_byte * n_bytes)
        rows_error = error * (n_rows - n_known) / max(1, n_rows)
    per_row, error = ratio([(tokens, rows) for rows, tokens, _ in sample.pieces])
    return {
        "rows": n_rows,
        "rows_error": round(rows_error, 4),
        "tokens": round(per_row * n_rows),
        "tokens_error": round(math.hypot(error, rows_error), 4),
    }


def ratio(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The sum of the first by the sum of the second, and half its 95 % interval as a share of it.

    Pieces, not rows, are what was drawn: rows of one piece are alike.
    """
    total, size = (sum(column) for column in zip(*pairs, strict=True)) if pairs else (0, 0)
    if not size or not total:
        return 0.0, 0.0
    mean = total / size
    n = len(pairs)
    if n < 2:
        return mean, 1.0
    spread = sum((y - mean * x) ** 2 for y, x in pairs) / (n - 1)
    return mean, Z95 * math.sqrt(spread / n) / (size / n) / mean


def measured_speed(predictor: Predictor, sample: Sample) -> float | None:
    """Tokens of text a second, from a draw of the sample as large as time allows."""
    if not sample.records:
        return None
    drawn = random.Random(7).sample(sample.records, len(sample.records))
    warm = drawn[:WARM_UP_ROWS]
    predictor.predict([record for record, _ in warm])
    _, first = _timed(predictor, warm)
    rate = max(1.0, sum(n for _, n in warm) / first)
    most, chosen = rate * MEASURED_SECONDS, []
    for item in drawn:
        chosen.append(item)
        most -= item[1]
        if most <= 0:
            break
    n_tokens, seconds = _timed(predictor, chosen)
    return n_tokens / seconds if n_tokens else None


def _timed(predictor: Predictor, items: Sequence[tuple[Record, int]]) -> tuple[int, float]:
    started = time.perf_counter()
    predictor.predict([record for record, _ in items])
    return sum(n for _, n in items), max(1e-9, time.perf_counter() - started)


def _scaled(value: int, n_rows: int, sample: Sample) -> int:
    return round(value * n_rows / sample.n_rows) if sample.n_rows else 0


def _cost(seconds: float | None, actors: int, price: float | None) -> float | None:
    return None if seconds is None or price is None else round(seconds / 3600 * actors * price, 2)


def _lengths(bins: Counter[int]) -> list[dict[str, int]]:
    found = []
    for number in range(max(bins, default=-1) + 1):
        first, last = length_range(number)
        found.append({"from": first, "to": last, "rows": bins[number]})
    return found


def _shares(counts: Counter[str], most: int = 12) -> dict[str, float]:
    total = sum(counts.values())
    return {name: round(n / total, 4) for name, n in counts.most_common(most) if name}


# ---- what to think of before the night --------------------------------------------------------


def warnings_of(
    config: JobConfig, made: Forecast, sample: Sample, predictor: Predictor
) -> Iterator[str]:
    """What may surprise, and what to do about it."""
    n_tagged, n_rows = len(sample.records), sample.n_rows
    if not made.units:
        yield "nothing is left to do: all input files have been tagged with these settings"
        return
    if made.dead_letters:
        n_dead = sum(made.dead_letters.values())
        reason = next(iter(made.dead_letters))
        yield (
            f"{n_dead / n_rows:.1%} of the rows read would become dead letters, most of them by "
            f"{reason}: look at the column {config.text_column}, or raise --max-dead-letters"
        )
    if n_tagged and sample.long_texts / n_tagged > LONG_SHARE:
        yield (
            f"{sample.long_texts / n_tagged:.0%} of the texts are longer than a window "
            f"({predictor.config.window_tokens} tokens) and are read in several"
        )
    if sample.n_tokens and sample.unknown_tokens / sample.n_tokens > UNKNOWN_SHARE:
        yield (
            f"{sample.unknown_tokens / sample.n_tokens:.1%} of the tokens are not in the "
            f"vocabulary: does it belong to this model, and the model to this language?"
        )
    names = list(predictor.model.config.labels) if config.task in ("ner", "classify") else []
    if names and all(name.startswith("LABEL_") for name in names):
        yield "the model's labels have no names (LABEL_0, …): set id2label in its config.json"
    if config.num_gpus_per_actor and predictor.device.type == "cpu":
        yield "there is no GPU here: the speed is that of a CPU; give --tokens-per-s"
    if made.units < made.actors * 2 and made.actors > 1:
        yield f"only {made.units} units for {made.actors} actors: lower --unit-bytes"
    if made.tokens_per_s:
        longest = made.tokens / made.units / made.tokens_per_s
        if longest > LONG_UNIT_S:
            minutes = f"{longest / 60:.0f} minutes"
            yield f"a unit takes {minutes}, which are lost with its actor: lower --unit-bytes"
        elif longest < SHORT_UNIT_S and made.units > 1000:
            yield f"{made.units:,} units of {longest:.1f} s: raise --unit-bytes or join small files"
