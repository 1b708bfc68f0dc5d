"""Which settings a run has and which units it plans: before any work, on the driver."""

import logging
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from erniem_batch.errors import ConfigError, DamagedFile
from erniem_batch.job.config import JobConfig
from erniem_batch.job.letters import DEAD_LETTERS
from erniem_batch.job.manifest import read_manifest
from erniem_batch.job.read import input_schema
from erniem_batch.job.rundir import (
    RunFolder,
    RunInfo,
    changed_files,
    current_units,
    encode_schema,
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
from erniem_batch.model.config import ErnieMConfig

logger = logging.getLogger(__name__)


def open_run(
    folder: RunFolder, config: JobConfig, found: pa.Table | None, model: Path, digest: str
) -> RunInfo:
    """The run to go on with, or a new one, which is written down.

    Raises:
        ConfigError: the folder holds results of other settings.
    """
    info = run_info(folder, config, found, model, digest)
    if not folder.holds(info):
        folder.write_info(info)
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
    *,
    dry: bool = False,
) -> pa.Table:
    """The plan, with what is new: files, or without files the dead letters to work on again.

    Args:
        dry: what is new is not written down.
    """
    plan, lost = folder.sound_plan(info.generation)
    if lost and (found is None or config.limit is not None):  # what it held is not known
        raise next(iter(lost.values()))
    edition = folder.next_edition(lost)
    if found is None:
        units = to_table(replay_units(folder, plan))
        # Those of a replay that was interrupted are planned already.
        units = units.filter(pc.invert(pc.is_in(units["id"], plan["id"].combine_chunks())))
    else:
        units = _new_units(folder, config, info, found, plan, edition)
    made = pa.concat_tables([plan, with_edition(units, edition)])
    folder.require_known(info, made, strict=bool(lost))
    if not dry:
        folder.set_aside(lost)
    if not len(units):
        return plan
    if dry:
        return pa.concat_tables([plan, with_edition(units, edition)])
    return pa.concat_tables([plan, folder.add_to_plan(info.generation, edition, units)])


def _new_units(
    folder: RunFolder,
    config: JobConfig,
    info: RunInfo,
    found: pa.Table,
    plan: pa.Table,
    edition: int,
) -> pa.Table:
    """Units of new and changed files. Names that are in use get the number of the edition."""
    new = changed_files(found, current_units(plan))
    if not len(new):
        return UNIT_SCHEMA.empty_table()
    logger.info("planning files=%d", len(new))
    known = new["path"].filter(pc.is_in(new["path"], plan["path"].combine_chunks()))
    if info.generation > 1:
        known = new["path"]
    units = _plan_files(config, plan, new, known, edition)
    taken = units.filter(pc.is_in(units["output"], plan["output"].combine_chunks()))["path"]
    if len(taken):  # a.jsonl of yesterday is a.jsonl.gz today
        both = pa.chunked_array([*known.chunks, *taken.chunks], pa.string())
        units = _plan_files(config, plan, new, both, edition)
    require_unique(pa.concat_tables([units, plan.select(units.column_names)]))
    if not len(plan) and info.generation == 1:
        _require_no_foreign_files(folder, units)
    return units


def _plan_files(
    config: JobConfig, plan: pa.Table, files: pa.Table, numbered: pa.ChunkedArray, edition: int
) -> pa.Table:
    """Units of files; outputs of the numbered ones end with the edition."""
    limit = None
    if config.limit is not None:
        limit = config.limit - (pc.sum(plan["max_rows"]).as_py() or 0)
    in_use = pc.is_in(files["path"], numbered.combine_chunks())
    tables = []
    for mask, suffix in ((pc.invert(in_use), ""), (in_use, f".{edition}")):
        some = files_of(files.filter(mask))
        units = to_table(plan_units(some, config.bytes_per_unit, config.text_column, limit, suffix))
        limit = None if limit is None else limit - (pc.sum(units["max_rows"]).as_py() or 0)
        tables.append(units)
    return pa.concat_tables(tables)


def _require_no_foreign_files(folder: RunFolder, units: pa.Table) -> None:
    listing = folder.listing()["file"].combine_chunks()
    names = pc.replace_substring_regex(listing, r"\.(parquet|jsonl)$", "")
    there = listing.filter(pc.is_in(names, units["output"].combine_chunks()))
    if len(there):
        raise ConfigError(
            f"--output {folder.output} holds {len(there)} files that are not of this run but have "
            f"its names ({there[0]}): choose another folder or move them away"
        )


def replay_units(folder: RunFolder, plan: pa.Table) -> Iterator[Unit]:
    """A unit for every file of dead letters that the manifest names."""
    manifest = read_manifest(folder.output)
    entries = manifest.dead_letters if manifest is not None else []
    stems = {
        entry.name[len(DEAD_LETTERS) + 1 :].removesuffix(".parquet"): entry for entry in entries
    }
    mine = pc.is_in(plan["output"], pa.array(list(stems), pa.string()))
    for unit in from_table(plan.filter(mine)):
        letters = stems[unit.output].name
        last = re.search(r"\.replay-(\d+)$", unit.output)
        root = unit.output[: last.start()] if last else unit.output
        output = f"{root}.replay-{int(last[1]) + 1 if last else 1}"
        yield Unit(
            id=unit_id(f"{unit.id}|{output}"),
            path=unit.path,
            format=unit.format,
            output=output,
            version=unit.version,
            letters=letters,
            retires=unit.output,
            n_bytes=unit.n_bytes,
        )
