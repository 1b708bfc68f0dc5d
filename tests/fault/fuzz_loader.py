"""The loader fuzzed: damaged model folders must end in an error of ours, never in anything else.

    python -m tests.fault.fuzz_loader --minutes 10 --seed 1

Folders of every form that is read are made; in each case a file of one is damaged, and the folder
is loaded as a user would load it. The case must end in a model whose tensors are those of the file,
or in a CheckpointError or ConfigError. Cases run in child processes with a limit of memory, so that
a crash, a hang and a bomb are seen as well; the damaged folders of faults are kept. A case is known
by seed and number: `--first 123 --cases 1` repeats it.
"""

import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any, BinaryIO

import numpy as np
import torch
from cyclopts import App, Parameter
from paddle_files import as_paddle, write_pdparams
from safetensors.torch import save_file

from erniem_batch import ErnieMConfig, ErnieMForTokenClassification, ErnieMTokenizer
from erniem_batch.errors import CheckpointError, ConfigError
from erniem_batch.model.checkpoint import save_overlay
from erniem_batch.model.convert import convert
from erniem_batch.model.fetch import model_digest
from erniem_batch.thresholds import read_thresholds

from .mutations import mutations_for

BATCH = 40
SECONDS_A_CASE = 30
# Above what the process holds before.
MEMORY = 1 << 30
TOKENIZER = Path(__file__).parents[1] / "data" / "tiny_tokenizer"
WEIGHTS = (".safetensors", ".bin", ".pdparams")
TEXTS = ["Ada Lovelace met 2月8日 in London.", "ﬁn ½ ㌔ [SEP] 😀", ""]


# ---- folders ----------------------------------------------------------------------------------


def make_folders(root: Path) -> dict[str, torch.Tensor]:
    """A folder of each form below `root`, all with the same tensors, which are returned."""
    config = ErnieMConfig(
        vocab_size=60,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=34,
        id2label={0: "O", 1: "B-PER", 2: "I-PER"},
    )
    torch.manual_seed(1)
    model = ErnieMForTokenClassification(config).eval()
    with torch.no_grad():  # what int8 stores exactly, so that all folders hold the same
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-127, 128, parameter.shape) / 128)
            parameter.view(-1)[:: parameter.shape[-1]] = 127 / 128
    model.save_pretrained(root / "safetensors")
    model.save_pretrained(root / "int8", storage="int8")
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    _add_others(root, model, tensors)
    shutil.copytree(TOKENIZER, root / "tokenizer")
    (root / "thresholds").mkdir()
    (root / "thresholds" / "scores.json").write_text('{"*": 0.5, "de": {"PER": 0.6}}')
    (root / "thresholds" / "scores.yaml").write_text("'*': 0.5\nde: {PER: 0.6}\nno: {PER: 0.1}\n")
    return tensors


def _add_others(
    root: Path, model: ErnieMForTokenClassification, tensors: dict[str, torch.Tensor]
) -> None:
    names = sorted(tensors)
    for form in ("shards", "torch", "torch_old", "paddle_2", "paddle_4", "paddle_5", "paddle_old"):
        (root / form).mkdir()
        model.config.save_pretrained(root / form)
    files = {}
    for i in range(2):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names[i::2]}, root / "shards" / file)
        files |= dict.fromkeys(names[i::2], file)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (root / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(tensors, root / "torch" / "pytorch_model.bin")
    old: Any = {"_use_new_zipfile_serialization": False}
    torch.save(tensors, root / "torch_old" / "pytorch_model.bin", **old)
    arrays = as_paddle(model)
    write_pdparams(root / "paddle_2", arrays)
    for protocol in (4, 5):
        path = root / f"paddle_{protocol}" / "model_state.pdparams"
        path.write_bytes(pickle.dumps({**arrays, "x@@": {"a": "b"}}, protocol=protocol))
    _make_legacy(root / "paddle_old", arrays)
    convert(root / "safetensors", root / "paddle_new", layout="paddle")
    _make_overlay(root, model)


def _make_legacy(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    nested = {"init_args": [{**values, "init_class": "ErnieMModel"}], "init_class": "X"}
    (folder / "model_config.json").write_text(json.dumps(nested))
    write_pdparams(folder, {name: (name, array) for name, array in arrays.items()})


def _make_overlay(root: Path, model: ErnieMForTokenClassification) -> None:
    with torch.no_grad():
        bias = model.classifier.bias
        before = bias.clone()
        bias.add_(1)
        model.save_pretrained(root / "overlay" / "base")
        bias.copy_(before)
    save_overlay(model, root / "overlay" / "over", root / "overlay" / "base")


# ---- one case ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A damaged copy of a folder.

    Attributes:
        form: of the folder.
        has_weights: the weights are as they were.
        is_converted: the folder is converted, not only loaded.
    """

    folder: Path
    form: str
    file: str
    damage: str
    has_weights: bool
    is_converted: bool


def make_case(seed: int, number: int, root: Path, target: Path) -> Case:
    """The case of a seed and a number, written to `target`."""
    random = Random(f"{seed}-{number}")
    forms = sorted(path.name for path in root.iterdir())
    form = random.choice([*forms, "tokenizer", "tokenizer"])
    shutil.copytree(root / form, target)
    path = random.choice(sorted(path for path in target.rglob("*") if path.is_file()))
    content, done = path.read_bytes(), []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        mutation = random.choice(mutations_for(path.name))
        try:
            content = mutation(random, content) if content else content
        except (ValueError, RecursionError, IndexError, struct.error):  # damaged before
            break
        done.append(mutation.__name__)
    path.write_bytes(content)
    file = path.relative_to(target).as_posix()
    has_weights = not path.name.endswith(WEIGHTS)
    return Case(target, form, file, " ".join(done), has_weights, number % 10 == 0)


def outcome(case: Case, tensors: Mapping[str, torch.Tensor]) -> str:
    """What became of a case: a word for it, or a traceback in several lines."""
    try:
        return _load(case, tensors)
    except (CheckpointError, ConfigError) as error:
        if len(str(error)) > 5000:
            return f"message\nof {len(str(error))} characters: {str(error)[:300]}"
        return type(error).__name__
    except BaseException:
        return f"fault\n{traceback.format_exc(limit=-6)}"


def _load(case: Case, tensors: Mapping[str, torch.Tensor]) -> str:
    if case.form == "thresholds":
        read_thresholds(str(case.folder / case.file))
        return "loaded"
    if case.form == "tokenizer":
        tokenizer = ErnieMTokenizer.from_pretrained(case.folder)
        model_digest(case.folder)
        ids = tokenizer.encode_batch(TEXTS).ids
        known = set(tokenizer.get_vocab().values())
        return "loaded" if set(ids.tolist()) <= known else "fault\nan id that no token has"
    folder = case.folder / "over" if case.form == "overlay" else case.folder
    model_digest(folder)
    if case.is_converted:
        convert(folder, case.folder.with_name("converted"))
        return "converted"
    model = ErnieMForTokenClassification.from_pretrained(folder)
    with torch.inference_mode():
        model(torch.tensor([[0, 5, 2]]), attention_mask=torch.ones(1, 3, dtype=torch.long))
    if case.has_weights and not _is_same(model, tensors):
        return "fault\nother tensors than those of the file"
    return "loaded"


def _is_same(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == tensors.keys() and all(
        torch.equal(tensor, tensors[name]) for name, tensor in state.items()
    )


# ---- many cases -------------------------------------------------------------------------------


@dataclass
class Report:
    """What became of all cases.

    Attributes:
        outcomes: how often, by form of the folder and outcome.
        faults: number, file and traceback or signal of each case that ended as it must not.
        peak: of memory of the children, in bytes.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[tuple[int, str]] = field(default_factory=list)
    n_cases: int = 0
    peak: int = 0


class Fuzzer:
    """Runs cases in children.

    Args:
        keep: folder for the damaged folders of faults.
    """

    def __init__(self, work: Path, seed: int, keep: Path) -> None:
        self._root = work / "folders"
        self._work = work
        self._seed = seed
        self._keep = keep
        self._tensors = make_folders(self._root)
        self.report = Report()

    def run(self, first: int, n_cases: int) -> None:
        """A batch of cases; after a crash the rest goes on in another child."""
        number = first
        while number < first + n_cases:
            number = self._in_child(number, first + n_cases)

    def _in_child(self, first: int, end: int) -> int:
        """Number of the next case that has not been run."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(reader)
                with os.fdopen(writer, "wb") as file:
                    self._work_off(first, end, file)
                status = 0
            finally:  # never back to what the parent does
                os._exit(status)
        os.close(writer)
        with os.fdopen(reader, "rb") as file:
            told = [json.loads(line) for line in file]
        _, status, usage = os.wait4(child, 0)
        self.report.peak = max(self.report.peak, usage.ru_maxrss << 10)
        number = first
        for number, form, file_name, damage, word in told:
            self._count(number, form, f"{file_name} ({damage})", word)
        started = first + len(told)
        if status == 0:
            return end
        self._count(started, "?", "a child", f"fault\nended with status {status}")
        return started + 1

    def _work_off(self, first: int, end: int, file: BinaryIO) -> None:
        """In the child: one line for each case that came to an end."""
        held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # SentencePiece writes to it
        for number in range(first, end):
            signal.alarm(SECONDS_A_CASE)
            target = self._work / "case"
            for folder in (target, self._work / "converted"):
                shutil.rmtree(folder, ignore_errors=True)
            case = make_case(self._seed, number, self._root, target)
            told = [number, case.form, case.file, case.damage, outcome(case, self._tensors)]
            file.write(json.dumps(told).encode() + b"\n")
            file.flush()

    def _count(self, number: int, form: str, where: str, word: str) -> None:
        kind, _, detail = word.partition("\n")
        self.report.n_cases += 1
        self.report.outcomes[form, kind] += 1
        if detail:
            self.report.faults.append((number, f"{form}/{where}: {detail}"))
            shutil.rmtree(self._keep / str(number), ignore_errors=True)
            make_case(self._seed, number, self._root, self._keep / str(number))


app = App(help=__doc__)


@app.default
def fuzz(
    *,
    minutes: float = 10.0,
    cases: int | None = None,
    seed: int = 0,
    first: int = 0,
    keep: Annotated[Path, Parameter(help="Folder for what led to faults.")] = Path("fuzz-faults"),
) -> None:
    """Fuzzes the loader for some minutes, or so many cases; exit code 1 if there was a fault."""
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        fuzzer = Fuzzer(Path(work), seed, keep)
        done = _runner(fuzzer, first, cases, started + 60 * minutes)
        done()
    report = fuzzer.report
    print(f"seed={seed} cases={report.n_cases} seconds={time.monotonic() - started:.0f}")
    print(f"peak memory of a child: {report.peak / 2**20:.0f} MiB")
    for (form, kind), n in sorted(report.outcomes.items()):
        print(f"  {form:12} {kind:16} {n}")
    for number, fault in report.faults[:20]:
        print(f"FAULT case {number}: {fault}")
    print(f"faults={len(report.faults)}")
    sys.exit(bool(report.faults))


def _runner(fuzzer: Fuzzer, first: int, cases: int | None, deadline: float) -> Callable[[], None]:
    def run() -> None:
        number = first
        end = None if cases is None else first + cases
        while (end is None and time.monotonic() < deadline) or (end is not None and number < end):
            n = BATCH if end is None else min(BATCH, end - number)
            fuzzer.run(number, n)
            number += n

    return run


if __name__ == "__main__":
    app()
