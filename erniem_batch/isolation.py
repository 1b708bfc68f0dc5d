"""Which items of a failing batch are guilty, found in few passes. No torch, no model in here."""

from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_isolated(
    items: Sequence[Item],
    run: Callable[[list[Item]], Sequence[Result]],
    accuse: Callable[[RuntimeError], Result],
) -> list[Result]:
    """A result for each item, in order, though some items make every pass they are in fail.

    A failing batch of n items costs at most ceil(log2(n)) + 1 more passes for each guilty item:

        A B C D E F G H    fails; E is guilty
        A B C D            passes: keep its results, look among E F G H
                E F        fails: put G H aside, look in E F
                E          fails: put F aside; E was in failing passes only, accuse it
                  F G H    what was put aside passes

    An item is accused only after two failing passes, since errors may also come and go.

    Args:
        run: one pass: results of some of the items, in order; only a RuntimeError is taken for
            the fault of an item.
        accuse: the result of a guilty item, from the error of the last pass it was in.
    """
    results: dict[int, Result] = {}

    def attempt(places: Sequence[int]) -> RuntimeError | None:
        try:
            outputs = run([items[i] for i in places])
        except RuntimeError as error:
            # A traceback keeps the tensors of the failed pass in memory.
            return error.with_traceback(None)
        results.update(zip(places, outputs, strict=True))
        return None

    batch: Sequence[int] = range(len(items))
    while batch:
        error = attempt(batch)
        if error is None:
            break
        suspects: Sequence[int] = batch
        aside: list[int] = []
        while len(suspects) > 1:
            middle = len(suspects) // 2
            left, right = suspects[:middle], suspects[middle:]
            left_error = attempt(left)
            if left_error is None:
                suspects = right
            else:
                error, suspects = left_error, left
                aside += right
        if not aside:  # no smaller pass has failed yet: the suspect was in a single failing one
            error = attempt(suspects)
        if error is not None:
            results[suspects[0]] = accuse(error)
        batch = aside
    return [results[i] for i in range(len(items))]
