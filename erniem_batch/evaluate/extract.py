"""Extraction: entities as strict spans by name, and relations between spans."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from erniem_batch.evaluate.measure import Index, Measure, f1
from erniem_batch.evaluate.ner import figures_by_label, span_counts, span_figures
from erniem_batch.evaluate.scorers import Figures, Scorer, missed_and_wrong
from erniem_batch.evaluate.values import FoundItem
from erniem_batch.gold import Annotated, Facts
from erniem_batch.labels import Span
from erniem_batch.text.schema import prompt_of

# Subject, name, object.
Places = tuple[tuple[int, int], str, tuple[int, int]]


class ExtractScorer(Scorer):
    """Entities are the items of the first level; relations are the items below others.

    A relation is right if its name and the places of its subject and object are. Of a row with a
    prompt only that prompt counts: what was found under the name, or under the name about a parent
    that makes the same prompt. Options (which have no place) do not count.
    """

    headline: ClassVar[str] = "f1"
    tuned: ClassVar[str] = "f1"
    columns: ClassVar[tuple[str, ...]] = (
        "precision",
        "recall",
        "f1",
        "relation_precision",
        "relation_recall",
        "relation_f1",
        "n_gold",
        "n_predicted",
        "n_relation_gold",
    )

    def __init__(
        self, gold: Sequence[Annotated], values: Sequence[Any], names: Mapping[str, str]
    ) -> None:
        super().__init__(gold, values, names)
        self.gold_spans: list[set[Span]] = [set(row.gold.spans) for row in gold]
        self.gold_relations: list[set[Places]] = [
            {(s[:2], name, o[:2]) for s, name, o in row.gold.relations} for row in gold
        ]
        self.found_spans: list[set[Span]] = []
        self.found_relations: list[set[Places]] = []
        for row, value in zip(gold, values, strict=True):
            spans, relations = found_in(value or (), row.gold, names)
            self.found_spans.append({span for span, _ in spans})
            self.found_relations.append({relation for relation, _ in relations})
        # Without a single one in the gold rows, relations were not annotated.
        self.has_relations = any(self.gold_relations)

    @cached_property
    def measures(self) -> dict[str, Measure]:
        """Micro F1 of entities, and of relations."""
        found = {"f1": Measure(span_counts(self.gold_spans, self.found_spans), f1)}
        if self.has_relations:
            counts = span_counts(self.gold_relations, self.found_relations)
            found["relation_f1"] = Measure(counts, f1)
        return found

    def figures(self, rows: Index | None = None) -> Figures:
        """Precision, recall and F1 of entities, and of relations."""
        found = span_figures(self.measures["f1"].of(rows))
        if self.has_relations:
            found |= span_figures(self.measures["relation_f1"].of(rows), "relation_")
        return found

    def by_label(self) -> dict[str, Figures]:
        """Entities by name, then relations by name."""
        found = figures_by_label(self.gold_spans, self.found_spans)
        if self.has_relations:
            relations = figures_by_label(self.gold_relations, self.found_relations, place=1)
            found |= {f"{name} (relation)": figures for name, figures in relations.items()}
        return found

    def detail(self, i: int) -> dict[str, Any]:
        """What was missed and what is wrong."""
        found = missed_and_wrong(self.gold_spans[i], self.found_spans[i])
        if self.has_relations:
            inner = missed_and_wrong(self.gold_relations[i], self.found_relations[i])
            found = {
                "right": found["right"] and inner["right"],
                **{name: [*found[name], *inner[name]] for name in ("missed", "wrong")},
            }
        return found


def found_in(
    items: Sequence[FoundItem], gold: Facts, names: Mapping[str, str]
) -> tuple[list[tuple[Span, FoundItem]], list[tuple[Places, FoundItem]]]:
    """Entities and relations that count for a row, each with the item it is from."""
    by_id = {item.id: item for item in items}
    spans: list[tuple[Span, FoundItem]] = []
    relations: list[tuple[Places, FoundItem]] = []
    for item in items:
        if item.start is None or item.end is None:
            continue
        name = names.get(item.name, item.name)
        parent = None if item.parent is None else by_id.get(item.parent)
        place = (item.start, item.end)
        if gold.prompt is not None:
            if gold.prompt in _prompts(name, parent):
                spans.append(((*place, gold.prompt), item))
        elif item.parent is None:
            spans.append(((*place, name), item))
        elif parent is not None and parent.start is not None and parent.end is not None:
            relations.append((((parent.start, parent.end), name, place), item))
    return spans, relations


def _prompts(name: str, parent: FoundItem | None) -> set[str]:
    """What may have been asked to find an item."""
    if parent is None:
        return {name}
    return {prompt_of(name, parent.text, language) for language in ("zh", "en")}
