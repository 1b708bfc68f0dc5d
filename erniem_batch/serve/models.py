"""Which tasks a model can do; and its predictors, which hold once what their heads share."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from erniem_batch.config import DEMO
from erniem_batch.errors import ConfigError
from erniem_batch.lanes import lanes_of
from erniem_batch.model.config import ErnieMConfig
from erniem_batch.model.fetch import ENCODER, head_url, local_folder
from erniem_batch.model.int8 import Int8Linear
from erniem_batch.model.onednn import PrepackedLinear
from erniem_batch.options import TASKS
from erniem_batch.predictor import Predictor
from erniem_batch.serve.config import ModelConfig
from erniem_batch.tasks.make import TASK_OF_HEAD


def model_folders(config: ModelConfig) -> dict[str, Path]:
    """The folder of each task.

    Raises:
        ConfigError: no such model, or it cannot do what is asked.
    """
    if config.model == DEMO:
        return {task: local_folder(DEMO, task) for task in config.tasks or TASKS}
    many = _heads_of(config)
    if many:
        return many
    folder = local_folder(config.model, "")
    if config.tasks:
        return dict.fromkeys(config.tasks, folder)
    heads = ErnieMConfig.from_pretrained(folder).architectures or ()
    tasks = [TASK_OF_HEAD[head] for head in heads if head in TASK_OF_HEAD] or ["embed"]
    return dict.fromkeys(tasks, folder)


def _heads_of(config: ModelConfig) -> dict[str, Path]:
    """The folders that a training of several tasks left, if it is one."""
    if head_url(config.model, ENCODER) is None:
        return {}
    found = {
        task: head_url(config.model, ENCODER if task == "embed" else task)
        for task in config.tasks or TASKS
    }
    there = {task: url for task, url in found.items() if url is not None}
    absent = [task for task in config.tasks if task not in there]
    if absent:
        raise ConfigError(
            f"model={config.model!r} has no head for {absent[0]}; it has {', '.join(there)}"
        )
    return {task: local_folder(url, task) for task, url in there.items()}


def load_predictors(config: ModelConfig, folders: Mapping[str, Path]) -> dict[str, Predictor]:
    """A predictor for each task.

    Raises:
        ConfigError, CheckpointError: see `Predictor.load`.
    """
    predictors: dict[str, Predictor] = {}
    lanes = lanes_of(config.n_threads, "cuda" if config.num_gpus else "cpu")
    shared = Shared()
    for task, folder in folders.items():
        predictors[task] = Predictor.load(replace(config.predictor(task), model=str(folder)), lanes)
        shared.add(predictors[task].model)
    return predictors


class Shared:
    """Weights of models: those that are equal, in value and in name, become the same memory."""

    def __init__(self) -> None:
        self._tensors: dict[str, list[Tensor]] = {}
        self._packed: dict[tuple[str, bytes | int], Tensor] = {}

    def add(self, model: nn.Module) -> None:
        """A model takes what others have already, and gives the rest."""
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            twins = self._tensors.setdefault(name, [])
            twin = next((t for t in twins if _is_equal(t, parameter.data)), None)
            if twin is None:
                twins.append(parameter.data)
            else:
                parameter.data = twin
        for name, module in model.named_modules():
            if isinstance(module, Int8Linear):
                module.packed = self._packed.setdefault((name, module.digest), module.packed)
            elif isinstance(module, PrepackedLinear):
                place = module.weight.data_ptr()  # of equal weights the same by now
                module.packed = self._packed.setdefault((name, place), module.packed)


def _is_equal(one: Tensor, other: Tensor) -> bool:
    same = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return same and bool((one == other).all())
