"""Which language a text is in, found offline (py3langid, an extra)."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from erniem_batch.errors import ConfigError
from erniem_batch.records import Record

# The first page tells as much as the whole book.
READ_CHARACTERS = 2000


def detect_languages(records: Sequence[Record]) -> list[Record]:
    """The records with their language (ISO 639-1), where they have text and none is given."""
    identifier = _identifier()
    found = []
    for record in records:
        text = record.text
        if record.language is None and isinstance(text, str) and text.strip():
            language, _ = identifier.classify(text[:READ_CHARACTERS])
            fields = {**record.fields, "language": language}
            record = replace(record, fields=fields)
        found.append(record)
    return found


def require_detector() -> None:
    """Raises a ConfigError if no language can be found out here."""
    _identifier()


@cache
def _identifier() -> Any:
    try:
        import py3langid
    except ImportError:
        raise ConfigError(
            "--detect-language needs a library: pip install 'erniem-batch[lang]'"
        ) from None
    return py3langid
