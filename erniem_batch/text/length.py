"""How long a text becomes when the tokenizer normalises it."""

import unicodedata

# So many characters are normalised at a time: no other thread runs meanwhile, and characters that
# combine are sorted in quadratic time.
_PIECE = 256


def normal_length(text: str, most: int) -> int:
    """Characters of the text after NFKC, as the tokenizer normalises it.

    The count stops above `most`. Takes linear time, at most in proportion to `most`.

    Example:
        >>> normal_length("ﷺ" * 10, 1000)
        180
    """
    if text.isascii() or len(text) > most:
        return len(text)
    n = 0
    for at in range(0, len(text), _PIECE):
        n += len(unicodedata.normalize("NFKC", text[at : at + _PIECE]))
        if n > most:
            break
    return n
