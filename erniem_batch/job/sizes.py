"""How much text is tokenized at once: a character takes a hundred bytes of memory and more."""

from collections.abc import Iterator, Sequence

from erniem_batch.records import Failure, Record

# Texts that are tokenized together.
GROUP_CHARACTERS = 2 << 20
# The largest row may have a sixteenth of its bytes as text, but at least so many characters.
LEAST_LIMIT = 4 << 20
ROW_SHARE = 16


def characters(record: Record) -> int:
    """Characters that a task reads of a record; the text counts for each choice, which it precedes.

    Example:
        >>> characters(Record("0", "abc", {"choices": ["a", "b"], "question": "d"}))
        9
    """
    fields = record.fields.values()
    n_text = len(record.text) if isinstance(record.text, str) else 0
    n_others = sum(len(value) for value in fields if isinstance(value, str))
    lists = [value for value in fields if isinstance(value, list)]
    n_items = sum(len(item) for value in lists for item in value if isinstance(item, str))
    return n_text * max([1, *map(len, lists)]) + n_others + n_items


def most_characters(max_row_bytes: int) -> int:
    """The largest number of characters that is read of a row."""
    return max(LEAST_LIMIT, max_row_bytes // ROW_SHARE)


def too_long(record: Record, max_row_bytes: int) -> Failure | None:
    """Why a record is not read, if it is too long."""
    n, most = characters(record), most_characters(max_row_bytes)
    if n <= most:
        return None
    reason = f"{n} characters of text: at most {most} are read, or --max-row-bytes / {ROW_SHARE}"
    return Failure(record.id, "encode", "RecordError", reason)


def grouped(records: Sequence[Record]) -> Iterator[Sequence[Record]]:
    """Neighbouring records of up to GROUP_CHARACTERS; a longer one is alone."""
    start = filled = 0
    for i, record in enumerate(records):
        n = characters(record)
        if i > start and filled + n > GROUP_CHARACTERS:
            yield records[start:i]
            start, filled = i, 0
        filled += n
    if records:
        yield records[start:]
