"""The small Ray actor that all others tell how far they are. It imports nothing: its process starts
in no time, and needs no memory for torch.
"""

from collections import Counter


class ProgressCounter:
    """Counts of all actors, added up in one small Ray actor."""

    def __init__(self) -> None:
        self._units: dict[str, tuple[int, int, int]] = {}
        self._sums = [0, 0, 0]
        self._at_work: dict[str, str] = {}
        self._figures: dict[str, dict[str, float]] = {}

    def add(
        self, actor: str, unit_id: str, n_rows: int, n_tokens: int, n_bytes: int, done: bool
    ) -> None:
        """How far a unit is; a unit begun again begins at zero.

        Args:
            n_rows, n_tokens, n_bytes: of the unit so far.
            done: whether all of it has been read and tagged.
        """
        before = self._units.get(unit_id, (0, 0, 0))
        now = self._units[unit_id] = (n_rows, n_tokens, n_bytes)
        self._sums = [s + n - b for s, n, b in zip(self._sums, now, before, strict=True)]
        self._at_work[unit_id] = actor
        if done:
            del self._at_work[unit_id]

    def report(self, actor: str, figures: dict[str, float]) -> None:
        """What an actor has done so far, by name."""
        self._figures[actor] = figures

    def sums(self) -> tuple[int, int, int, int]:
        """Rows, tokens and bytes of all units, and the number of actors at work."""
        n_rows, n_tokens, n_bytes = self._sums
        return n_rows, n_tokens, n_bytes, len(set(self._at_work.values()))

    def figures(self) -> dict[str, float]:
        """Those of all actors, added up."""
        sums: Counter[str] = Counter()
        for figures in self._figures.values():
            sums.update(figures)
        return dict(sums)
