"""Which settings a run has and which units it plans: before any work, on the driver."""

import logging
import re
from collections.abc import Container, Iterator
from dataclasses import asdict
from itertools import count
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from erniem_batch.errors import ConfigError, Conflict, DamagedFile
from erniem_batch.job.config import JobConfig
from erniem_batch.job.jsonsample import require_all_lines
from erniem_batch.job.lease import Lease
from erniem_batch.job.letters import output_of_letters
from erniem_batch.job.manifest import read_manifest
from erniem_batch.job.read import input_schema
from erniem_batch.job.rundir import (
    RunFolder,
    RunInfo,
    changed_files,
    current_units,
    encode_schema,
    readable_manifest,
    with_edition,
)
from erniem_batch.job.settings import differences, fingerprint, settings_of, versions
from erniem_batch.job.units import (
    FILE_SCHEMA,
    UNIT_SCHEMA,
    Unit,
    files_of,
    from_table,
    plan_units,
    require_unique,
    to_table,
    unit_id,
)
from erniem_batch.job.write import read_marks
from erniem_batch.model.config import ErnieMConfig

logger = logging.getLogger(__name__)


def open_run(
    folder: RunFolder,
    config: JobConfig,
    found: pa.Table | None,
    model: Path,
    digest: str,
    lease: Lease,
) -> RunInfo:
    """The run to go on with, or a new one, which is written down.

    Raises:
        ConfigError: the folder holds results of other settings.
        JobError: another run has taken over.
    """
    info = run_info(folder, config, found, model, digest)
    if not folder.holds(info):
        folder.write_info(info, lease)
    return info


def run_info(
    folder: RunFolder, config: JobConfig, found: pa.Table | None, model: Path, digest: str
) -> RunInfo:
    """The same, with nothing written.

    Raises: as open_run.
    """
    predictor = config.predictor
    model_config = ErnieMConfig.from_pretrained(model)
    before = _info_before(folder, config)
    generation = 1 if before is not None else folder.newest_generation() + 1
    if before is not None:
        now = settings_of(config, predictor, model_config, digest, before.settings)
        same = fingerprint(now) == before.fingerprint
        manifest = read_manifest(folder.output) if config.overwrite else None
        finished = manifest is not None and manifest.generation == before.generation
        if same and not finished:  # an unfinished --overwrite is gone on with, too
            return before
        if not config.overwrite:
            raise ConfigError(
                f"--output {folder.output} holds results made with other settings: "
                f"{'; '.join(differences(before.settings, now))}. Use the same settings or another "
                f"folder, or start anew with --overwrite"
            )
        generation = before.generation + 1
    settings = settings_of(config, predictor, model_config, digest)
    source = files_of(found if found is not None else FILE_SCHEMA.empty_table())
    schema = input_schema(
        source,
        config.text_column,
        config.carried_columns,
        fields=config.fields,
        added=config.added_columns,
        text_flag=config.text_flag,
    )
    return RunInfo(
        generation=generation,
        fingerprint=fingerprint(settings),
        settings=settings,
        schema=encode_schema(schema),
        job={**asdict(config), "task": config.task},
        versions=versions(),
    )


def _info_before(folder: RunFolder, config: JobConfig) -> RunInfo | None:
    """The run that is there; with --overwrite one that cannot be read counts as none."""
    try:
        return folder.read_info()
    except DamagedFile as error:
        if not config.overwrite:
            raise
        logger.warning("starting anew, although %s", error)
        return None


def plan_run(
    folder: RunFolder,
    config: JobConfig,
    info: RunInfo,
    found: pa.Table | None,
    lease: Lease | None,
) -> pa.Table:
    """The plan, with what is new: files, or without files the dead letters to work on again.

    Args:
        lease: None: what is new is not written down.

    Raises:
        JobError: another run has taken over.
    """
    while True:
        plan, lost = folder.sound_plan(info.generation)
        if lost and (found is None or config.limit is not None):  # what it held is not known
            raise next(iter(lost.values()))
        edition = folder.next_edition(lost)
        if found is None:
            units = to_table(replay_units(folder, info.generation, plan))
        else:
            units, edition = _new_units(folder, config, info, found, plan, edition, bool(lost))
        whole = pa.concat_tables([plan, with_edition(units, edition)])
        folder.require_known(info, whole, strict=bool(lost))
        if lease is not None:
            lease.prove()
            folder.set_aside(lost)
        if lease is None or not len(units):
            return whole
        try:
            folder.add_to_plan(info.generation, edition, units)
        except Conflict:  # a run before this one has planned late, or we have lost the lease
            lease.prove()
            continue
        lease.prove()
        return whole


def _new_units(
    folder: RunFolder,
    config: JobConfig,
    info: RunInfo,
    found: pa.Table,
    plan: pa.Table,
    edition: int,
    has_lost: bool,
) -> tuple[pa.Table, int]:
    """Units of new and changed files, and the edition of the plan that they are.

    A name that was used before is never used again, in no generation: outputs of changed files end
    with the number of the edition.

    Args:
        has_lost: whether a segment of the plan is known to be lost. Units that were planned in a
            lost one get their names back, unless the manifest names a file of that name that is
            not theirs.
    """
    new = changed_files(found, current_units(plan))
    if not len(new):
        return UNIT_SCHEMA.empty_table(), edition
    logger.info("planning files=%d", len(new))
    require_all_lines(files_of(new))
    limit = None
    if config.limit is not None:
        limit = config.limit - (pc.sum(plan["max_rows"]).as_py() or 0)
    units = to_table(plan_units(files_of(new), config.bytes_per_unit, config.text_column, limit))
    require_unique(units)
    listing = _flat(folder.listing()["file"])
    units, edition = _named_units(folder, info, plan, units, listing, edition, has_lost)
    return _with_found_outputs(folder, info, plan, units, listing), edition


def _named_units(
    folder: RunFolder,
    info: RunInfo,
    plan: pa.Table,
    units: pa.Table,
    listing: pa.Array,
    edition: int,
    has_lost: bool,
) -> tuple[pa.Table, int]:
    """The units with names for their outputs, and the edition of the plan that they are."""
    is_damaged = has_lost or not folder.is_complete(info, plan)
    if is_damaged:
        named = readable_manifest(folder.output)
        names = pa.array([entry.name for entry in named.files] if named else [], pa.string())
        listing = listing.filter(pc.is_in(listing, value_set=names))
    taken = _names_in_use(folder, info.generation, plan, listing)
    if is_damaged:
        own = _outputs_of(folder, info.generation, units)
        taken = taken.filter(pc.invert(pc.is_in(taken, value_set=own)))
    if not len(plan) and info.generation == 1:
        _require_no_foreign_files(folder.output, units, listing, taken)
        return units, edition
    known = pc.is_in(units["path"], value_set=_flat(plan["path"]))
    in_use = pc.is_in(units["output"], value_set=taken)  # a.jsonl of yesterday is a.jsonl.gz today
    paths = units["path"].filter(pc.or_(known, in_use))
    numbered = pc.is_in(units["path"], value_set=_flat(paths))
    if info.generation > 1:
        numbered = pc.is_valid(units["path"])
    return _with_numbers(units, numbered, taken, edition)


def _with_found_outputs(
    folder: RunFolder, info: RunInfo, plan: pa.Table, units: pa.Table, listing: pa.Array
) -> pa.Table:
    """New units, of which those get their output back that a run has made by a lost plan.

    Such a file is in no plan that can be read, and its marks name the unit and these settings.
    """
    stems = _stems(listing)
    roots = pc.replace_substring_regex(stems, r"\.\d+$", "")
    wanted = pc.replace_substring_regex(_flat(units["output"]), r"\.\d+$", "")
    known = pa.concat_arrays(
        [_flat(plan["output"]), pa.array(folder.older_outputs(info.generation), pa.string())]
    )
    is_stray = pc.and_(
        pc.is_in(roots, value_set=wanted), pc.invert(pc.is_in(stems, value_set=known))
    )
    ids = set(units["id"].to_pylist())
    outputs = {}
    for name, stem in zip(
        listing.filter(is_stray).to_pylist(), stems.filter(is_stray).to_pylist(), strict=True
    ):
        marks = read_marks(folder.output, name)
        if marks is not None and marks.fingerprint == info.fingerprint and marks.unit in ids:
            outputs[marks.unit] = stem
    if not outputs:
        return units
    rows = units.select(["id", "output"]).to_pylist()
    names = pa.array([outputs.get(row["id"], row["output"]) for row in rows], pa.string())
    place = units.schema.get_field_index("output")
    return units.set_column(place, units.schema.field(place), names)


def _with_numbers(
    units: pa.Table, numbered: pa.ChunkedArray, taken: pa.Array, edition: int
) -> tuple[pa.Table, int]:
    """Units of which the numbered ones write outputs that end with the edition, or a later one if
    an input has a name of that form."""
    plain = _flat(units["output"])
    others = pa.concat_arrays([taken, plain.filter(pc.invert(_flat(numbered)))])
    while True:
        suffixed = pc.binary_join_element_wise(plain, pa.scalar(str(edition)), ".")
        if not pc.any(pc.is_in(suffixed.filter(_flat(numbered)), value_set=others)).as_py():
            break
        edition += 1
    outputs = pc.if_else(_flat(numbered), suffixed, plain)
    place = units.schema.get_field_index("output")
    return units.set_column(place, units.schema.field(place), outputs), edition


def _names_in_use(
    folder: RunFolder, generation: int, plan: pa.Table, listing: pa.Array
) -> pa.Array:
    """Output names of all plans and of files in the folder.

    Args:
        plan: of this generation.
        listing: names of the files.
    """
    older = pa.array(folder.older_outputs(generation), pa.string())
    return pa.concat_arrays([_stems(listing), _flat(plan["output"]), older]).unique()


def _stems(names: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(names, r"\.(parquet|jsonl)$", "")


def _outputs_of(folder: RunFolder, generation: int, units: pa.Table) -> pa.Array:
    """Names of outputs that, by the ledger, were made of one of these units."""
    ledger = folder.read_ledger(generation)
    mine = ledger["output"].filter(pc.is_in(ledger["unit_id"], value_set=_flat(units["id"])))
    return _stems(_flat(mine))


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks()


def _require_no_foreign_files(
    output: str, units: pa.Table, listing: pa.Array, taken: pa.Array
) -> None:
    names = _stems(listing)
    clash = pc.and_(
        pc.is_in(names, value_set=_flat(units["output"])), pc.is_in(names, value_set=taken)
    )
    there = listing.filter(clash)
    if len(there):
        raise ConfigError(
            f"--output {output} holds {len(there)} files that are not of this run but have "
            f"its names ({there[0]}): choose another folder or move them away"
        )


def replay_units(folder: RunFolder, generation: int, plan: pa.Table) -> Iterator[Unit]:
    """A unit for every file of dead letters that the manifest names and no replay has planned."""
    manifest = read_manifest(folder.output)
    names = pa.array([e.name for e in manifest.dead_letters] if manifest else [], pa.string())
    names = names.filter(pc.invert(pc.is_in(names, value_set=_flat(plan["letters"]))))
    letters = {output_of_letters(name): name for name in names.to_pylist()}
    mine = plan.filter(pc.is_in(plan["output"], pa.array(list(letters), pa.string())))
    if not len(mine):
        return
    listing = _flat(folder.listing()["file"])
    taken = set(_names_in_use(folder, generation, plan, listing).to_pylist())
    for unit in from_table(mine):
        output = _replay_name(unit, taken)
        taken.add(output)
        yield Unit(
            id=unit_id(f"{unit.id}|{output}"),
            path=unit.path,
            format=unit.format,
            output=output,
            version=unit.version,
            letters=letters[unit.output],
            retires=unit.output,
            n_bytes=unit.n_bytes,
        )


def _replay_name(unit: Unit, taken: Container[str]) -> str:
    """A name that no other output and no input has: x.replay-1, x.replay-2, …"""
    root = re.sub(r"\.replay-\d+$", "", unit.output) if unit.letters else unit.output
    numbers = (f"{root}.replay-{number}" for number in count(1))
    return next(name for name in numbers if name not in taken)
