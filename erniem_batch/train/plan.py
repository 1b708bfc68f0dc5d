"""Which examples are computed together, in which step, and by which worker.

All of it follows from the examples, the settings and the seed. So every worker and every resumed
run makes the same plan without asking anybody.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from erniem_batch.model.heads import IGNORED_LABEL
from erniem_batch.train.examples import Example


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Examples of one task for one forward and backward pass."""

    task: str
    examples: tuple[Example, ...]

    @property
    def n_tokens(self) -> int:
        """Real tokens."""
        return sum(len(ids) for example in self.examples for ids in example.ids)

    @property
    def n_targets(self) -> int:
        """How many losses are summed up: labelled tokens of ner, examples of other tasks."""
        if self.task != "ner":
            return len(self.examples)
        labels = (example.targets["labels"] for example in self.examples)
        return sum(int((x != IGNORED_LABEL).sum()) for x in labels)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(example.longest for example in self.examples)

    @property
    def n_padded_tokens(self) -> int:
        """What is computed."""
        return self.longest * sum(len(example.ids) for example in self.examples)


Step = tuple[MicroBatch, ...]


def micro_batches(
    task: str, examples: Sequence[Example], max_tokens: int, rng: random.Random
) -> list[MicroBatch]:
    """Examples of similar lengths within a budget of padded tokens, in random order.

    An example that is over the budget by itself gets a batch of its own.
    """
    shuffled = list(examples)
    rng.shuffle(shuffled)
    shuffled.sort(key=lambda example: example.longest // 4)  # similar, otherwise at random
    batches: list[list[Example]] = []
    longest = n_sequences = 0
    for example in shuffled:
        longest = max(longest, example.longest)
        n_sequences += len(example.ids)
        if not batches or longest * n_sequences > max_tokens:
            batches.append([])
            longest, n_sequences = example.longest, len(example.ids)
        batches[-1].append(example)
    rng.shuffle(batches)
    return [MicroBatch(task, tuple(batch)) for batch in batches]


def interleaved(streams: Mapping[str, Sequence[MicroBatch]]) -> list[MicroBatch]:
    """All batches of all tasks, those of each spread evenly over the whole.

    Example:
        Four of a and two of b become a b a a b a.
    """
    placed = [
        ((i + 0.5) / len(batches), task, i)
        for task, batches in streams.items()
        for i in range(len(batches))
    ]
    return [streams[task][i] for _, task, i in sorted(placed)]


def steps_of(batches: Sequence[MicroBatch], size: int) -> list[Step]:
    """Batches in groups of `size`; after each group the weights change."""
    return [tuple(batches[i : i + size]) for i in range(0, len(batches), size)]


def share_of(step: Step, rank: int, world_size: int) -> list[tuple[int, MicroBatch]]:
    """The batches of a step that one worker computes, with their places in the step."""
    return [(i, batch) for i, batch in enumerate(step) if i % world_size == rank]
