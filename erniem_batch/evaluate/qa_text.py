"""How answers are made comparable, and compared: as SQuAD v1.1 and as MLQA define it.

Own code after the definitions in "SQuAD: 100,000+ Questions for Machine Comprehension of Text"
(Rajpurkar et al. 2016, section 6.1) and "MLQA: Evaluating Cross-lingual Extractive Question
Answering" (Lewis et al. 2020, section 4.3) and their scripts' behaviour, edge cases included:
an answer of articles and punctuation only is equal to another such one, and has F1 0.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

Normal = Callable[[str], str]

_SQUAD_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SQUAD_ARTICLES = re.compile(r"\b(?:a|an|the)\b")

# Of MLQA's seven languages; Hindi, Chinese and all others have none.
_ARTICLES = {
    "en": _SQUAD_ARTICLES,
    "es": re.compile(r"\b(?:un|una|unos|unas|el|la|los|las)\b"),
    "vi": re.compile(r"\b(?:của|là|cái|chiếc|những)\b"),
    "de": re.compile(r"\b(?:ein(?:e[nmsr]?)?|d(?:er|ie|as|en|em|es))\b"),
    # Anywhere, also inside of words: that is what the script does.
    "ar": re.compile("ال"),
}
_HAN = re.compile("([\u4e00-\u9fa5])")


def squad_normal(text: str) -> str:
    """Lower case without ASCII punctuation and English articles, single spaces."""
    bare = text.lower().translate(_SQUAD_PUNCTUATION)
    return " ".join(_SQUAD_ARTICLES.sub(" ", bare).split())


def mlqa_normal(text: str, language: str) -> str:
    """Lower case without Unicode punctuation and the articles of a language, single spaces; in
    Chinese each character stands alone.

    Args:
        language: ISO 639-1, also with a script or country behind it (zh-Hans); those that MLQA
            does not have are treated as Hindi is: no articles, words by white space.
    """
    language = re.split("[-_]", language.lower())[0]
    bare = "".join(char for char in text.lower() if not is_punctuation(char))
    if language in _ARTICLES:
        bare = _ARTICLES[language].sub(" ", bare)
    if language == "zh":
        bare = _HAN.sub(r" \1 ", bare)
    return " ".join(bare.split())


@lru_cache(maxsize=65_536)
def is_punctuation(char: str) -> bool:
    """Of a Unicode category P…, or ASCII punctuation, which has symbols too."""
    return char in string.punctuation or unicodedata.category(char).startswith("P")


def compare(predicted: str, answers: Sequence[str], normal: Normal) -> tuple[float, float]:
    """Exact match (0 or 1) and F1 of words, each with the answer that fits it best.

    Args:
        answers: at least one.
    """
    mine = normal(predicted)
    exact, best = 0.0, 0.0
    for answer in answers:
        right = normal(answer)
        exact = max(exact, float(mine == right))
        best = max(best, word_f1(mine.split(), right.split()))
    return exact, best


def word_f1(predicted: Sequence[str], right: Sequence[str]) -> float:
    """F1 of two bags of words; 0 if they share none."""
    n_common = (Counter(predicted) & Counter(right)).total()
    return 2 * n_common / (len(predicted) + len(right)) if n_common else 0.0
