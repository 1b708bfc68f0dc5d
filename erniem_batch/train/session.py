"""What a worker knows of the others and of the past: alone, or under Ray Train."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from erniem_batch.train.loop import STATE_FILE


class LocalSession:
    """One worker without Ray; the newest checkpoint lies in a folder."""

    rank = 0
    world_size = 1

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder = folder
        self.device = torch.device(device)
        self.reports: list[Mapping[str, Any]] = []

    @contextmanager
    def restored(self) -> Iterator[Path | None]:
        """The folder, if there is a checkpoint in it."""
        yield self.folder if (self.folder / STATE_FILE).exists() else None

    def prove(self) -> None:
        """Nobody else writes."""

    def report(self, metrics: Mapping[str, Any], folder: Path | None) -> None:
        """Keeps the checkpoint in place of the one before."""
        self.reports.append(metrics)
        if folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f"{STATE_FILE}.partial"
            shutil.copyfile(folder / STATE_FILE, partial)
            partial.replace(self.folder / STATE_FILE)


class RaySession:
    """One of the workers of a TorchTrainer.

    Args:
        prove: raises an error if another training has taken over the output folder.
    """

    def __init__(self, prove: Callable[[], None]) -> None:
        from ray import train
        from ray.train.torch import get_device

        context = train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device = get_device()
        self.prove = prove

    @contextmanager
    def restored(self) -> Iterator[Path | None]:
        """The newest checkpoint of the run, fetched."""
        from ray import train

        checkpoint = train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)

    def report(self, metrics: Mapping[str, Any], folder: Path | None) -> None:
        """To the driver, and the checkpoint to the storage of the run."""
        from ray import train

        checkpoint = None if folder is None else train.Checkpoint.from_directory(folder)
        train.report(dict(metrics), checkpoint=checkpoint)
