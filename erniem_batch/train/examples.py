"""Annotated rows as model inputs with targets, one function a task.

Each call makes the examples of one epoch: what is drawn at random (sentences joined, prompts,
slices of contexts) is drawn anew, from the random numbers it is given.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from erniem_batch.errors import ConfigError
from erniem_batch.gold import WRITTEN_WITHOUT_SPACES, Annotated, Facts
from erniem_batch.labels import Span, spans_to_labels
from erniem_batch.model.heads import IGNORED_LABEL
from erniem_batch.records import FloatArray, IntArray
from erniem_batch.tasks.choose import asked
from erniem_batch.text.tokenizer import ErnieMTokenizer
from erniem_batch.text.windows import PAIR_SPECIALS, window_starts

QUESTION_TOKENS = 64  # of a long question, and at most half of all: the context needs room
WINDOW_OVERLAP = 128
# How the objects of a subject are asked for, with --schema-lang zh and en.
RELATION_PROMPTS = ("{subject}的{relation}", "{relation} of {subject}")


@dataclass(frozen=True, slots=True)
class Example:
    """One thing to learn.

    Attributes:
        ids: one sequence with its special tokens; of choose one for each choice.
        targets: by name: one number a token (ner `labels`; extract `starts`, `ends`), numbers of
            the whole (classify, choose `labels`; qa `starts`, `ends`; embed `vector`).
    """

    ids: tuple[IntArray, ...]
    targets: Mapping[str, Any]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(ids) for ids in self.ids)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How examples are made.

    Attributes:
        max_length: tokens of an example, special ones included; longer texts are cut, contexts of
            questions are read in windows.
        labels: of the head, in its order.
        join: ner: share of sentences joined with the next of their language.
        negatives: extract: prompts in vain for each one in earnest.
        prompts: extract: names by language and label, see `read_prompts`.
        crop: qa: longest slice of a context around the answer, in tokens; None: all of it.
        vectors: embed: what each text should become, (rows, hidden).
    """

    max_length: int
    labels: Sequence[str] = ()
    join: float = 0.0
    negatives: float = 1.0
    prompts: "Prompts | None" = None
    crop: int | None = None
    vectors: FloatArray | None = None


Draw = Callable[[Sequence[Annotated], ErnieMTokenizer, Drawing, random.Random], list[Example]]


# ---- ner --------------------------------------------------------------------------------------


def ner_examples(
    rows: Sequence[Annotated], tokenizer: ErnieMTokenizer, how: Drawing, rng: random.Random
) -> list[Example]:
    """`[CLS] text [SEP]` with a BIO label for each token."""
    texts = _joined(rows, how.join, rng) if how.join else [(r.record.text, r.gold) for r in rows]
    tokens = tokenizer.encode_batch([text for text, _ in texts])
    label_ids = {label: i for i, label in enumerate(how.labels)}
    keep = how.max_length - 2
    examples = []
    for i, (text, spans) in enumerate(texts):
        row = tokens.of(i)
        offsets = list(zip(row.starts[:keep].tolist(), row.ends[:keep].tolist(), strict=True))
        targets = [label_ids[label] for label in spans_to_labels(spans, offsets)]
        # A token of white space only has no label of its own, neither here nor in decoding.
        targets = [
            IGNORED_LABEL if text[start:end].isspace() else target
            for (start, end), target in zip(offsets, targets, strict=True)
        ]
        labels = np.array([IGNORED_LABEL, *targets, IGNORED_LABEL])
        examples.append(Example((_with_special(tokenizer, row.ids[:keep]),), {"labels": labels}))
    return examples


def _joined(
    rows: Sequence[Annotated], share: float, rng: random.Random
) -> list[tuple[str, list[Span]]]:
    """Some texts with the next of their language behind them, so that the model sees more than one
    sentence at a time."""
    by_language = defaultdict(list)
    for row in rows:
        by_language[row.language].append(row)
    joined = []
    for language, group in sorted(by_language.items()):
        rng.shuffle(group)
        space = "" if language in WRITTEN_WITHOUT_SPACES else " "
        while group:
            row = group.pop()
            text, spans = row.record.text, list(row.gold)
            while group and rng.random() < share:
                other = group.pop()
                shift = len(text) + len(space)
                text += space + other.record.text
                spans += [(a + shift, b + shift, kind) for a, b, kind in other.gold]
            joined.append((text, spans))
    return joined


# ---- classify, choose, embed -------------------------------------------------------------------


def classify_examples(
    rows: Sequence[Annotated], tokenizer: ErnieMTokenizer, how: Drawing, rng: random.Random
) -> list[Example]:
    """`[CLS] text [SEP]`, or `[CLS] text [SEP] [SEP] pair [SEP]`, with one target."""
    texts = _ids_of(tokenizer, [row.record.text for row in rows])
    pairs = _ids_of(tokenizer, [row.record.fields.get("text_pair", "") for row in rows])
    examples = []
    for row, ids, pair in zip(rows, texts, pairs, strict=True):
        has_pair = "text_pair" in row.record.fields
        ids = _pair(tokenizer, ids, pair if has_pair else None, how.max_length)
        examples.append(Example((ids,), {"labels": class_target(row, how.labels)}))
    return examples


def class_target(row: Annotated, labels: Sequence[str]) -> Any:
    """An index; for several labels one 0 or 1 each; a number for regression."""
    if isinstance(row.gold, float):
        return np.float32(row.gold)
    if isinstance(row.gold, tuple):
        return np.array([label in row.gold for label in labels], dtype=np.float32)
    return labels.index(row.gold)


def choose_examples(
    rows: Sequence[Annotated], tokenizer: ErnieMTokenizer, how: Drawing, rng: random.Random
) -> list[Example]:
    """`[CLS] premise [SEP] [SEP] choice [SEP]` for each choice, in random order."""
    premises = _ids_of(tokenizer, [asked(row.record) for row in rows])
    choices = iter(_ids_of(tokenizer, [c for row in rows for c in row.record.fields["choices"]]))
    examples = []
    for row, premise in zip(rows, premises, strict=True):
        sequences = [
            _pair(tokenizer, premise, next(choices), how.max_length)
            for _ in row.record.fields["choices"]
        ]
        order = rng.sample(range(len(sequences)), len(sequences))
        shuffled = tuple(sequences[i] for i in order)
        examples.append(Example(shuffled, {"labels": order.index(row.gold)}))
    return examples


def embed_examples(
    rows: Sequence[Annotated], tokenizer: ErnieMTokenizer, how: Drawing, rng: random.Random
) -> list[Example]:
    """`[CLS] text [SEP]` with the vector that it should become."""
    assert how.vectors is not None
    ids = _ids_of(tokenizer, [row.record.text for row in rows])
    return [
        Example((_with_special(tokenizer, x[: how.max_length - 2]),), {"vector": vector})
        for x, vector in zip(ids, how.vectors, strict=True)
    ]


# ---- qa ---------------------------------------------------------------------------------------


def qa_examples(
    rows: Sequence[Annotated], tokenizer: ErnieMTokenizer, how: Drawing, rng: random.Random
) -> list[Example]:
    """`[CLS] question [SEP] [SEP] slice of the context [SEP]` with first and last token of the
    answer; both are 0, [CLS], if the slice does not hold all of it."""
    questions = _ids_of(tokenizer, [row.record.fields["question"] for row in rows])
    contexts = tokenizer.encode_batch([row.record.text for row in rows])
    examples = []
    longest = min(QUESTION_TOKENS, (how.max_length - PAIR_SPECIALS) // 2)
    for i, row in enumerate(rows):
        question, tokens = questions[i][:longest], contexts.of(i)
        answer = rng.choice(row.gold) if row.gold else None
        place = None
        if answer is not None:
            place = tokens_of_span(
                row.record.text, (answer.start, answer.end), tokens.starts, tokens.ends
            )
        before = len(question) + 3
        size = how.max_length - before - 1
        for start, stop in _slices(len(tokens.ids), place, size, how.crop, rng):
            first = last = 0
            if place is not None and start <= place[0] and place[1] < stop:
                first, last = (at - start + before for at in place)
            ids = _with_special(tokenizer, question, tokens.ids[start:stop])
            examples.append(Example((ids,), {"starts": first, "ends": last}))
    return examples


def _slices(
    n_tokens: int,
    place: tuple[int, int] | None,
    size: int,
    crop: int | None,
    rng: random.Random,
) -> list[tuple[int, int]]:
    """Which tokens of a context become examples: one random slice around the answer, or windows."""
    if crop is None or place is None:
        starts = window_starts(n_tokens, size, min(WINDOW_OVERLAP, size // 2))
        return [(start, min(start + size, n_tokens)) for start in starts]
    length = min(max(crop, place[1] - place[0] + 1), size, n_tokens)
    earliest = max(0, place[1] + 1 - length)
    latest = max(earliest, min(place[0], n_tokens - length))
    start = rng.randint(earliest, latest)
    return [(start, start + length)]


# ---- extract ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompts:
    """How prompts call each label.

    Attributes:
        names: by language ("*": any), then by label; a label that is nowhere is its own name.
    """

    names: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)

    def of(self, label: str, language: str) -> list[str]:
        """All names of a label for texts in a language."""
        tables = [self.names.get(language, {}), self.names.get("*", {})]
        names = [name for table in tables for name in table.get(label, ())]
        return list(dict.fromkeys(names)) or [label]


def read_prompts(content: Any, where: str) -> Prompts:
    """Prompts from a mapping: language or "*" to label to one name or several.

    Raises:
        ConfigError: not of this form.
    """
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where}: expected a mapping from languages to labels to names")
    names: dict[str, dict[str, list[str]]] = {}
    for language, table in content.items():
        if not isinstance(table, Mapping):
            raise ConfigError(
                f"{where}: {language!r} must map labels to names, such as "
                f'{{"*": {{PER: [Person, 人物]}}, de: {{LOC: Ort}}}}'
            )
        for label, given in table.items():
            chosen = [given] if isinstance(given, str) else given
            if not isinstance(chosen, list) or not all(isinstance(n, str) and n for n in chosen):
                raise ConfigError(f"{where}: {language}.{label} must be a name or a list of names")
            names.setdefault(str(language), {})[str(label)] = chosen
    return Prompts(names)


def extract_examples(
    rows: Sequence[Annotated], tokenizer: ErnieMTokenizer, how: Drawing, rng: random.Random
) -> list[Example]:
    """`[CLS] prompt [SEP] [SEP] text [SEP]` with 1 where a span that the prompt asks for starts,
    and where one ends: a prompt for what is in a text, and some for what is not."""
    prompts = how.prompts or Prompts()
    questions = [
        q for i, row in enumerate(rows) for q in _asked_of(row, i, how.labels, prompts, rng)
    ]
    found = [q for q in questions if q[2]]
    in_vain = [q for q in questions if not q[2]]
    rng.shuffle(in_vain)
    # Rows that only ask in vain teach that too: there are some even where nothing was found.
    n_in_vain = round(how.negatives * max(len(found), 1))
    tokens = tokenizer.encode_batch([row.record.text for row in rows])
    names = sorted({name for _, name, _ in questions})
    prompt_ids = dict(zip(names, _ids_of(tokenizer, names), strict=True))
    examples = []
    longest = min(QUESTION_TOKENS, (how.max_length - PAIR_SPECIALS) // 2)
    for i, name, spans in [*found, *in_vain[:n_in_vain]]:
        row, prompt = tokens.of(i), prompt_ids[name][:longest]
        before = len(prompt) + 3
        keep = how.max_length - before - 1
        ids = _with_special(tokenizer, prompt, row.ids[:keep])
        starts, ends = np.zeros((2, len(ids)), dtype=np.float32)
        for span in spans:
            place = tokens_of_span(rows[i].record.text, span, row.starts[:keep], row.ends[:keep])
            if place is not None:
                starts[before + place[0]] = ends[before + place[1]] = 1
        examples.append(Example((ids,), {"starts": starts, "ends": ends}))
    return examples


Asked = tuple[int, str, list[tuple[int, int]]]


def _asked_of(
    row: Annotated, i: int, labels: Sequence[str], prompts: Prompts, rng: random.Random
) -> list[Asked]:
    """Index of the row, prompt, and the spans it asks for; each label and relation once."""
    facts: Facts = row.gold
    if facts.prompt is not None:
        return [(i, facts.prompt, [(a, b) for a, b, _ in facts.spans])]
    asked = []
    for label in labels:
        name = rng.choice(prompts.of(label, row.language))
        asked.append((i, name, [(a, b) for a, b, kind in facts.spans if kind == label]))
    text = row.record.text
    by_subject: dict[tuple[Span, str], list[tuple[int, int]]] = defaultdict(list)
    for subject, relation, object_ in facts.relations:
        by_subject[subject, relation].append(object_[:2])
    for relation in sorted({name for _, name, _ in facts.relations}):
        # Subjects without this relation are asked for it in vain.
        for subject in sorted(set(facts.spans)):
            name = rng.choice(RELATION_PROMPTS).format(
                subject=text[subject[0] : subject[1]],
                relation=rng.choice(prompts.of(relation, row.language)),
            )
            asked.append((i, name, by_subject.get((subject, relation), [])))
    return asked


# ---- parts ------------------------------------------------------------------------------------


def tokens_of_span(
    text: str, span: tuple[int, int], starts: IntArray, ends: IntArray
) -> tuple[int, int] | None:
    """First and last token of a span of characters; None if the tokens end before the span does.

    Args:
        starts, ends: characters of each token.
    """
    if not len(ends) or ends[-1] < span[1]:
        return None
    touching = np.flatnonzero((starts < span[1]) & (ends > span[0])).tolist()
    inside = [i for i in touching if not text[starts[i] : ends[i]].isspace()]
    return (inside[0], inside[-1]) if inside else None


def _ids_of(tokenizer: ErnieMTokenizer, texts: Iterable[str]) -> list[IntArray]:
    texts = list(texts)
    tokens = tokenizer.encode_batch(texts, offsets=False)
    return [tokens.of(i).ids for i in range(len(texts))]


def _with_special(
    tokenizer: ErnieMTokenizer, first: IntArray, second: IntArray | None = None
) -> IntArray:
    pair = None if second is None else second.tolist()
    return np.array(tokenizer.build_inputs_with_special_tokens(first.tolist(), pair))


def _pair(
    tokenizer: ErnieMTokenizer, first: IntArray, second: IntArray | None, max_length: int
) -> IntArray:
    """Both within the length: the second is cut only where it fills half of it by itself."""
    if second is None:
        return _with_special(tokenizer, first[: max_length - 2])
    room = max_length - PAIR_SPECIALS
    second = second[: max(room - len(first), room // 2)]
    return _with_special(tokenizer, first[: room - len(second)], second)


DRAW: dict[str, Draw] = {
    "ner": ner_examples,
    "classify": classify_examples,
    "choose": choose_examples,
    "qa": qa_examples,
    "extract": extract_examples,
    "embed": embed_examples,
}
