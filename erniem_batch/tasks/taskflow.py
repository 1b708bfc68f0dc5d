"""Extraction exactly as PaddleNLP 2.8.1 Taskflow does it, faults included.

For those who have to reproduce old results; `extract.py` is what one wants. A record is one call of
Taskflow: its text is a string or a list of strings, since there the texts of a call change each
other's answers. The faults, by place:
- `cut_into_chunks`: windows are counted in characters, by the prompt that comes last in the
  alphabet instead of the longest; they do not overlap, and their ends may be cut off by tokens.
- `chinese_sentences`: newlines are lost, which shifts all offsets behind them.
- `search_offsets`: looks tokens up in the normalised text, and may find them at a wrong place.
- `read_window`: also special tokens and padding start and end spans.
- `join_chunks`: the first answer of a stage decides for all texts whether they are classified.
- `Call.attach`: names that stand twice get their relations mixed up.
Only the order of results within a window is ours (by position); there, it is that of a Python set.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from erniem_batch.errors import RecordError
from erniem_batch.options import ExtractOptions
from erniem_batch.records import Encoded, Failure, FloatArray, IntArray, Record, Window
from erniem_batch.tasks.base import require_string, sigmoid
from erniem_batch.tasks.extract import Item, ItemTask
from erniem_batch.tasks.pairing import nearest
from erniem_batch.text.pieces import UNDERLINE
from erniem_batch.text.schema import Node, half_width, taskflow_prompt
from erniem_batch.text.tokenizer import ErnieMTokenizer, longest_first
from erniem_batch.work import Work

RESERVED_SPECIALS = 3  # though ErnieM has four
PAIR_SPECIALS = 4

Result = dict[str, Any]
Spans = list[tuple[int, int]]


@dataclass
class Example:
    """A prompt about a text, and the chunks it is read in."""

    text: str
    prompt: str
    chunks: list[str] = field(default_factory=list)


@dataclass
class Stage:
    """One name of the schema, asked about all texts of the call.

    Attributes:
        prefixes: for each text, the texts found under the parent; None at the first level.
        parents: for each text, the results found under the parent.
        examples: for each text, places of its examples are in `places`.
    """

    node: Node
    prefixes: list[list[str]] | None = None
    parents: list[list[Result]] | None = None
    examples: list[Example] = field(default_factory=list)
    places: list[list[int]] = field(default_factory=list)


@dataclass
class Call:
    """One call: its texts, their results so far, and the stages of this level."""

    texts: list[str]
    results: list[Result]
    stages: list[Stage]
    # (start, end) of every token of every window, in the order of the windows.
    offsets: list[Spans] = field(default_factory=list)


class TaskflowTask(ItemTask):
    """The value of a record is a list of Item; of a record with several texts, a list of lists."""

    mask_mode = "paddle_padded"
    padding_position_zero = True

    def __init__(self, tokenizer: ErnieMTokenizer, options: ExtractOptions, **windows: int) -> None:
        super().__init__(tokenizer, options, **windows)
        self._lang = options.schema_lang
        self._size = self.windows.size

    def encode(self, records: Sequence[Record]) -> Iterator[Encoded | Failure]:
        """Windows of the first level of each call."""
        for record in records:
            record.work.start()
            try:
                texts = record.text if isinstance(record.text, list) else [record.text]
                for text in texts:
                    require_string(text, "text")
                call = Call(list(texts), [{} for _ in texts], [])
                call.stages = [Stage(node) for node in self.schema_of(record)]
                none = np.zeros(0, np.int64)
                n_tokens = len(self.tokenizer.encode_batch(call.texts, offsets=False).ids)
                empty = Encoded(record, none, none, none, [], n_other_tokens=n_tokens, state=call)
                item: Encoded | Failure = self._round(empty)
            except RecordError as error:
                item = Failure(record.id, "encode", "RecordError", str(error))
            yield item

    def _round(self, encoded: Encoded) -> Encoded:
        """The same with all windows of the stages of this level."""
        call: Call = encoded.state
        windows: list[Window] = []
        call.offsets = []
        for stage in call.stages:
            self._set_examples(stage, call, encoded.record.work)
            for example in stage.examples:
                for chunk in example.chunks:
                    window, offsets = self._window(example.prompt, chunk)
                    windows.append(window)
                    call.offsets.append(offsets)
        return replace(encoded, windows=windows)

    def _set_examples(self, stage: Stage, call: Call, work: Work) -> None:
        if stage.prefixes is not None:
            prefixes = [prefix for of_text in stage.prefixes for prefix in of_text]
            work.require_room_for_text(
                sum(len(prefix) + len(stage.node.name) for prefix in prefixes)
            )
            work.require_room(len(prefixes) * self._size, len(prefixes))
        for i, text in enumerate(call.texts):
            parents: list[str | None] = [None] if stage.prefixes is None else [*stage.prefixes[i]]
            first = len(stage.examples)
            stage.places.append(list(range(first, first + len(parents))))
            for parent in parents:
                prompt = taskflow_prompt(stage.node.name, parent, self._lang)
                stage.examples.append(Example(text, prompt))
        if not stage.examples:
            return
        last = max(example.prompt for example in stage.examples)
        room = self._size - len(last) - RESERVED_SPECIALS
        chunks = {
            text: cut_into_chunks(text, room, self.options.split_sentence)
            for text in dict.fromkeys(example.text for example in stage.examples)
        }
        n_windows = sum(len(chunks[example.text]) for example in stage.examples)
        work.charge(n_windows * self._size, n_windows)
        for example in stage.examples:
            example.chunks = chunks[example.text]

    def _window(self, prompt: str, chunk: str) -> tuple[Window, Spans]:
        """One padded model input and the characters of its tokens, (0, 0) of special ones."""
        a_ids, a_spans = self._tokens(prompt)
        b_ids, b_spans = self._tokens(chunk)
        excess = len(a_ids) + len(b_ids) + PAIR_SPECIALS - self._size
        if excess > 0:
            n_a, n_b = longest_first(len(a_ids), len(b_ids), excess)
            a_ids, a_spans, b_ids, b_spans = a_ids[:n_a], a_spans[:n_a], b_ids[:n_b], b_spans[:n_b]
        t = self.tokenizer
        ids = [t.cls_token_id, *a_ids, t.sep_token_id, t.sep_token_id, *b_ids, t.sep_token_id]
        n_padding = self._size - len(ids)
        padded: IntArray = np.array(ids + [t.pad_token_id] * n_padding, dtype=np.int64)
        none = (0, 0)
        spans = [none, *a_spans, none, none, *b_spans, none, *[none] * n_padding]
        return Window(padded, 0, len(b_ids), len(a_ids) + 3), spans

    def _tokens(self, text: str) -> tuple[list[int], Spans]:
        ids = self.tokenizer.encode_batch([text], offsets=False).ids.tolist()
        return ids, search_offsets(
            text, self.tokenizer.tokenize(text), self.tokenizer.do_lower_case
        )

    # ---- answers ------------------------------------------------------------------------------

    def follow_up(self, encoded: Encoded, outputs: Sequence[FloatArray]) -> Encoded | None:
        """Takes in the answers of a level; the next level, if there is one."""
        call: Call = encoded.state
        at = 0
        stages: list[Stage] = []
        for stage in call.stages:
            answers = []
            for example in stage.examples:
                for chunk in example.chunks:
                    probs_L2 = sigmoid(outputs[at])
                    spans = read_window(probs_L2, call.offsets[at], self.options.position_prob)
                    answers.append(to_results(spans, example.prompt, chunk))
                    at += 1
            stages += attach(stage, join_chunks(stage, answers), call)
        call.stages = stages
        if not stages:
            return None
        n_earlier = encoded.n_earlier_windows + len(encoded.windows)
        return self._round(replace(encoded, n_earlier_windows=n_earlier))

    def decode(self, encoded: Encoded, outputs: Sequence[FloatArray]) -> list[Any]:
        """The items of each text."""
        call: Call = encoded.state
        items = [to_items(result) for result in call.results]
        return items if isinstance(encoded.record.text, list) else items[0]


def to_items(result: Result) -> list[Item]:
    """Taskflow's nested form as a tree."""
    return [
        Item(
            name,
            value["text"],
            value.get("start"),
            value.get("end"),
            value["probability"],
            to_items(value.get("relations", {})),
        )
        for name, values in result.items()
        for value in values
    ]


# ---- texts -------------------------------------------------------------------------------------


def chinese_sentences(text: str) -> list[str]:
    """Sentences without the line ends between them."""
    for pattern in (
        "([。！？?])([^”’])",
        r"(\.{6})([^”’])",
        "(…{2})([^”’])",
        "([。！？?][”’])([^，。！？?])",
    ):
        text = re.sub(pattern, r"\1\n\2", text)
    return text.rstrip().split("\n")


def cut_into_chunks(text: str, room: int, split_sentence: bool) -> list[str]:
    """Pieces of at most `room` characters; none at all where there is less than no room.

    Raises:
        RecordError: there is exactly no room; Taskflow fails too.
    """
    chunks: list[str] = []
    for sentence in chinese_sentences(text) if split_sentence else [text]:
        if len(sentence) <= room:
            chunks.append(sentence)
        elif room == 0:
            raise RecordError("the prompt leaves no room for text, on which Taskflow fails")
        else:
            chunks += [sentence[i : i + room] for i in range(0, len(sentence), room)]
    return chunks


def search_offsets(text: str, tokens: Sequence[str], lower_case: bool) -> Spans:
    """Characters of tokens, found by looking for them one after the other.

    Raises:
        RecordError: a token is not found; Taskflow fails too.
    """
    normalized, sources = [], []
    for i, char in enumerate(text):
        plain = half_width(char) if char != "～" else char
        plain = unicodedata.normalize("NFKC", char) if plain == char and char != "～" else plain
        if plain in (" ", "\t", "\n", "\r") or (
            len(plain) == 1 and unicodedata.category(plain) == "Zs"
        ):
            continue
        normalized.append(plain)
        sources += [i] * len(plain)
    haystack = "".join(normalized)
    haystack = haystack.lower() if lower_case else haystack
    spans = []
    at = 0
    for token in tokens:
        start = haystack.find(token.removeprefix(UNDERLINE), at)
        end = start + len(token.removeprefix(UNDERLINE))
        if start < 0 or end > len(sources) or start >= len(sources):
            raise RecordError("a token is not found in the text, on which Taskflow fails")
        spans.append((sources[start], sources[end - 1] + 1))
        at = end
    return spans


# ---- answers of one window ---------------------------------------------------------------------

Scored = tuple[int, int, float]


def read_window(probs_L2: FloatArray, spans: Spans, limit: float) -> list[Scored]:
    """Spans as (start, end, probability) in characters; those of the prompt are negative."""
    end_of_prompt = spans[1:].index((0, 0))
    bias = spans[end_of_prompt][1] + 1
    shifted = [
        (a - bias, b - bias) if 1 <= i <= end_of_prompt else (a, b)
        for i, (a, b) in enumerate(spans)
    ]
    starts, ends = (np.flatnonzero(column > limit).tolist() for column in probs_L2.T)
    return [
        (
            shifted[first][0],
            shifted[last][1],
            float(probs_L2[first, 0]) * float(probs_L2[last, 1]),
        )
        for first, last in nearest(starts, ends)
    ]


def to_results(spans: Sequence[Scored], prompt: str, chunk: str) -> list[Result]:
    """Spans of the text with their place, spans of the prompt without."""
    results = []
    for start, end, probability in spans:
        if end < 0:
            shift = len(prompt) + 1
            option = prompt[start + shift : end + shift]
            results.append({"text": option, "probability": probability})
        elif start >= 0:
            text = chunk[start:end]
            results.append({"text": text, "start": start, "end": end, "probability": probability})
    return results


# ---- answers of a stage ------------------------------------------------------------------------


def join_chunks(stage: Stage, answers: Sequence[list[Result]]) -> list[list[Result]]:
    """Results of each example from those of its chunks."""
    first = next((results[0] for results in answers if results), {"start": 0})
    classified = "start" not in first
    joined, at = [], 0
    for example in stage.examples:
        mine = answers[at : at + len(example.chunks)]
        if classified:
            joined.append(vote(mine))
        else:
            joined.append(shift_and_join(mine, example.chunks))
        at += len(example.chunks)
    return joined


def vote(answers: Sequence[list[Result]]) -> list[Result]:
    """The option that most chunks name first."""
    votes: dict[str, list[float]] = {}
    for results in answers:
        if results:
            tally = votes.setdefault(results[0]["text"], [0, 0.0])
            tally[0] += 1
            tally[1] += results[0]["probability"]
    if not votes:
        return []
    option, (count, total) = max(votes.items(), key=lambda item: item[1])
    return [{"text": option, "probability": total / count}]


def shift_and_join(answers: Sequence[list[Result]], chunks: Sequence[str]) -> list[Result]:
    """Results of all chunks, counted from the beginning of the text."""
    joined: list[Result] = []
    offset = 0
    for results, chunk in zip(answers, chunks, strict=True):
        for result in results:
            if "start" in result:
                result["start"] += offset
                result["end"] += offset
        joined += results
        offset += len(chunk)
    return joined


def attach(stage: Stage, answers: Sequence[list[Result]], call: Call) -> list[Stage]:
    """Puts the results of a stage in their places; the stages about what was found."""
    name, n_texts = stage.node.name, len(call.texts)
    found: list[list[Result]] = [[] for _ in range(n_texts)]
    for i, places in enumerate(stage.places):
        if stage.parents is None:
            for place in places:
                if answers[place]:
                    call.results[i].setdefault(name, []).extend(answers[place])
            found[i] += call.results[i].get(name, [])
        else:
            for parent, place in zip(stage.parents[i], places, strict=False):
                if answers[place]:
                    relations = parent.setdefault("relations", {})
                    relations.setdefault(name, []).extend(answers[place])
            for parent in stage.parents[i]:
                found[i] += parent.get("relations", {}).get(name, [])
    prefixes = [
        [result["text"] for place in places for result in answers[place]] for places in stage.places
    ]
    return [Stage(child, prefixes, found) for child in stage.node.children]
