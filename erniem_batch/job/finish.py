"""The end of a run: does it add up? Then it is published, and what it replaces goes."""

from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.compute as pc

from erniem_batch import storage
from erniem_batch.job import attempts
from erniem_batch.job.lease import Lease
from erniem_batch.job.letters import DEAD_LETTERS
from erniem_batch.job.manifest import (
    Manifest,
    mark_success,
    publish,
    unmark_success,
)
from erniem_batch.job.report import RunReport, manifest_of, verify
from erniem_batch.job.rundir import RunFolder, RunInfo, State, readable_manifest
from erniem_batch.job.write import SIDECARS
from erniem_batch.storage import FileInfo


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

    Raises:
        JobError: another run has taken over.
    """
    if report.n_missing:
        write_report()
        return
    verify(state)
    manifest = manifest_of(state, info)
    superseded = list(_superseded(folder, info, plan, manifest))
    records = [*folder.of_older_generations(info.generation), *attempts.records(folder.output)]
    lease.prove()  # so that nothing listed above is of a later run
    if report.exit_code:
        unmark_success(folder.output, lease)
    published = publish(folder.output, manifest, lease)
    storage.remove(superseded)
    storage.remove(records)  # they tell of superseded files, so they go last
    write_report()
    if not report.exit_code:
        mark_success(folder.output, published, lease)


def _superseded(
    folder: RunFolder, info: RunInfo, plan: pa.Table, manifest: Manifest
) -> Iterator[FileInfo]:
    """What only older manifests, abandoned plans or runs that were killed have left."""
    names = manifest.names
    before = readable_manifest(folder.output)
    outputs = folder.older_outputs(info.generation)
    if len(plan) != len(manifest.files):  # something was planned that does not count any more
        outputs += plan["output"].to_pylist()
    old = {f"{output}.{suffix}" for output in outputs for suffix in ("parquet", "jsonl")}
    old = (old | (before.names if before else set())) - names
    if old:  # else a listing of all results is saved
        yield from _listed(folder.output, folder.listing(), old)
        yield from _below(folder.output, SIDECARS, lambda name: name.removesuffix(".json") in old)
    yield from _below(
        folder.output,
        DEAD_LETTERS,
        lambda name: name.endswith(".parquet") and f"{DEAD_LETTERS}/{name}" not in names,
    )
    yield from storage.unfinished(folder.output)


def _listed(output: str, listing: pa.Table, wanted: set[str]) -> Iterator[FileInfo]:
    """Files of a listing that have one of these names."""
    mask = pc.is_in(listing["file"], value_set=pa.array(list(wanted), pa.string()))
    for row in listing.filter(mask).to_pylist():
        yield FileInfo(storage.join(output, row["file"]), row["size"], row["version"])


def _below(output: str, folder: str, wanted: Callable[[str], bool]) -> Iterator[FileInfo]:
    """Files of a folder inside the output whose names, relative to that folder, are wanted."""
    start = len(output) + len(folder) + 2
    for info in storage.find(f"{output}/{folder}"):
        if wanted(info.path[start:]):
            yield info
