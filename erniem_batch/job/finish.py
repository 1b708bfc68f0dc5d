"""The end of a run: does it add up? Then it is published, and what it replaces goes."""

from collections.abc import Callable, Iterator

import pyarrow as pa

from erniem_batch import storage
from erniem_batch.job import attempts
from erniem_batch.job.lease import Lease
from erniem_batch.job.letters import DEAD_LETTERS
from erniem_batch.job.manifest import Manifest, mark_success, publish, unmark_success
from erniem_batch.job.report import RunReport, manifest_of, verify
from erniem_batch.job.rundir import RunFolder, RunInfo, State
from erniem_batch.job.write import sidecar


def finish(
    folder: RunFolder,
    info: RunInfo,
    plan: pa.Table,
    state: State,
    report: RunReport,
    lease: Lease,
    write_report: Callable[[], None],
) -> None:
    """Publishes a complete run: first the manifest, then old files go, last the word.

    Args:
        write_report: called when the files stand, before the word.
    """
    if not report.n_missing:
        verify(state)
        lease.check()
        manifest = manifest_of(state, info)
        if report.exit_code:
            unmark_success(folder.output)
        gone = publish(folder.output, manifest)
        storage.delete(_superseded(folder, info, plan, manifest, gone))
        folder.forget_older(info.generation)
        attempts.forget(folder.output)
    write_report()
    if not report.exit_code:
        mark_success(folder.output, manifest)


def _superseded(
    folder: RunFolder, info: RunInfo, plan: pa.Table, manifest: Manifest, gone: set[str]
) -> Iterator[str]:
    """Paths of what only older manifests, abandoned plans or runs that were killed have left."""
    output, names = folder.output, manifest.names
    old = set(gone)
    outputs = folder.older_outputs(info.generation)
    if len(plan) != len(manifest.files):  # something was planned that does not count any more
        outputs += plan["output"].to_pylist()
    if outputs:
        listed = set(folder.listing()["file"].to_pylist())
        planned = {f"{name}.{suffix}" for name in outputs for suffix in ("parquet", "jsonl")}
        old |= (planned & listed) - names
    letters = (info.path[len(output) + 1 :] for info in storage.find(f"{output}/{DEAD_LETTERS}"))
    old |= {name for name in letters if name.endswith(".parquet")} - names
    for name in old:
        yield storage.join(output, name)
        if name.endswith(".jsonl"):
            yield sidecar(output, name)
    yield from storage.unfinished(output)
