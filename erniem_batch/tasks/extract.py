"""Universal information extraction: each name of a schema is a question, asked beside the text.

The way of a record: all names of the first level are asked at once; what is found under a name that
has children gives the questions of the next level (`follow_up`), and so on; then the finds become
one tree. A text is tokenized once, however many questions are asked, and equal questions about
equal windows are computed once (see Predictor.forward).

Source: PaddleNLP 2.8.1 UIETask, whose exact behaviour, faults included, is in `taskflow.py`.
Differences, all deliberate:
PARITY: windows are cut by tokens and overlap, so that nothing is lost at a seam or cut off; there,
by characters, without overlap.
PARITY: what two windows find is merged: a thing on a seam, if no longer than the overlap, is found
once and whole.
PARITY: offsets are those of the whole text, also with split_sentence; there, newlines are lost.
PARITY: names with options give options, all that pass, best first; other names give spans of the
text. There, one answer decides for all texts of the call, and only one option is given.
PARITY: results are sorted, equal ones are merged, names that stand twice are asked once.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from erniem_batch.errors import ConfigError, RecordError
from erniem_batch.options import ExtractOptions
from erniem_batch.records import Encoded, Failure, FloatArray, IntArray, Record, Window
from erniem_batch.tasks.base import Task, encoded_of, require_finite, sigmoid, struct_lists
from erniem_batch.tasks.pairing import Candidate, count_pairs, join_windows, pair
from erniem_batch.text.offsets import Offsets
from erniem_batch.text.schema import (
    Node,
    Schema,
    options_of_prompt,
    parse_schema,
    prompt_of,
    schema_of_text,
)
from erniem_batch.text.segments import Tokens
from erniem_batch.text.tokenizer import ErnieMTokenizer
from erniem_batch.text.windows import PAIR_SPECIALS
from erniem_batch.thresholds import Thresholds

# Spans that one window may give with span_pairing "all", which pairs every start with every end.
MAX_SPANS_OF_A_WINDOW = 8192
_VISIBLE = re.compile(r"\S")


@dataclass(slots=True)
class Item:
    """Something that was found.

    Attributes:
        name: of the schema.
        text: of the span, or the option.
        start, end: `source[start:end]` is the text; None for options.
        probability: product of those of start and end.
        relations: what was found about it.
    """

    name: str
    text: str
    start: int | None
    end: int | None
    probability: float
    relations: list["Item"] = field(default_factory=list)


ITEM = pa.struct(
    [
        ("id", pa.int32()),
        ("parent", pa.int32()),
        ("name", pa.string()),
        ("text", pa.string()),
        ("start", pa.int32()),
        ("end", pa.int32()),
        ("probability", pa.float32()),
    ]
)


def taskflow_json(items: Sequence[Item]) -> dict[str, Any]:
    """Items in the form of Taskflow: by name, relations nested."""
    found: dict[str, Any] = {}
    for item in items:
        value: dict[str, Any] = {"text": item.text}
        if item.start is not None:
            value |= {"start": item.start, "end": item.end}
        value["probability"] = item.probability
        if item.relations:
            value["relations"] = taskflow_json(item.relations)
        found.setdefault(item.name, []).append(value)
    return found


def walk(items: Sequence[Item], parent: Item | None = None) -> Iterator[tuple[Item, Item | None]]:
    """All items with their parents, each before its relations."""
    for item in items:
        yield item, parent
        yield from walk(item.relations, item)


@dataclass(frozen=True, slots=True)
class FlatRow:
    """An item as a row of its text's list; `parent` is the id of another row."""

    id: int
    parent: int | None
    item: Item

    def __getattr__(self, name: str) -> Any:
        return getattr(self.item, name)


def flat_rows(items: Sequence[Item]) -> list[FlatRow]:
    """A tree as rows, each before its relations."""
    ids: dict[int, int] = {}
    rows = []
    for item, parent in walk(items):
        ids[id(item)] = len(ids)
        rows.append(FlatRow(ids[id(item)], None if parent is None else ids[id(parent)], item))
    return rows


class ItemTask(Task):
    """What both ways to extract have in common: the head and the columns."""

    head: ClassVar[str] = "ErnieMForInformationExtraction"

    def __init__(self, tokenizer: ErnieMTokenizer, options: ExtractOptions, **windows: int) -> None:
        super().__init__(tokenizer, **windows)
        self.options = options
        self.nodes = options.nodes
        fields = [("extracted", pa.list_(ITEM))]
        if options.output_json:
            fields.append(("extracted_json", pa.string()))
        self.schema = pa.schema(fields)

    def schema_of(self, record: Record) -> Schema:
        """The record's own schema, else that of all.

        Raises:
            RecordError: there is none, or it is not one.
        """
        own = record.fields.get("schema")
        if own is None:
            if self.nodes is None:
                raise RecordError("there is no schema: the schema column is null")
            return self.nodes
        try:
            if isinstance(own, str):
                own = schema_of_text(own, not self.options.taskflow_compat)
            return parse_schema(own)
        except ConfigError as error:
            raise RecordError(str(error)) from None

    def columns(self, values: Sequence[Sequence[Item]]) -> list[pa.Array]:
        """`extracted`: a flat list in which `parent` is the id of another item of the row."""
        columns = [struct_lists(ITEM, [flat_rows(value) for value in values])]
        if self.options.output_json:
            texts = [json.dumps(taskflow_json(value), ensure_ascii=False) for value in values]
            columns.append(pa.array(texts, pa.string()))
        return columns

    def count(self, value: Sequence[Item]) -> int:
        """All items, relations included."""
        return sum(1 for _ in walk(value))

    def scored_labels(self, value: Sequence[Item]) -> list[tuple[str, float]]:
        """Name and probability of each item; of an option, which one it is."""
        return [
            (item.name if item.start is not None else f"{item.name}: {item.text}", item.probability)
            for item, _ in walk(value)
        ]


@dataclass(frozen=True, slots=True)
class Question:
    """A name of the schema, asked about the text or about something found in it."""

    node: Node
    prompt: str
    parent: Item | None


@dataclass(slots=True)
class Search:
    """How far the extraction of one record is.

    Attributes:
        questions: of this round; `Window.part` counts them.
        slices: sentences as (first, past the last token); None: the text as a whole.
        items: found under names of the first level.
    """

    questions: list[Question]
    slices: list[tuple[int, int]] | None
    places: "Places"
    items: list[Item] = field(default_factory=list)


class Places:
    """Edges of spans in one text. What is known of an edge is kept, since many spans share one.

    Attributes:
        unit: turns places into the unit that was asked for.
    """

    def __init__(self, text: str, offset_unit: str) -> None:
        self._text = text
        self._left: dict[int, int] = {}
        self._right: dict[int, int] = {}
        self.unit = Offsets(text, offset_unit)

    def stripped(self, start: int, end: int) -> tuple[int, int]:
        """A span without white space at its edges; empty if it is nothing else."""
        if start not in self._left:
            found = _VISIBLE.search(self._text, start)
            self._left[start] = found.start() if found else len(self._text)
        left = min(self._left[start], end)
        if left == end:
            return end, end
        if end not in self._right:
            self._right[end] = stripped(self._text, left, end)[1]
        return left, self._right[end]


class ExtractTask(ItemTask):
    """Extraction as it should be. The value of a record is a list of Item, in schema order."""

    def __init__(
        self,
        tokenizer: ErnieMTokenizer,
        options: ExtractOptions,
        thresholds: Thresholds,
        **windows: int,
    ) -> None:
        super().__init__(tokenizer, options, **windows)
        self._thresholds = thresholds

    # ---- questions ----------------------------------------------------------------------------

    def encode(self, records: Sequence[Record]) -> Iterator[Encoded | Failure]:
        """Windows of each text beside each name of the first level."""

        def read(_: int, record: Record, tokens: Tokens) -> Encoded:
            schema = self.schema_of(record)
            slices = None
            if self.options.split_sentence:
                slices = sentence_slices(record.text, tokens)
            nodes = merged(schema)
            self._require_room(record, tokens.ids, slices, len(nodes))
            places = Places(record.text, self.options.offset_unit)
            search = Search(self._ask(nodes, None), slices, places)
            return self._round(encoded_of(record, tokens, [], state=search))

        return self.encode_texts(records, read)

    def _ask(self, nodes: Sequence[Node], parent: Item | None) -> list[Question]:
        text, lang = None if parent is None else parent.text, self.options.schema_lang
        return [Question(node, prompt_of(node.name, text, lang), parent) for node in nodes]

    def _require_room(
        self,
        record: Record,
        ids: IntArray,
        slices: Sequence[tuple[int, int]] | None,
        n_questions: int,
    ) -> None:
        """Raises what `Work.charge` raises for the least that so many questions would take."""
        n_windows = len(slices or [0])
        n_tokens = len(ids) + n_windows * PAIR_SPECIALS
        if len(ids):
            record.work.require_room(n_questions * n_tokens, n_questions * n_windows)

    def _round(self, encoded: Encoded) -> Encoded:
        """The same with the windows of the questions that are open."""
        search: Search = encoded.state
        windows: list[Window] = []
        if len(encoded.token_ids):
            prompts = self._prompt_tokens([question.prompt for question in search.questions])
            self._charge(encoded, prompts)
            for part, prompt in enumerate(prompts):
                encoded.record.work.check()
                windows += self.windows.behind(
                    prompt.ids,
                    encoded.token_ids,
                    what="the prompt",
                    part=part,
                    slices=search.slices,
                )
        return replace(encoded, windows=windows)

    def _charge(self, encoded: Encoded, prompts: Sequence[Tokens]) -> None:
        """Counts the windows of all prompts, which are about to be built."""
        slices = encoded.state.slices
        lengths = [b - a for a, b in slices] if slices else [len(encoded.token_ids)]
        n_tokens = n_windows = 0
        for n_prompt, n_times in Counter(len(prompt.ids) for prompt in prompts).items():
            counts = self.windows.count(n_prompt + PAIR_SPECIALS, lengths, what="the prompt")
            n_tokens += n_times * counts[0]
            n_windows += n_times * counts[1]
        encoded.record.work.charge(n_tokens, n_windows)

    def _prompt_tokens(self, prompts: Sequence[str]) -> list[Tokens]:
        known = self.tokenizer.prompts
        found: dict[str, Tokens] = {}
        new: list[str] = []
        for prompt in dict.fromkeys(prompts):
            if (old := known.get(prompt)) is None:
                new.append(prompt)
            else:
                found[prompt] = old
        for prompt, tokens in zip(new, self.tokens_of(new) if new else [], strict=True):
            found[prompt] = tokens
            known.put(prompt, tokens, _n_bytes(prompt, tokens))
        return [found[prompt] for prompt in prompts]

    # ---- answers ------------------------------------------------------------------------------

    def follow_up(self, encoded: Encoded, outputs: Sequence[FloatArray]) -> Encoded | None:
        """Takes in the answers; the questions about what was found, if there are any."""
        search: Search = encoded.state
        found: list[tuple[list[Node], Item]] = []
        by_part: dict[int, list[int]] = {}
        for i, window in enumerate(encoded.windows):
            by_part.setdefault(window.part, []).append(i)
        for part, places in by_part.items():
            question = search.questions[part]
            windows = [encoded.windows[i] for i in places]
            rows = [outputs[i] for i in places]
            children = merged(question.node.children)
            for item in self._answers(encoded, question, windows, rows):
                siblings = search.items if question.parent is None else question.parent.relations
                siblings.append(item)
                found.append((children, item))
        search.questions = self._questions_about(encoded, found)
        if not search.questions:
            return None
        n_earlier = encoded.n_earlier_windows + len(encoded.windows)
        return self._round(replace(encoded, n_earlier_windows=n_earlier))

    def _questions_about(
        self, encoded: Encoded, found: Sequence[tuple[list[Node], Item]]
    ) -> list[Question]:
        """The follow-up questions about what was found, counted before they are put together."""
        work, search = encoded.record.work, encoded.state
        n_questions = sum(len(children) for children, _ in found)
        self._require_room(encoded.record, encoded.token_ids, search.slices, n_questions)
        lengths = {id(nodes): sum(len(node.name) for node in nodes) for nodes, _ in found}
        work.require_room_for_text(
            sum(lengths[id(nodes)] + len(nodes) * len(item.text) for nodes, item in found)
        )
        return [question for nodes, item in found for question in self._ask(nodes, item)]

    def _answers(
        self,
        encoded: Encoded,
        question: Question,
        windows: Sequence[Window],
        rows: Sequence[FloatArray],
    ) -> list[Item]:
        encoded.record.work.check()
        for rows_L2 in rows:
            require_finite(rows_L2)
        probs = [sigmoid(rows_L2) for rows_L2 in rows]
        if options_of_prompt(question.prompt):
            items = self._options(question, probs)
        else:
            items = self._spans(encoded, question, windows, probs)
        name, language = question.node.name, encoded.record.language
        lowest = self._thresholds(name, language)
        return [item for item in items if item.probability >= lowest]

    def _options(self, question: Question, probs: Sequence[FloatArray]) -> list[Item]:
        """Options that any of the windows chooses, the best first."""
        prompt = question.prompt
        tokens = self._prompt_tokens([prompt])[0]
        items = []
        for a, b in options_of_prompt(prompt):
            inside = np.flatnonzero((tokens.starts < b) & (tokens.ends > a))
            if not len(inside):
                continue
            first, last = 1 + int(inside[0]), 1 + int(inside[-1])  # behind [CLS]
            pairs = [(float(p[first, 0]), float(p[last, 1])) for p in probs]
            passing = [s * e for s, e in pairs if min(s, e) > self.options.position_prob]
            if passing:
                items.append(Item(question.node.name, prompt[a:b], None, None, max(passing)))
        return sorted(items, key=lambda item: -item.probability)

    def _spans(
        self,
        encoded: Encoded,
        question: Question,
        windows: Sequence[Window],
        probs: Sequence[FloatArray],
    ) -> list[Item]:
        """Spans of the text, by position, those of all windows put together."""
        text, limit = encoded.record.text, self.options.position_prob
        places: Places = encoded.state.places
        candidates = []
        for p_L2, window in zip(probs, windows, strict=True):
            body_L2 = p_L2[window.offset : window.offset + window.n_tokens]
            starts, ends = (np.flatnonzero(column > limit).tolist() for column in body_L2.T)
            last = window.n_tokens - 1
            self._charge_spans(encoded.record, starts, ends)
            for i, j in pair(starts, ends, self.options.span_pairing):
                first, end = window.first + i, window.first + j
                a, b = places.stripped(int(encoded.starts[first]), int(encoded.ends[end]))
                # At a cut, where the rest of it may be in the next window.
                cut = (i == 0 and window.first > 0) or (
                    j == last and end + 1 < len(encoded.token_ids)
                )
                if a < b:
                    probability = float(body_L2[i, 0]) * float(body_L2[j, 1])
                    candidates.append(Candidate(a, b, probability, cut))
        kept = join_windows(candidates, apart=self.options.span_pairing == "nearest")
        name, place = question.node.name, places.unit
        return [
            Item(name, text[c.start : c.end], place(c.start), place(c.end), c.probability)
            for c in kept
        ]

    def _charge_spans(self, record: Record, starts: list[int], ends: list[int]) -> None:
        """Counts the spans of a window that are about to be paired.

        Raises:
            RecordError: every start with every end gives more than a window may give.
        """
        if self.options.span_pairing != "all":  # at most as many spans as tokens
            return
        n_spans = count_pairs(starts, ends)
        if n_spans > MAX_SPANS_OF_A_WINDOW:
            raise RecordError(
                f"span_pairing all gives {n_spans} spans in one window; at most "
                f"{MAX_SPANS_OF_A_WINDOW}: raise position_prob (now {self.options.position_prob}) "
                f"or use nearest or nested"
            )
        record.work.charge_spans(n_spans)

    def decode(self, encoded: Encoded, outputs: Sequence[FloatArray]) -> list[Item]:
        """What was found; `follow_up` has taken in all answers."""
        items: list[Item] = encoded.state.items
        return items


def merged(nodes: Schema) -> list[Node]:
    """Nodes with names that stand twice put together, with the children of both."""
    children: dict[str, list[Node]] = {}
    for node in nodes:
        children.setdefault(node.name, []).extend(node.children)
    return [Node(name, tuple(inner)) for name, inner in children.items()]


def _n_bytes(prompt: str, tokens: Tokens) -> int:
    """About how much memory a cached prompt takes."""
    return 4 * len(prompt) + sum(array.nbytes for array in tokens) + 800


def stripped(text: str, start: int, end: int) -> tuple[int, int]:
    """A span without white space at its edges."""
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end


# Taskflow's rule (behind 。！？?, ...... and ……, with a closing quote), and line ends.
_SENTENCE_END = re.compile(r"(?:[。！？?]|\.{6}|…{2})[”’]?|\n")


def sentence_slices(text: str, tokens: Tokens) -> list[tuple[int, int]]:
    """Tokens of each sentence; a token over a border belongs to the sentence it begins in."""
    borders = [match.end() for match in _SENTENCE_END.finditer(text)]
    splits = np.searchsorted(tokens.starts, borders).tolist()
    cuts = sorted({0, *splits, len(tokens.ids)})
    return list(pairwise(cuts))
