"""Taggers whose model fails in ways that real ones do."""

import ctypes
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from erniem_batch.config import PredictorConfig
from erniem_batch.job.actor import Receipt, UnitTagger
from erniem_batch.job.units import Unit
from erniem_batch.predictor import Predictor
from erniem_batch.records import FloatArray, Outcome, Record, Window

POISON = "œ"  # a text with this word makes every forward pass fail that it is part of
KILLER = "☠ kills"  # ends the process
HANGER = "⌛ hangs"  # is never done
LOCKER = "🔒 locks"  # is never done either, and holds Python's lock
HUNGRY_TOKENS = 400  # more in one pass, and there is no memory left


class FaultyPredictor(Predictor):
    """Counts its forward passes in a file, and fails as told."""

    passes: Path
    poisonous = False
    hungry = False

    def predict(self, records: Sequence[Record]) -> list[Outcome]:
        for record in records:
            if record.text == KILLER:
                os._exit(1)
            while record.text == HANGER:
                time.sleep(1)
            if record.text == LOCKER:
                ctypes.PyDLL(None).sleep(3600)
        return super().predict(records)

    def _run(self, windows: Sequence[Window]) -> Iterator[FloatArray]:
        with self.passes.open("a") as file:
            file.write(f"{len(windows)}\n")
        (poison,) = self.tokenizer(POISON)["input_ids"][1:-1]
        if self.poisonous and any(poison in window.ids for window in windows):
            raise RuntimeError("the kernel does not like this")
        if self.hungry and sum(len(window.ids) for window in windows) > HUNGRY_TOKENS:
            raise torch.OutOfMemoryError("CUDA out of memory (not really)")
        return super()._run(windows)


class FaultyTagger(UnitTagger):
    """Takes what it shall do from a folder, whose path is part of the output's."""

    def load(self, config: PredictorConfig) -> Predictor:
        predictor = FaultyPredictor.load(config)
        work = Path(self._run.output).parent
        predictor.passes = work / f"passes-{Path(self._run.output).name}.{os.getpid()}"
        predictor.poisonous = (work / "poisonous").exists()
        predictor.hungry = (work / "hungry").exists()
        return predictor


class FailingTagger(UnitTagger):
    """Storage lets it down at one unit."""

    def tag(self, unit: Unit) -> Receipt:
        if unit.output.startswith("b"):
            return Receipt(unit.id, unit.output, error="the storage is on fire")
        return super().tag(unit)


def count_passes(output: Path) -> list[int]:
    """Windows of each forward pass of a run."""
    files = output.parent.glob(f"passes-{output.name}.*")
    return [int(line) for file in files for line in file.read_text().splitlines()]


def words(i: int, n: int = 12) -> str:
    """Some words, always the same for a number."""
    names = ("Ada", "London", "Сергей", "Москве", "北京", "über", "one", "two", "three", "माल")
    return " ".join(names[(i * 7 + k * (k + 3)) % len(names)] for k in range(n)) + f" {i}"
