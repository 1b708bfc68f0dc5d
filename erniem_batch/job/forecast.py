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
from erniem_batch.job.apart import require_apart
from erniem_batch.job.chunks import BadRow
from erniem_batch.job.cluster import local_pool
from erniem_batch.job.config import JobConfig
from erniem_batch.job.findings import length_bin, length_range
from erniem_batch.job.plan import plan_run, run_info
from erniem_batch.job.read import UnitReader
from erniem_batch.job.rundir import RunFolder, RunInfo, current_units
from erniem_batch.job.sizes import grouped, too_long
from erniem_batch.job.stream import bundles
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
MOST_RECORDS = 10_000  # that the speed is measured with
MOST_HASHED = 1_000_000  # windows that are counted once if they are equal
CHARACTERS = 300  # of a text that tell its script
LONG_SHARE = 0.2
UNKNOWN_SHARE = 0.02
LONG_UNIT_S, SHORT_UNIT_S = 600, 5
WORK_S = 60  # of one actor; less is not worth dividing
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
        sample_rows: that were read.
        lengths: rows by tokens, of the units that rows were read of. scripts, languages: shares of
            their letters and rows.
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
        n_rows, n_tokens, windows, reasons, …: what was read.
        pieces: of each unit that rows were read of, what they say of all of it: rows, tokens,
            windows, and its bytes.
        tagged: rows that can be tagged, each as many as it stands for in its unit.
        lengths, scripts, languages, long_texts: in these numbers too.
        records: some of these rows, with their tokens, and how many each stands for.
        distinct: hashes of the first `n_hashed` windows.
    """

    n_rows: int = 0
    n_tokens: int = 0
    pieces: list[tuple[float, float, float, int]] = field(default_factory=list)
    n_tagged: int = 0
    tagged: float = 0
    records: list[tuple[Record, int, float]] = field(default_factory=list)
    lengths: Counter[int] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    windows: int = 0
    n_hashed: int = 0
    distinct: set[int] = field(default_factory=set)
    real: int = 0
    computed: int = 0
    long_texts: float = 0
    unknown_tokens: int = 0
    is_all: bool = True


def forecast(config: JobConfig, flags: PlanFlags) -> Forecast:
    """What a run with these settings would do now.

    Raises:
        ConfigError, CheckpointError: the run would end with it.
    """
    config = replace(config, options=config.options.resolved())
    folder = RunFolder(storage.normal(config.output or "out/plan"))
    inputs = config.input or [str(demo_data(config.task))]
    if config.output is not None:
        require_apart(inputs, folder.output)
    found = find_files(inputs, config.input_format)
    model = local_folder(config.model, config.task)
    info = run_info(folder, config, found, model, model_digest(model))
    state = folder.assess(
        current_units(plan_run(folder, config, info, found, None)), info, dry=True
    )
    pool = local_pool(config, os.cpu_count() or 1)
    started = time.monotonic()
    device = None if config.num_gpus_per_actor else "cpu"  # a GPU that is here, or the CPU
    predictor = Predictor.load(replace(pool.predictor(config), model=str(model), device=device))
    loading = time.monotonic() - started
    try:
        sample = read_sample(config, info, state.todo, predictor, flags)
        speed = flags.tokens_per_s or measured_speed(predictor, sample)
    finally:
        predictor.close()
    wanted = config.actor_range[1] if config.actor_range else pool.max_actors
    made = extrapolated(state.todo, sample)
    # Small units travel together, and one actor does them all.
    actors = max(1, min(wanted, len(bundles(state.todo, config.bytes_per_unit))))
    # The driver loads the model too, to find its faults before the actors do.
    start = RAY_SECONDS + 2 * loading if len(state.todo) else 0.0
    seconds = None if speed is None else start + made["tokens"] / (speed * actors)
    forecast = Forecast(
        fingerprint=info.fingerprint,
        files=len(state.todo["path"].unique()),
        bytes=pc.sum(state.todo["n_bytes"]).as_py() or 0,
        units=len(state.todo),
        units_done=len(state.done),
        **made,
        distinct_share=round(len(sample.distinct) / sample.n_hashed, 4) if sample.n_hashed else 1.0,
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
    return replace(
        forecast, warnings=list(warnings_of(config, forecast, sample, predictor, wanted))
    )


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
    reader = UnitReader.of_job(config, unit, info.arrow_schema)
    read, before = 0, 0.0
    items: list[tuple[Record, Encoded]] = []
    share, n_rows, n_tokens, n_windows, is_all = 0.0, 0, 0, 0, True
    for chunk in reader.chunks():
        rows: list[Record | BadRow] = [*chunk.records(), *chunk.bad]
        kept = rows if most is None else _spread(rows, most - read)
        share += (chunk.share - before) * (len(kept) / len(rows) if rows else 1)
        is_all = is_all and len(kept) == len(rows)
        before = chunk.share
        for bad in (row for row in kept if isinstance(row, BadRow)):
            sample.reasons[f"{bad.failure.stage}: {bad.failure.error}"] += bad.n_rows or 1
            n_rows += bad.n_rows or 1
        records = [row for row in kept if isinstance(row, Record)]
        n_rows += len(records)
        for record, item in _encoded(predictor, records, config.max_row_bytes):
            if isinstance(item, Failure):
                sample.reasons[f"{item.stage}: {item.error}"] += 1
            else:
                items.append((record, item))
        if most is None:  # each stands for itself, and there may be many
            tokens, windows = _note(predictor, items, 1.0, sample)
            n_tokens, n_windows, items = n_tokens + tokens, n_windows + windows, []
        read += len(kept)
        if most is not None and read >= most:
            is_all = is_all and chunk.share >= 1
            break
    sample.is_all = sample.is_all and is_all
    known = unit.n_rows if unit.max_rows is None else unit.max_rows
    if is_all:
        weight = 1.0
    elif known is not None and n_rows:
        weight = known / n_rows
    else:
        weight = 1 / share if share else 1.0
    tokens, windows = _note(predictor, items, weight, sample)
    n_tokens, n_windows = n_tokens + tokens, n_windows + windows
    sample.n_rows += n_rows
    sample.pieces.append((weight * n_rows, weight * n_tokens, weight * n_windows, unit.n_bytes))


def _encoded(
    predictor: Predictor, records: Sequence[Record], max_row_bytes: int
) -> Iterator[tuple[Record, Encoded | Failure]]:
    """Records with their tokens, or why they are not read."""
    for group in grouped(records):
        failure = too_long(group[0], max_row_bytes)
        if failure is not None:  # then it is alone
            yield group[0], failure
        else:
            yield from zip(group, predictor.encode(group), strict=True)


def _spread(rows: Sequence[Record | BadRow], most: int) -> Sequence[Record | BadRow]:
    """So many rows, drawn from all places: neighbours are often alike."""
    if len(rows) <= most:
        return rows
    places = sorted(random.Random(len(rows)).sample(range(len(rows)), most))
    return [rows[i] for i in places]


def _note(
    predictor: Predictor, items: Sequence[tuple[Record, Encoded]], weight: float, sample: Sample
) -> tuple[int, int]:
    """Adds the properties of records, each of which stands for some; gives tokens and windows."""
    n_tokens = n_windows = 0
    unknown = predictor.tokenizer.unk_token_id
    for record, item in items:
        n_tokens += item.n_tokens
        n_windows += len(item.windows)
        sample.tagged += weight
        _keep(sample, (record, item.n_tokens, weight))
        if sample.n_hashed < MOST_HASHED:
            sample.n_hashed += len(item.windows)
            sample.distinct.update(hash(window.ids.tobytes()) for window in item.windows)
        sample.real += sum(len(window.ids) for window in item.windows)
        sample.computed += sum(map(predictor.size, item.windows))
        sample.unknown_tokens += int((item.token_ids == unknown).sum())
        sample.long_texts += weight * _is_long(item)
        sample.lengths[length_bin(item.n_tokens)] += weight  # type: ignore[assignment]
        sample.languages[record.language or ""] += weight  # type: ignore[assignment]
        for script in scripts_of(record.text):
            sample.scripts[script] += weight  # type: ignore[assignment]
    sample.n_tokens += n_tokens
    sample.windows += n_windows
    return n_tokens, n_windows


def _keep(sample: Sample, record: tuple[Record, int, float]) -> None:
    """Of all records some, each with the same chance: they are texts, and may be a whole corpus."""
    sample.n_tagged += 1
    if len(sample.records) < MOST_RECORDS:
        sample.records.append(record)
        return
    place = random.Random(sample.n_tagged).randrange(sample.n_tagged)
    if place < MOST_RECORDS:
        sample.records[place] = record


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
            "tokens_error": 0.0, "windows": sample.windows,
        }  # fmt: skip
    rows_error = 0.0
    n_rows = n_known
    if len(unknown):
        n_bytes = pc.sum(unknown["n_bytes"]).as_py()
        per_byte, error = ratio([(rows, size) for rows, _, _, size in sample.pieces])
        n_rows += round(per_byte * n_bytes)
        rows_error = error * (n_rows - n_known) / max(1, n_rows)
    per_row, error = ratio([(tokens, rows) for rows, tokens, _, _ in sample.pieces])
    windows_per_row, _ = ratio([(windows, rows) for rows, _, windows, _ in sample.pieces])
    return {
        "rows": n_rows,
        "rows_error": round(rows_error, 4),
        "tokens": round(per_row * n_rows),
        "tokens_error": round(math.hypot(error, rows_error), 4),
        "windows": round(windows_per_row * n_rows),
    }


def ratio(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The sum of the first by the sum of the second, and half its 95 % interval as a share of it.

    Units, not rows, are what was drawn: rows of one unit are alike.
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
    draw = random.Random(7).random
    # In this order, each as likely as there are rows that it stands for.
    drawn = sorted(sample.records, key=lambda item: draw() ** (1 / item[2]), reverse=True)
    warm = drawn[:WARM_UP_ROWS]
    _timed(predictor, warm)
    n_tokens, first = _timed(predictor, warm)
    rate = max(1.0, n_tokens / first)
    most, chosen = rate * MEASURED_SECONDS, []
    for item in drawn:
        chosen.append(item)
        most -= item[1]
        if most <= 0:
            break
    n_tokens, seconds = _timed(predictor, chosen)
    return n_tokens / seconds if n_tokens else None


def _timed(predictor: Predictor, items: Sequence[tuple[Record, int, float]]) -> tuple[int, float]:
    started = time.perf_counter()
    predictor.predict([record for record, _, _ in items])
    return sum(n for _, n, _ in items), max(1e-9, time.perf_counter() - started)


def _cost(seconds: float | None, actors: int, price: float | None) -> float | None:
    return None if seconds is None or price is None else round(seconds / 3600 * actors * price, 2)


def _lengths(bins: Counter[int]) -> list[dict[str, int]]:
    found = []
    for number in range(max(bins, default=-1) + 1):
        first, last = length_range(number)
        found.append({"from": first, "to": last, "rows": round(bins[number])})
    return found


def _shares(counts: Counter[str], most: int = 12) -> dict[str, float]:
    total = sum(counts.values())
    return {name: round(n / total, 4) for name, n in counts.most_common(most) if name}


# ---- what to think of before the night --------------------------------------------------------


def warnings_of(
    config: JobConfig, made: Forecast, sample: Sample, predictor: Predictor, wanted: int
) -> Iterator[str]:
    """What may surprise, and what to do about it.

    Args:
        wanted: actors, if there is enough work for them.
    """
    n_rows = sample.n_rows
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
    if sample.tagged and sample.long_texts / sample.tagged > LONG_SHARE:
        yield (
            f"{sample.long_texts / sample.tagged:.0%} of the texts are longer than a window "
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
    if made.tokens_per_s:
        if made.units < 2 * wanted and wanted > 1 and made.tokens / made.tokens_per_s > WORK_S:
            yield f"only {made.units} units for {wanted} actors: lower --unit-bytes"
        longest = made.tokens / made.units / made.tokens_per_s
        if longest > LONG_UNIT_S:
            minutes = f"{longest / 60:.0f} minutes"
            yield f"a unit takes {minutes}, which are lost with its actor: lower --unit-bytes"
        elif longest < SHORT_UNIT_S and made.units > 1000:
            yield f"{made.units:,} units of {longest:.1f} s: raise --unit-bytes or join small files"
