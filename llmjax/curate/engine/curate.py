"""Run a curation: measure every unit, decide on the scores, write the corpus. Resumable at every step.

WORKDIR/measured/     texts and scores of every unit; a later run with other thresholds starts from them
WORKDIR/unfinished/   what a run will publish
WORKDIR/curated/      NAME-00000-train.jsonl.zst ...: documents that are kept
WORKDIR/dropped/      NAME-00000.jsonl.zst: documents that are dropped, with the stage and the reason
WORKDIR/report.json   what happened, and hashes of inputs, configuration and outputs
WORKDIR/splits.npz    every document that a run kept here, and its cluster: more data moves and drops none of them
WORKDIR/config.json   the config, which --resume reads
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
from pathlib import Path
import shutil
from typing import Any

import numpy as np

import llmjax
from llmjax.atomic import remove_partial, write_bytes
from llmjax.curate.config import CurateConfig, InputConfig
from llmjax.curate.dedup import decontaminate
from llmjax.curate.engine import decide, measure, summary, write
from llmjax.curate.engine.decide import Decisions, KeptBefore, Table
from llmjax.curate.engine.measurements import Measurement
from llmjax.curate.engine.runners import Runner
from llmjax.curate.filters import language, personal_data
from llmjax.curate.readers import warc
from llmjax.curate.readers.inputs import list_units
from llmjax.data.readers import sources
from llmjax.data.readers.documents import EMPTY
from llmjax.data.readers.sources import Unit
from llmjax.data.store import split, token_store
from llmjax.data.store.workers import with_progress
from llmjax.errors import UserError

Units = list[Unit[InputConfig]]
_SPLITS = "splits.npz"
logger = logging.getLogger(__name__)


def curate(config: CurateConfig, workdir: Path, runner: Runner) -> dict[str, Any]:
    """Return the report of the corpus in `workdir`; build the corpus first if it is missing or has another config.

    An interrupted run resumes where it stopped. The files depend on the inputs and the config alone (and, for splits,
    on earlier runs in this workdir), not on the runner or the number of workers. Raises UserError for invalid input.
    """
    if not config.inputs:
        raise UserError("curate.inputs is empty: name one, such as --config.curate.inputs.web.path='crawl/*.warc.gz'")
    settings = config_as_json(config)
    config = _with_absolute_paths(config)
    personal_data.check(config.personal_data)
    language.check(config.language)
    if "decontaminate" in config.stages:
        decontaminate.check(config.decontaminate)
    split.check_fractions(config.split, "curate.split")
    units = [unit for name, input_config in config.inputs.items() for unit in list_units(name, input_config)]
    measure_settings = measure.settings_of(config)
    measurements = [Measurement(workdir / "measured", measure.key_of(unit, measure_settings)) for unit in units]
    names = [unit.source for unit in units]
    key = token_store.compute_fingerprint(
        {"config": settings, "measured": [m.key for m in measurements], "sources": names}
    )
    write_bytes(workdir / "config.json", (json.dumps({"curate": settings}, indent=1) + "\n").encode())
    if (report := _read_finished(workdir)) and report["key"] == key:
        logger.info("nothing left to do: the corpus was built from these inputs with this config")
        return report
    unfinished = workdir / "unfinished"
    folder = _find_unpublished(unfinished, key)
    if folder is None:
        folder = _build(units, measurements, config, settings, key, workdir, runner)
    else:
        logger.info("the interrupted run had written all files: publishing them")
    report = _publish(workdir, folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    _remove_other_measurements(workdir / "measured", measurements)
    return report


def _build(
    units: Units,
    measurements: list[Measurement],
    config: CurateConfig,
    settings: dict[str, Any],
    key: str,
    workdir: Path,
    runner: Runner,
) -> Path:
    """The folder with all files to publish; the report is written last."""
    _measure(units, measurements, config, runner)
    table = Table(measurements, [unit.source for unit in units])
    kept_before = KeptBefore.read(workdir / _SPLITS)
    _check_rejects(table, config)
    decisions = decide.decide(table, config, runner, workdir / "unfinished" / "exchange", kept_before)
    logger.info(f"deciding: {int(decisions.kept.sum()):,} of {len(table):,} records stay")
    tag = token_store.compute_fingerprint({"key": key, "known": kept_before.digest()})
    folder = workdir / "unfinished" / f"written-{tag[:24]}"
    sampled_rows = summary.choose_samples(table, decisions, config)
    results = _write(units, table, decisions, sampled_rows, config, runner, folder)
    report = summary.summarise(table, decisions, results, config)
    report |= {
        "version": llmjax.__version__,
        "key": key,
        "config": settings,
        "config_sha256": token_store.compute_fingerprint(settings),
        "inputs": _summarise_inputs(units),
    }
    kept_before.with_decisions(table, decisions, config).save(folder / _SPLITS)
    write_bytes(folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    return folder


def _with_absolute_paths(config: CurateConfig) -> CurateConfig:
    """Make the paths of files that measuring reads absolute: a process of a cluster may run in another folder."""

    def absolute(path: str) -> str:
        return os.path.abspath(os.path.expanduser(path)) if path else ""

    quality, against, terms = config.quality, config.decontaminate.against, config.sample.terms
    return dataclasses.replace(
        config,
        quality=dataclasses.replace(quality, classifier=absolute(quality.classifier)),
        decontaminate=dataclasses.replace(config.decontaminate, against=tuple(map(absolute, against))),
        sample=dataclasses.replace(config.sample, terms=tuple(map(absolute, terms))),
    )


def config_as_json(config: CurateConfig) -> dict[str, Any]:
    """The config as JSON values, without fields that do not influence the corpus."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    del values["workers"]
    return values


def _read_finished(workdir: Path) -> dict[str, Any] | None:
    """The report of a finished run if all of its files exist."""
    try:
        report = json.loads((workdir / "report.json").read_text())
        complete = all((workdir / name).stat().st_size == file["bytes"] for name, file in report["outputs"].items())
    except (OSError, ValueError, KeyError):
        return None
    return report if complete and (workdir / _SPLITS).is_file() else None


def _measure(units: Units, measurements: list[Measurement], config: CurateConfig, runner: Runner) -> None:
    for name in config.inputs:
        logger.info(f"{name}: {sources.describe_formats([unit for unit in units if unit.source == name])}")
    pairs = zip(units, measurements, strict=True)
    tasks = [(unit, config, measurement) for unit, measurement in pairs if not measurement.is_complete()]
    if len(tasks) < len(units):
        logger.info(f"{len(units) - len(tasks)} of {len(units)} parts were measured before")
    if tasks:
        sizes = [unit.size for unit, *_ in tasks]
        with_progress("measuring", runner.map(measure.measure, tasks), len(tasks), sizes)


def _check_rejects(table: Table, config: CurateConfig) -> None:
    """Raise UserError if an input has more unreadable records or bytes than curate.max_bad_fraction allows."""
    for index, name in enumerate(table.names):
        in_source = table.source == index
        is_unread = in_source & (table["early"] == 0)
        sizes = table["sizes"][:, 0, 0]
        numbers, counts = np.unique(table["reason"][is_unread], return_counts=True)
        reasons = {table.reasons[number]: count for number, count in zip(numbers, counts.tolist(), strict=True)}
        reasons = {r: n for r, n in reasons.items() if r != EMPTY and not r.startswith(warc.NO_PAGE)}
        # By records, and by bytes: what a damaged file lost is one record.
        for bad, total, unit in (
            (sum(reasons.values()), np.count_nonzero(in_source), "records"),
            (int(sizes[is_unread].sum()), int(sizes[in_source].sum()), "bytes"),
        ):
            if bad > config.max_bad_fraction * total:
                listed = ", ".join(f"{number} {reason}" for reason, number in sorted(reasons.items()))
                raise UserError(
                    f"curate.inputs.{name}.path={config.inputs[name].path!r}: {bad} of {total} {unit} cannot be read "
                    f"({listed}), more than curate.max_bad_fraction={config.max_bad_fraction} allows; fix the input, "
                    f"or allow more with --config.curate.max_bad_fraction={math.ceil(100 * bad / total) / 100}"
                )


def _write(
    units: Units,
    table: Table,
    decisions: Decisions,
    sampled_rows: np.ndarray,
    config: CurateConfig,
    runner: Runner,
    folder: Path,
) -> list[dict[str, Any]]:
    """The results of all units; results of an interrupted run with the same decisions are reused."""
    results: list[Any] = [None] * len(units)
    tasks, task_units, numbers = [], [], {}
    for index, unit in enumerate(units):
        numbers[unit.source] = number = numbers.get(unit.source, -1) + 1
        name, rows = f"{unit.source}-{number:05d}", slice(*table.edges[index : index + 2].tolist())
        if (result := write.read_result(folder, name)) is not None:
            results[index] = result
            continue
        samples = sampled_rows[(sampled_rows >= rows.start) & (sampled_rows < rows.stop)] - rows.start
        task = write.Task(
            name=name,
            source=unit.source,
            measurement=table.measurements[index],
            stage=decisions.stage[rows],
            reason=decisions.reason[rows],
            split=decisions.split[rows],
            samples=frozenset(samples.tolist()),
        )
        tasks.append((task, table.reasons, config, folder))
        task_units.append(index)
    sizes = [units[index].size for index in task_units]
    written = with_progress("writing", runner.map(write.write, tasks), len(tasks), sizes) if tasks else []
    for index, result in zip(task_units, written, strict=True):
        results[index] = result
    for name in ("curated", "dropped"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        remove_partial(folder / name)
    return results


def _find_unpublished(unfinished: Path, key: str) -> Path | None:
    """The folder of a run that wrote everything, its report last, and ended before all was published."""
    found = None
    for path in unfinished.glob("written-*/report.json"):
        if json.loads(path.read_text())["key"] == key:
            found = path.parent
        else:  # of another configuration, and perhaps published in part
            shutil.rmtree(path.parent)
    return found


def _publish(workdir: Path, folder: Path) -> dict[str, Any]:
    """Replace the files of the workdir by those of `folder`, as far as that is not done; return the report.

    The old report is removed first and the new one is moved last: without it the corpus is not finished.
    """
    report = json.loads((folder / "report.json").read_text())
    (workdir / "report.json").unlink(missing_ok=True)
    for name in ("curated", "dropped"):
        if (folder / name).is_dir():
            shutil.rmtree(workdir / name, ignore_errors=True)
            (folder / name).replace(workdir / name)
    for name in (_SPLITS, "report.json"):
        if (folder / name).is_file():
            (folder / name).replace(workdir / name)
    return report


def _summarise_inputs(units: Units) -> dict[str, dict[str, Any]]:
    """Number of files, bytes, and a hash of file names, sizes and modification times, by input."""
    inputs: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(unit.source for unit in units):
        parts = [unit for unit in units if unit.source == name]
        state = hashlib.sha256()
        for unit in parts:
            state.update(repr((unit.items, unit.state)).encode())
        inputs[name] = {
            "parts": len(parts),
            "bytes": sum(unit.size for unit in parts),
            "files": len({item.path for unit in parts for item in unit.items}),
            "state": state.hexdigest(),
        }
    return inputs


def _remove_other_measurements(folder: Path, measurements: list[Measurement]) -> None:
    """Remove measurements that this corpus does not use, and partial files of a killed run."""
    remove_partial(folder)
    keys = {measurement.key for measurement in measurements}
    for path in folder.iterdir():
        if path.name.split(".")[0] not in keys and path.is_file():
            path.unlink()
