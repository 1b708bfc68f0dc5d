"""Small stand-ins that tests share: models that do as they are told, and helpers to write input."""

import gzip
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from erniem_batch import ErnieMConfig, ErnieMForTokenClassification, ErnieMTokenizer, storage
from erniem_batch.config import PredictorConfig
from erniem_batch.job import run
from erniem_batch.job.actor import Assignment, Receipt, UnitTagger
from erniem_batch.job.attempts import Attempt
from erniem_batch.job.chunks import Chunk
from erniem_batch.job.config import JobConfig
from erniem_batch.job.manifest import Fence
from erniem_batch.job.read import UnitReader, input_schema
from erniem_batch.job.units import Unit, files_of, find_files, from_table, plan_units, to_table
from erniem_batch.job.write import COUNTED_SCHEMA
from erniem_batch.model.fetch import model_digest
from erniem_batch.model.heads import (
    HEADS,
    ErnieMForInformationExtraction,
    ErnieMForQuestionAnswering,
)
from erniem_batch.model.packed import Packed
from erniem_batch.options import NerOptions, option_names
from erniem_batch.predictor import Predictor, make_task
from erniem_batch.records import Failure, Outcome, Record
from erniem_batch.tasks.ner import NerTask

# What a job adds to the columns of its input when it looks for named entities.
ADDED_SCHEMA = pa.schema([*NerTask.schema, *COUNTED_SCHEMA])

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


class LookupModel(nn.Module):
    """Labels by token id alone: each id named gets its label, all others "O".

    Args:
        label_ids: label index by token id.
        fails_on: a batch with this token id raises a RuntimeError.
        blind: so many tokens at either edge of a window are seen as "O".
    """

    def __init__(
        self,
        label_ids: Mapping[int, int],
        labels: Sequence[str] = LABELS,
        *,
        fails_on: int | None = None,
        blind: int = 0,
    ) -> None:
        super().__init__()
        self.config = ErnieMConfig(vocab_size=9000).with_labels(labels)
        self.label_ids = dict(label_ids)
        self.fails_on = fails_on
        self.blind = blind
        self.batches: list[tuple[int, ...]] = []  # lengths of the texts of each
        table = torch.zeros(9000, len(labels))
        table[:, 0] = 4.0
        for token, label in self.label_ids.items():
            table[token, 0], table[token, label] = 0.0, 5.0
        self.table = nn.Parameter(table)

    def rows(self, batch: Packed) -> Tensor:
        self.batches.append(tuple(batch.lengths))
        if self.fails_on is not None and bool((batch.ids_T == self.fails_on).any()):
            raise RuntimeError(f"a kernel does not like token {self.fails_on}\nsecond line")
        logits_TC = self.table[batch.ids_T].clone()
        if self.blind:
            for rows in logits_TC.split(batch.lengths):
                for edge in (rows[1 : 1 + self.blind], rows[-1 - self.blind : -1]):
                    edge[:] = 0.0
                    edge[:, 0] = 4.0
        return logits_TC


class RaisingTagger(UnitTagger):
    """Works until it meets the unit "b": a fault of ours, which tells of nothing but its place."""

    def _tag_chunk(self, chunk: Chunk, tally: Any, attempt: Attempt) -> pa.Table:
        if self.unit_output == "b":
            raise LookupError(f"nobody expects this: {chunk.texts}")
        return super()._tag_chunk(chunk, tally, attempt)

    def tag(self, unit: Unit) -> Receipt:
        self.unit_output = unit.output
        return super().tag(unit)


KILLER = "the row that kills"


class DyingPredictor(Predictor):
    """Ends its process at one text, as the kernel does when memory runs out."""

    def predict(self, records: Sequence[Record]) -> list[Outcome]:
        if any(record.text == KILLER for record in records):
            os._exit(1)
        return super().predict(records)


class DyingTagger(UnitTagger):
    """A tagger whose process dies at one text."""

    def load(self, config: PredictorConfig) -> Predictor:
        return DyingPredictor.load(config)


class RefusingPredictor(Predictor):
    """Fails at one text, as a kernel of torch may."""

    def predict(self, records: Sequence[Record]) -> list[Outcome]:
        return [
            Failure(record.id, "forward", "RuntimeError", "no kernel for this")
            if record.text == KILLER
            else outcome
            for record, outcome in zip(records, super().predict(records), strict=True)
        ]


class RefusingTagger(UnitTagger):
    """A tagger that makes one text a dead letter."""

    def load(self, config: PredictorConfig) -> Predictor:
        return RefusingPredictor.load(config)


class Killed(BaseException):
    """The process ends here, without a word to anybody."""


class Calls:
    """Stands for the handle of an actor: notes what is called."""

    def __init__(self) -> None:
        self.made: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        class Method:
            remote = staticmethod(lambda *values: self.made.append((name, values)))

        return Method


class Alone:
    """Stands for the lease of a folder into which nobody else writes.

    Args:
        generation: of the lease.
        taken_over: see `lease.Holder`.
    """

    def __init__(self, generation: int = 1, taken_over: int = 0) -> None:
        self.fence = Fence("me", generation)
        self.taken_over = taken_over

    def check(self) -> None:
        pass

    def prove(self) -> None:
        pass

    write = staticmethod(storage.write)

    def remove(self, path: str) -> None:
        storage.delete([path])


def letters_path(output: Path | str, name: str = "a") -> Path:
    """The dead letters of an output of which there was one attempt."""
    (path,) = (Path(output) / "_dead_letters").glob(f"{name}.rows-????????.parquet")
    return path


class UnitsHere:
    """Stands for `run.tag_units`: this process tags, which saves the start of Ray and its actors.

    Args:
        tagger: default: the one that a test has given to the stream, else that of all jobs.
        until: the process is killed after so many units.

    Attributes:
        done: receipts of the units it has tagged, all runs together.
    """

    def __init__(self, tagger: type[UnitTagger] | None = None, until: int | None = None) -> None:
        self.tagger = tagger
        self.until = until
        self.done: list[Receipt] = []

    def __call__(
        self, folder: Any, info: Any, units: Any, assignment: Assignment, lease: Any, *_: Any
    ) -> run.Work:
        run.connect(assignment.config)
        run.unmark_success(folder.output, lease)
        of_stream = getattr(run.stream, "keywords", {}).get("tagger", UnitTagger)
        tagger = (self.tagger or of_stream)(assignment, Calls())
        ledger = run.LedgerWriter(folder, info.generation)
        receipts: list[Receipt] = []
        for unit in from_table(units):
            if len(self.done) == self.until:
                raise Killed
            receipts.append(tagger.tag(unit))
            self.done.append(receipts[-1])
            if not receipts[-1].error:
                ledger.add(receipts[-1])
        ledger.flush()
        lease.check()
        return run.Work(receipts)


def tag_here(monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Receipt]:
    """Lets jobs of this process tag without Ray, and gives the receipts as they come."""
    here = UnitsHere(**options)
    monkeypatch.setattr(run, "connect", lambda config: False)
    monkeypatch.setattr(run, "tag_units", here)
    return here.done


class Kept:
    """A predictor that several runs use: nobody closes it."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._predictor, name)

    def close(self) -> None:
        pass


def quick_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of one test load their model once and draw no charts: a second less for each job."""
    load = Predictor.load.__func__  # type: ignore[attr-defined]
    loaded = cache(lambda kind, config: load(kind, config))
    monkeypatch.setattr(Predictor, "load", classmethod(lambda *given: Kept(loaded(*given))))
    monkeypatch.setattr(run, "_page", lambda *_: "")


def make_tagger(
    config: JobConfig, schema: pa.Schema, tagger: type[UnitTagger] = UnitTagger, **changes: Any
) -> UnitTagger:
    """A tagger as it is in an actor, whose progress goes nowhere."""
    values = {
        "config": config,
        "schema": schema,
        "output": str(config.output),
        "fingerprint": "f1",
        "model_digest": model_digest(Path(config.model)),
        "predictor": replace(config.predictor, n_threads=1),
    }
    return tagger(Assignment(**{**values, **changes}), Calls())


def tag_files(
    config: JobConfig, tagger: type[UnitTagger] = UnitTagger
) -> tuple[list[dict[str, Any]], UnitTagger]:
    """Plans the input of a job and tags all of its units, without Ray: receipts, and the tagger."""
    files = list(files_of(find_files(config.input, config.input_format)))
    schema = input_schema(
        files,
        config.text_column,
        config.carried_columns,
        fields=config.fields,
        added=config.added_columns,
        text_flag=config.text_flag,
    )
    units = plan_units(files, config.bytes_per_unit, config.text_column, config.limit)
    made = make_tagger(config, schema, tagger)
    return made(to_table(units)).to_pylist(), made


def read_unit(
    unit: Unit, text_column: str, columns: Sequence[str] | None, schema: pa.Schema
) -> Iterator[Chunk]:
    """The rows of a unit, in order."""
    return UnitReader(unit, text_column, columns, schema, added=ADDED_SCHEMA.names).chunks()


def ner_config(cls: Any, **values: Any) -> Any:
    """A PredictorConfig or JobConfig, options of NER among its values."""
    own = {name: values.pop(name) for name in option_names("ner") if name in values}
    return cls(options=NerOptions(**own), **values)


def make_predictor(model: nn.Module, tokenizer: ErnieMTokenizer, **options: Any) -> Predictor:
    """A predictor for a model that no folder holds.

    Args:
        options: of NerOptions and of PredictorConfig.
    """
    settings = {"n_threads": 1, "max_batch_tokens": 1024, **options}
    config = ner_config(PredictorConfig, device="cpu", **settings)
    task = make_task(config, tokenizer, model.config)
    return Predictor(config, tokenizer, model, task)


TINY_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "initializer_range": 0.25,
}


def save_tiny_model(
    folder: Path,
    tokenizer: ErnieMTokenizer,
    head: str,
    labels: Sequence[str] = LABELS,
    *,
    problem_type: str | None = None,
    **sizes: Any,
) -> Path:
    """A random model, hidden 32 and 2 layers, that takes sides: its scores differ from text to
    text, and it finds something, but not everything, in most of them.

    Args:
        head: name of its class in `erniem_batch.model.heads`.
        sizes: that differ, by their names in ErnieMConfig.
    """
    torch.manual_seed(11)
    config = ErnieMConfig(vocab_size=len(tokenizer), **{**TINY_SIZES, **sizes}).with_labels(labels)
    model = HEADS[head](replace(config, problem_type=problem_type))
    with torch.no_grad():
        _take_sides(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _take_sides(model: Any) -> None:
    """Changes the last layer of a random model, whose scores would be nearly equal."""
    if isinstance(model, ErnieMForTokenClassification):
        model.classifier.bias[0] = 1.0  # else "O" is as rare as any other label
    elif isinstance(model, ErnieMForInformationExtraction):
        for layer in (model.linear_start, model.linear_end):
            layer.weight *= 2.0
            layer.bias[:] = -2.0  # else every second token starts and ends something
    elif isinstance(model, ErnieMForQuestionAnswering):
        model.qa_outputs.weight *= 2.0
    elif hasattr(model, "classifier"):
        model.classifier.weight *= 4.0


def save_tiny_ner_model(folder: Path, tokenizer: ErnieMTokenizer, **sizes: Any) -> Path:
    """A random model, hidden 32 and 2 layers, that finds something in every sentence.

    Args:
        sizes: that differ, by their names in ErnieMConfig.
    """
    return save_tiny_model(folder, tokenizer, "ErnieMForTokenClassification", **sizes)


# What a tiny model of a task is made of; names of several models of one task follow a dash.
TINY_MODELS: dict[str, dict[str, Any]] = {
    "ner": {"head": "ErnieMForTokenClassification"},
    "classify": {
        "head": "ErnieMForSequenceClassification",
        "labels": ["sports", "politics", "science"],
    },
    "classify-entailment": {
        "head": "ErnieMForSequenceClassification",
        "labels": ["contradiction", "neutral", "entailment"],
    },
    "choose": {"head": "ErnieMForMultipleChoice"},
    "qa": {"head": "ErnieMForQuestionAnswering"},
    "embed": {"head": "ErnieMForEmbedding"},
    "extract": {"head": "ErnieMForInformationExtraction"},
}


def save_tiny_models(folder: Path, tokenizer: ErnieMTokenizer) -> dict[str, Path]:
    """A tiny model for every name of TINY_MODELS."""
    return {
        name: save_tiny_model(folder / name, tokenizer, **what)
        for name, what in TINY_MODELS.items()
    }


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]], ascii_only: bool = False) -> Path:
    """One JSON object a line; compressed by the name of the file."""
    lines = [json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows]
    return write_bytes(path, "".join(lines).encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> Path:
    """The content as a file; compressed by the name of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = pa.compress(content, "zstd", asbytes=True)
    path.write_bytes(content)
    return path


def write_parquet(path: Path, table: pa.Table, group_rows: int | None = None) -> Path:
    """The table in row groups of so many rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group_rows)
    return path


def bad_utf8_strings(values: Sequence[bytes]) -> pa.Array:
    """An Arrow string column of any bytes, as careless writers leave it in Parquet files."""
    offsets = np.cumsum([0, *map(len, values)]).astype(np.int32)
    return pa.Array.from_buffers(
        pa.string(), len(values), [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(values))]
    )


def save_tiny_service(folder: Path, tokenizer: ErnieMTokenizer) -> Path:
    """Tiny models of all tasks as a training of several tasks leaves them: one folder to serve."""
    models = save_tiny_models(folder, tokenizer)
    models["embed"].rename(folder / "encoder")
    return folder
