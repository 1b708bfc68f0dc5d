"""Printable forms of names and texts of others, for a terminal or a log: one line, no controls.

A file name, a column, a label or a text may hold control characters. On a terminal they would
move the cursor, change colours or the title, and a line feed would forge a line of the log. Every
exit to a terminal or a log goes through a function of this module.
"""

import logging
import re

# Control characters (C0, DEL, C1), separators of lines, marks and overrides of the direction of
# writing, lone surrogates, the byte order mark, and tags. Not the joiners that Persian, Indic
# scripts and emoji need.
UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
    "\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\x1b": "\\x1b"}


def printable(text: object) -> str:
    r"""Escape what could act on a terminal or begin a new line.

    Example:
        >>> printable("a\x1b[31m\nb")
        'a\\x1b[31m\\nb'
    """
    return UNSAFE.sub(lambda found: _escaped(found[0]), str(text))


def safe_markup(text: object) -> str:
    """Escape for `Console.print` of rich, whose markup is plain text then, too."""
    from rich.markup import escape

    return escape(indented(text))


def indented(text: object) -> str:
    """Escape a text of several lines; those after the first are indented, so that none of them
    looks like a line of this program."""
    return "\n    ".join(map(printable, str(text).split("\n")))


def printable_json(line: str) -> str:
    r"""Escape the same characters inside a line of JSON, which stays equal JSON.

    Example:
        >>> printable_json('{"a": "\u202eb"}')
        '{"a": "\\u202eb"}'
    """
    return UNSAFE.sub(lambda found: _as_json(ord(found[0])), line)


class PrintableFormatter(logging.Formatter):
    """A formatter of one line a record; the lines of a traceback are indented."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record, with escaped message and name."""
        copy = logging.makeLogRecord(record.__dict__)
        copy.msg, copy.args = printable(record.getMessage()), ()
        copy.name = printable(record.name)
        return super().format(copy)

    def formatException(self, ei: object) -> str:
        """Format a traceback so that no line of it looks like a record."""
        lines = super().formatException(ei).split("\n")  # type: ignore[arg-type]
        return "\n".join("  " + printable(line) for line in lines)


class PrintableFilter(logging.Filter):
    """Escapes the records of this package for a handler that others have made."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Escape the message of a record of this package."""
        if record.name.partition(".")[0] == "erniem_batch":
            record.msg, record.args = printable(record.getMessage()), None
        return True


def _escaped(char: str) -> str:
    code = ord(char)
    if char in SHORT:
        return SHORT[char]
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _as_json(code: int) -> str:
    if code < 0x10000:
        return f"\\u{code:04x}"
    code -= 0x10000
    return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"
