"""Ray Train around a training: workers started, checkpoints kept, a killed run taken up again.

The output folder is both the new model and, below `_train`, what Ray Train keeps of the run: its
newest checkpoints. The same command goes on from there; when the model is complete, `_train` is
removed.
"""

import json
import logging
import os
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

from erniem_batch import storage
from erniem_batch.errors import CheckpointError, ConfigError, JobError
from erniem_batch.job.apart import require_apart
from erniem_batch.job.cluster import SPARE_CPUS, connect_to
from erniem_batch.job.documents import damaged, known, parse_document
from erniem_batch.job.lease import Lease, require_owner
from erniem_batch.model.config import ErnieMConfig
from erniem_batch.options import flag_name
from erniem_batch.train.config import FinetuneConfig
from erniem_batch.train.data import read_data, start_folder
from erniem_batch.train.export import CURVE, HISTORY, best_of

logger = logging.getLogger(__name__)

RUN = "_train"
SETTINGS = "_train/settings.json"
REFUSED = "_train/refused.txt"
DONE = "finetune_results.json"
RESTARTS = 3
# What to do about a damaged one of these files.
REMEDY = "start anew with --overwrite"
CHECKPOINTS_KEPT = 2


@dataclass(frozen=True)
class FinetuneReport:
    """What a training came to.

    Attributes:
        score: on the rows kept out, mean over tasks; None without such rows.
        best_step: whose weights the model has.
        history: where the figures of all measurements are.
        curve: their picture; None without matplotlib.
    """

    output: str
    tasks: list[str]
    steps: int
    tokens: int
    score: float | None
    best_step: int
    seconds: float
    history: str
    curve: str | None

    def as_line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))


def finetune(config: FinetuneConfig) -> FinetuneReport:
    """Trains a model; run again after an interruption, it goes on.

    Raises:
        ConfigError: something is wrong that could be seen before the work; or the output holds
            something else.
        CheckpointError: the model cannot be used.
        JobError: the workers died again and again.
    """
    output = storage.normal(config.output)
    done = _finished(config, output)
    if done is not None:
        logger.info("nothing to do, the model is complete output=%s", config.output)
        return done
    for task in config.tasks:
        require_apart(config.inputs(task), output, flag="--train", inside=False)
        require_apart(config.dev_inputs(task), output, flag="--dev", inside=False)
    _check_input(config)
    if config.overwrite:
        _require_elsewhere(config, output)
    else:
        _begun(config, output)  # before a lease is left in a folder that was meant by mistake
    with Lease(output).acquire().held() as lease:
        return _train(config, output, lease)


def _train(config: FinetuneConfig, output: str, lease: Lease) -> FinetuneReport:
    """Trains, writes the report, and removes what is needed no more."""
    name = _claim(config, output, lease)
    started = time.monotonic()
    _fit(config, output, lease, name)
    history = json.loads(storage.read(storage.join(output, HISTORY)) or b"[]")
    best = best_of(history)
    report = FinetuneReport(
        output=config.output,
        tasks=config.tasks,
        steps=history[-1]["step"],
        tokens=history[-1]["tokens"],
        score=best.get("score"),
        best_step=best["step"],
        seconds=round(time.monotonic() - started, 1),
        history=storage.join(output, HISTORY),
        curve=storage.join(output, CURVE) if storage.stat(storage.join(output, CURVE)) else None,
    )
    content = {"settings": config.settings(), "report": asdict(report)}
    lease.replace_file(storage.join(output, DONE), _as_json(content))
    _remove_run(output, lease)
    return report


# ---- before -----------------------------------------------------------------------------------


def _finished(config: FinetuneConfig, output: str) -> FinetuneReport | None:
    """The report of the same training, if it is complete."""
    path = storage.join(output, DONE)
    data = storage.read(path)
    if data is None or config.overwrite:
        return None
    content = parse_document(data, path, {"settings": dict, "report": dict}, REMEDY)
    _require_same(config, content["settings"])
    try:
        return FinetuneReport(**known(content["report"], [f.name for f in fields(FinetuneReport)]))
    except TypeError:
        raise damaged(path, "its report lacks a field", REMEDY) from None


def _check_input(config: FinetuneConfig) -> None:
    """Finds mistakes here rather than on every worker."""
    model_config = ErnieMConfig.from_pretrained(start_folder(config, "embed"))
    for task in config.tasks:
        if config.max_length_of(task) > model_config.max_tokens:
            raise ConfigError(
                f"--max-length {config.max_length_of(task)} is more than the model holds: at most "
                f"{model_config.max_tokens}"
            )
    if config.frozen_layers > model_config.num_hidden_layers:
        raise ConfigError(
            f"--frozen-layers {config.frozen_layers}: the model has "
            f"{model_config.num_hidden_layers}"
        )
    for item in read_data(config):
        logger.info(
            "read task=%s rows=%d kept_out=%d labels=%s",
            item.task,
            len(item.train),
            len(item.dev),
            ",".join(item.labels) or "-",
        )


def _claim(config: FinetuneConfig, output: str, lease: Lease) -> str:
    """Makes sure that what the output holds of a training is this one; clears it on --overwrite.

    Returns:
        The name of what Ray Train keeps of the training. A training that starts anew has a name of
        its own, so that workers of another one that wake up late write elsewhere.
    """
    path = storage.join(output, SETTINGS)
    if config.overwrite:
        files = [info for info in storage.find(output) if not _is_of_lease(info.path, output)]
        lease.prove()  # so that no file listed is of a later training
        storage.remove(files)
    begun = _begun(config, output)
    if begun is not None:
        logger.info("going on with an interrupted training output=%s", config.output)
        return str(begun["run"])
    name = uuid.uuid4().hex[:12]
    lease.replace_file(path, _as_json({**config.settings(), "run": name}))
    return name


def _begun(config: FinetuneConfig, output: str) -> Mapping[str, Any] | None:
    """What is written down of the same training, if it was begun.

    Raises:
        ConfigError: the output holds another training, or a model.
    """
    before = storage.read(storage.join(output, SETTINGS))
    if before is not None:
        content = parse_document(before, storage.join(output, SETTINGS), {}, REMEDY)
        _require_same(config, content)
        return content
    if storage.stat(storage.join(output, "config.json")) is not None:
        raise ConfigError(
            f"--output {config.output} holds a model already: choose another folder, or "
            f"--overwrite it"
        )
    return None


def _is_of_lease(path: str, output: str) -> bool:
    return "lease.json" in path[len(output) :]


def _require_elsewhere(config: FinetuneConfig, output: str) -> None:
    """What the training reads must not be what --overwrite deletes."""
    read = [("--model", config.model), ("--teacher", config.teacher), ("--prompts", config.prompts)]
    for task in config.tasks:
        read += [("--train", path) for path in config.inputs(task)]
        read += [("--dev", path) for path in config.dev_inputs(task)]
    for flag, path in read:
        if path is None or path.startswith("hf://"):
            continue
        if f"{storage.normal(path)}/".startswith(f"{output}/"):
            raise ConfigError(
                f"--overwrite would delete {flag} {path}, which is in --output {config.output}"
            )


def _require_same(config: FinetuneConfig, before: Mapping[str, Any]) -> None:
    now = json.loads(_as_json(config.settings()))
    changed = sorted(name for name in now if now[name] != before.get(name))
    if changed:
        flags = ", ".join(map(flag_name, changed))
        raise ConfigError(
            f"--output {config.output} holds a training with other settings ({flags}): use those, "
            f"choose another folder, or --overwrite"
        )


def _as_json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


# ---- with Ray ---------------------------------------------------------------------------------


def _fit(config: FinetuneConfig, output: str, lease: Lease, name: str) -> None:
    """Runs the workers to the end."""
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    cores = os.cpu_count() or 1
    cpus = config.num_cpus_per_worker or (
        1 if config.num_gpus_per_worker else max(1, cores // config.workers)
    )
    own = connect_to(config.address, config.workers * cpus + SPARE_CPUS)
    if own:  # nobody takes its nodes away
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    import ray
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    gpus = config.num_gpus_per_worker
    path, filesystem = storage.for_arrow(output)

    class Trainer(TorchTrainer):  # type: ignore[misc]
        """Without what cleans up after a dead driver by asking the dashboard every second: a Ray
        of our own has no dashboard, and ends with the driver."""

        def _create_default_callbacks(self) -> list[Any]:
            unwanted = "PlacementGroupCleanerCallback"
            callbacks = super()._create_default_callbacks()
            return [c for c in callbacks if not own or type(c).__name__ != unwanted]

    trainer = Trainer(
        _work,
        train_loop_config={
            "config": config.with_absolute_paths(),
            "threads": cpus,
            "owner": lease.holder.owner,
        },
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus} | ({"GPU": gpus} if gpus else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=f"{path}/{RUN}",
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=RESTARTS),
            checkpoint_config=CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    lost: Exception | None = None
    try:
        trainer.fit()
    except Exception as error:
        lost = error
    finally:
        if own:
            ray.shutdown()
    refused = storage.read(storage.join(output, REFUSED))
    if refused is not None:
        lease.remove(storage.join(output, REFUSED))
        if storage.stat(storage.join(output, HISTORY)) is None:  # nothing to go on with
            _remove_run(output, lease)
        raise ConfigError(refused.decode())
    if lost is not None:
        raise _lost(lost) from lost


def _work(arguments: dict[str, Any]) -> None:
    """What each worker runs."""
    import torch

    from erniem_batch.cli import configure_logging
    from erniem_batch.train.loop import train
    from erniem_batch.train.session import RaySession

    configure_logging()
    _quiet_reports()
    torch.set_num_threads(arguments["threads"])
    config: FinetuneConfig = arguments["config"]
    output = storage.normal(config.output)
    refused = storage.join(output, REFUSED)
    if storage.read(refused) is not None:
        return
    try:
        train(config, RaySession(partial(require_owner, output, arguments["owner"])))
    except (ConfigError, CheckpointError) as error:
        # Ray Train would try again what fails every time. Where others wait for this worker, it
        # may: then all of them find the note.
        storage.write(refused, str(error).encode())
        if config.workers > 1:
            raise


def _quiet_reports() -> None:
    """Without Ray's own line for each report, which says all figures once more."""
    try:
        from ray.train.v2._internal.execution import context
    except ImportError:  # of another version of Ray: the lines stay
        return
    context.logger.setLevel(logging.WARNING)


def _lost(error: Exception) -> JobError:
    said = str(error).strip().splitlines()
    return JobError(
        f"the training failed {RESTARTS + 1} times, the last time with {type(error).__name__}: "
        f"{said[-1] if said else 'no message'}. Run the same command again to go on from the last "
        f"checkpoint"
    )


def _remove_run(output: str, lease: Lease) -> None:
    """What Ray Train keeps; on a local disk also its folders, which object storage has none of."""
    files = list(storage.find(storage.join(output, RUN)))
    lease.prove()  # so that no file listed is of a later training
    storage.remove(files)
    if storage.is_remote(output):
        return
    for folder, _, _ in os.walk(os.path.join(output, RUN), topdown=False):
        with suppress(OSError):  # a worker that woke up late has written into it
            os.rmdir(folder)
