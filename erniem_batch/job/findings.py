"""What a run found, counted: labels and scores by language, lengths of texts, dead letters.

Every unit brings its counts in its receipt and in the marks of its file. They are kept beside the
ledger, unit by unit, so that a unit that is made again or replaced is never counted twice.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from erniem_batch.records import Failure

# What is counted: a label with its score; tokens of a text; why a row has no prediction.
LABEL, LENGTH, LETTER = "label", "length", "letter"

SCORE_BINS = 20  # from 0 to 1
NO_SCORE = -1  # a number outside 0 to 1, as of regression
NOTHING = ""  # in place of a label: nothing was found in the text

# Names may come from the data itself, with a language column or schemas by row.
MOST_LABELS = 300
MOST_LANGUAGES = 100
LONGEST_NAME = 60
OTHERS = "(others)"
LANGUAGE = re.compile(r"[A-Za-z0-9_-]{1,20}")  # as tags of BCP 47, and names of one word

SUM_SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        ("language", pa.string()),
        ("label", pa.string()),
        ("bin", pa.int64()),
        ("n", pa.int64()),
    ]
)
KEYS = SUM_SCHEMA.names[:-1]
UNIT_SCHEMA = SUM_SCHEMA.insert(0, pa.field("unit_id", pa.string()))


class Findings:
    """What was found in one unit, while it is worked on."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str, str, int]] = Counter()
        self._labels: set[str] = set()
        self._languages: set[str] = set()

    def add(
        self, language: str | None, n_tokens: int, labels: Sequence[tuple[str, float]] | None
    ) -> None:
        """Counts a prediction.

        Args:
            labels: with their scores; None: the task gives none.
        """
        # A column that holds something else must not end up in reports, word for word.
        spoken = language if language and LANGUAGE.fullmatch(language) else OTHERS
        spoken = _known(spoken if language else "", self._languages, MOST_LANGUAGES)
        self._counts[LENGTH, spoken, "", length_bin(n_tokens)] += 1
        if labels is None:
            return
        for label, score in labels:
            name = _known(label, self._labels, MOST_LABELS)
            self._counts[LABEL, spoken, name, score_bin(score)] += 1
        if not labels:
            self._counts[LABEL, spoken, NOTHING, NO_SCORE] += 1

    def add_failure(self, failure: Failure, n_rows: int) -> None:
        """Counts rows that have no prediction."""
        self._counts[LETTER, "", f"{failure.stage}: {failure.error}", 0] += n_rows

    def as_text(self) -> str:
        """As JSON, for receipts and marks."""
        return json.dumps([[*key, n] for key, n in sorted(self._counts.items())])


def _known(name: str, known: set[str], most: int) -> str:
    name = name[:LONGEST_NAME]
    if name not in known:
        if len(known) >= most:
            return OTHERS
        known.add(name)
    return name


def score_bin(score: float) -> int:
    """Which of SCORE_BINS a score falls into."""
    return min(SCORE_BINS - 1, int(score * SCORE_BINS)) if 0 <= score <= 1 else NO_SCORE


def length_bin(n_tokens: int) -> int:
    """0, then lengths by powers of two: bin k holds those from 2^(k-1) to 2^k - 1."""
    return n_tokens.bit_length()


def length_range(number: int) -> tuple[int, int]:
    """Shortest and longest of a bin."""
    return (0, 0) if number == 0 else (2 ** (number - 1), 2**number - 1)


# ---- tables -----------------------------------------------------------------------------------


def is_findings(text: object) -> bool:
    """Whether a text is what `as_text` gives, or empty."""
    if text == "":
        return True
    try:
        rows = json.loads(str(text))
    except (ValueError, RecursionError):
        return False
    kinds = [str, str, str, int, int]
    return isinstance(rows, list) and all(
        isinstance(row, list) and [type(value) for value in row] == kinds for row in rows
    )


def findings_table(counted: Iterable[tuple[str, str]]) -> pa.Table:
    """What was found in units, from their ids and what `as_text` gave."""
    rows = [[unit_id, *row] for unit_id, text in counted if text for row in json.loads(text)]
    columns = list(zip(*rows, strict=True)) or [()] * len(UNIT_SCHEMA)
    arrays = [pa.array(c, f.type) for c, f in zip(columns, UNIT_SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=UNIT_SCHEMA)


def summed(tables: Sequence[pa.Table]) -> pa.Table:
    """One row for each thing that is counted."""
    if not tables:
        return SUM_SCHEMA.empty_table()
    together = pa.concat_tables([table.select(SUM_SCHEMA.names) for table in tables])
    sums = together.group_by(KEYS).aggregate([("n", "sum")])
    return sums.rename_columns([*KEYS, "n"]).select(SUM_SCHEMA.names)


def capped(sums: pa.Table) -> pa.Table:
    """The same, with the rarest labels and languages together: what the data call them in each unit
    may be of another name in the next.

    Args:
        sums: a table of SUM_SCHEMA.
    """
    for column, most, kind in (("label", MOST_LABELS, LABEL), ("language", MOST_LANGUAGES, LENGTH)):
        mine = sums.filter(pc.equal(sums["kind"], kind))
        ranked = mine.group_by(column).aggregate([("n", "sum")])
        ranked = ranked.sort_by([("n_sum", "descending"), (column, "ascending")])[column]
        names = ranked.filter(pc.invert(pc.is_in(ranked, value_set=pa.array(["", OTHERS]))))
        if len(names) <= most:
            continue
        rare = pc.is_in(sums[column], value_set=names[most:].combine_chunks())
        rare = pc.and_(rare, pc.not_equal(sums["kind"], LETTER))
        others = pc.if_else(rare, OTHERS, sums[column])
        sums = summed([sums.set_column(sums.column_names.index(column), column, others)])
    return sums
