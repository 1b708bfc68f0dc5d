"""Places in a text, counted in code points, UTF-16 units or UTF-8 bytes."""

import numpy as np

OFFSET_UNITS = ("codepoint", "utf16", "byte")


class Offsets:
    """Turns places counted in code points into another unit, for one text.

    Example:
        >>> Offsets("a😀b", "utf16")(2), Offsets("a😀b", "byte")(2)
        (3, 5)
    """

    def __init__(self, text: str, unit: str) -> None:
        self._table: np.ndarray | None = None
        if unit == "codepoint" or text.isascii():
            return
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        if unit == "utf16":
            widths = 1 + (points >= 0x10000)
        else:
            widths = 1 + (points >= 0x80).astype(int) + (points >= 0x800) + (points >= 0x10000)
        self._table = np.concatenate([[0], np.cumsum(widths)])

    def __call__(self, place: int) -> int:
        return place if self._table is None else int(self._table[place])
