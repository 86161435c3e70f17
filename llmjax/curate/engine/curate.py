"""Run a curation: measure every unit, decide on the scores, write the corpus. Resumable at every step.

WORKDIR/measured/     texts and scores of every unit; a later run with other thresholds starts from them
WORKDIR/unfinished/   files that are not published yet
WORKDIR/curated/      NAME-00000-train.jsonl.zst ...: kept documents
WORKDIR/dropped/      NAME-00000.jsonl.zst: dropped documents, with the stage and the reason
WORKDIR/report.json   numbers of the data card, and hashes of inputs, config and outputs
WORKDIR/splits.npz    kept documents and their clusters: additional data does not drop or move any of them
WORKDIR/config.json   the config, which --resume reads
"""

from collections import Counter
import dataclasses
import functools
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
from llmjax.curate.engine.decide import Decisions, History, Table
from llmjax.curate.engine.measurements import Measurement
from llmjax.curate.engine.runners import Runner
from llmjax.curate.filters import language
from llmjax.curate.readers import warc
from llmjax.curate.readers.inputs import list_units
from llmjax.data.readers import sources
from llmjax.data.readers.documents import EMPTY, NO_FIELD
from llmjax.data.readers.sources import Unit
from llmjax.data.store import split, token_store
from llmjax.data.store.workers import with_progress
from llmjax.errors import UserError

_SPLITS = "splits.npz"
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Job:
    """A config bound to its inputs: measurements[i] belongs to units[i]; `settings` is the config as JSON values."""

    config: CurateConfig
    settings: dict[str, Any]
    units: list[Unit[InputConfig]]
    measurements: list[Measurement]
    workdir: Path
    runner: Runner

    @property
    def unfinished(self) -> Path:
        return self.workdir / "unfinished"

    @property
    def sources(self) -> list[str]:
        return [unit.source for unit in self.units]

    @functools.cached_property
    def fingerprint(self) -> str:
        keys = [measurement.key for measurement in self.measurements]
        return token_store.compute_fingerprint({"config": self.settings, "measurements": keys, "sources": self.sources})


def curate(config: CurateConfig, workdir: Path, runner: Runner) -> dict[str, Any]:
    """Return the report of the corpus in `workdir`; build the corpus first if it is missing or has another config.

    An interrupted run resumes where it stopped. The files depend on the inputs and the config alone (and, for splits,
    on earlier runs in this workdir), not on the runner or the number of workers. Raises UserError for invalid input.
    """
    job = _prepare(config, workdir, runner)
    write_bytes(workdir / "config.json", (json.dumps({"curate": job.settings}, indent=1) + "\n").encode())
    if (report := _read_finished(workdir)) and report.get("fingerprint") == job.fingerprint:
        logger.info("nothing to do: the corpus was built from these inputs with this config")
        return report
    folder = _find_unpublished(job)
    if folder is None:
        folder = _build(job)
    else:
        logger.info("the interrupted run had written all files; publishing them")
    report = _publish(workdir, folder)
    shutil.rmtree(job.unfinished, ignore_errors=True)
    _remove_other_measurements(workdir / "measured", job.measurements)
    return report


def _prepare(config: CurateConfig, workdir: Path, runner: Runner) -> _Job:
    """Check the config and list the units of all inputs."""
    if not config.inputs:
        raise UserError("curate.inputs is empty: add one, such as --config.curate.inputs.web.path='crawl/*.warc.gz'")
    settings = config_to_json(config)
    config = _with_absolute_paths(config)
    language.check_config(config.language)
    if "decontaminate" in config.stages:
        decontaminate.check_evaluation_sets(config.decontaminate)
    split.check_fractions(config.split, "curate.split")
    units = [unit for name, input_config in config.inputs.items() for unit in list_units(name, input_config)]
    measure_settings = measure.select_settings(config)
    keys = [measure.compute_key(unit, measure_settings) for unit in units]
    measurements = [Measurement(workdir / "measured", key) for key in keys]
    return _Job(config, settings, units, measurements, workdir, runner)


def _build(job: _Job) -> Path:
    """Write all files and return their folder; the report is written last."""
    _measure(job)
    table = Table(job.measurements, job.sources)
    _check_rejects(table, job.config)
    history = History.read(job.workdir / _SPLITS)
    exchange = functools.partial(job.runner.exchange, folder=job.unfinished / "exchange")
    decisions = decide.decide(table, job.config, exchange, history)
    logger.info(f"deciding: {int(decisions.kept.sum()):,} of {len(table):,} records are kept")
    digest = token_store.compute_fingerprint({"corpus": job.fingerprint, "history": history.digest()})
    folder = job.unfinished / f"written-{digest[:24]}"
    results = _write(job, table, decisions, folder)
    report = summary.summarise(table, decisions, results, job.config)
    report |= {
        "version": llmjax.__version__,
        "fingerprint": job.fingerprint,
        "config": job.settings,
        "config_sha256": token_store.compute_fingerprint(job.settings),
        "inputs": _summarise_inputs(job.units),
    }
    history.with_decisions(table, decisions, job.config).save(folder / _SPLITS)
    write_bytes(folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    return folder


def _with_absolute_paths(config: CurateConfig) -> CurateConfig:
    """Make paths of auxiliary files absolute: a process of a cluster may run in another folder."""

    def absolute(path: str) -> str:
        return os.path.abspath(os.path.expanduser(path)) if path else ""

    quality, against, terms = config.quality, config.decontaminate.against, config.sample.terms
    return dataclasses.replace(
        config,
        quality=dataclasses.replace(quality, classifier=absolute(quality.classifier)),
        decontaminate=dataclasses.replace(config.decontaminate, against=tuple(map(absolute, against))),
        sample=dataclasses.replace(config.sample, terms=tuple(map(absolute, terms))),
    )


def config_to_json(config: CurateConfig) -> dict[str, Any]:
    """The config as JSON values, without fields that do not affect the corpus."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    del values["workers"]
    return values


def _read_finished(workdir: Path) -> dict[str, Any] | None:
    """The report of a finished run, or None if one of its files is missing."""
    try:
        report = json.loads((workdir / "report.json").read_text())
        is_complete = all((workdir / name).stat().st_size == file["bytes"] for name, file in report["outputs"].items())
    except (OSError, ValueError, KeyError):
        return None
    return report if is_complete and (workdir / _SPLITS).is_file() else None


def _measure(job: _Job) -> None:
    for name in job.config.inputs:
        logger.info(f"{name}: {sources.describe_formats([unit for unit in job.units if unit.source == name])}")
    pairs = zip(job.units, job.measurements, strict=True)
    tasks = [(unit, job.config, measurement) for unit, measurement in pairs if not measurement.is_complete()]
    if len(tasks) < len(job.units):
        logger.info(f"{len(job.units) - len(tasks)} of {len(job.units)} parts were already measured")
    if tasks:
        sizes = [unit.size for unit, *_ in tasks]
        with_progress("measuring", job.runner.map(measure.measure, tasks), len(tasks), sizes)


def _check_rejects(table: Table, config: CurateConfig) -> None:
    """Raise UserError if an input has more unreadable records or bytes than curate.max_bad_fraction allows."""
    for index, name in enumerate(table.names):
        in_source = table.source == index
        is_unread = in_source & (table["drop_stage"] == 0)
        sizes = table["sizes"][:, 0, 0]
        reason_ids, counts = np.unique(table["reason"][is_unread], return_counts=True)
        reasons = {table.reasons[i]: count for i, count in zip(reason_ids, counts.tolist(), strict=True)}
        reasons = {r: n for r, n in reasons.items() if r != EMPTY and not r.startswith(warc.NO_PAGE)}
        # Also by bytes: the lost part of a damaged file is only one record.
        for bad, total, unit in (
            (sum(reasons.values()), np.count_nonzero(in_source), "records"),
            (int(sizes[is_unread].sum()), int(sizes[in_source].sum()), "bytes"),
        ):
            if bad > config.max_bad_fraction * total:
                listed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
                lacks_field = any(reason.startswith(NO_FIELD) for reason in reasons)
                fix = (
                    f"set curate.inputs.{name}.text_field to the field of the text" if lacks_field else "fix the input"
                )
                raise UserError(
                    f"curate.inputs.{name}.path={config.inputs[name].path!r}: {bad} of {total} {unit} cannot be read "
                    f"({listed}), more than curate.max_bad_fraction={config.max_bad_fraction} allows; {fix}, "
                    f"or allow more with --config.curate.max_bad_fraction={math.ceil(100 * bad / total) / 100}"
                )


def _write(job: _Job, table: Table, decisions: Decisions, folder: Path) -> list[dict[str, Any]]:
    """Write all units and return their results; those of an interrupted run with the same decisions are reused."""
    sampled_rows = summary.choose_samples(table, decisions, job.config)
    results: list[Any] = [None] * len(job.units)
    tasks, task_units, numbers = [], [], Counter()
    for index, unit in enumerate(job.units):
        name, rows = f"{unit.source}-{numbers[unit.source]:05d}", slice(*table.offsets[index : index + 2].tolist())
        numbers[unit.source] += 1
        if (result := write.read_result(folder, name)) is not None:
            results[index] = result
            continue
        in_unit = sampled_rows[(sampled_rows >= rows.start) & (sampled_rows < rows.stop)] - rows.start
        task = write.Task(
            name=name,
            source=unit.source,
            measurement=table.measurements[index],
            stage=decisions.stage[rows],
            reason=decisions.reason[rows],
            split=decisions.split[rows],
            sampled_rows=frozenset(in_unit.tolist()),
        )
        tasks.append((task, table.reasons, job.config, folder))
        task_units.append(index)
    sizes = [job.units[index].size for index in task_units]
    written = with_progress("writing", job.runner.map(write.write, tasks), len(tasks), sizes) if tasks else []
    for index, result in zip(task_units, written, strict=True):
        results[index] = result
    for name in ("curated", "dropped"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        remove_partial(folder / name)
    return results


def _find_unpublished(job: _Job) -> Path | None:
    """The folder of a run that wrote all files but did not publish them all."""
    folder = None
    for path in job.unfinished.glob("written-*/report.json"):
        if json.loads(path.read_text()).get("fingerprint") == job.fingerprint:
            folder = path.parent
        else:  # of another config, and perhaps published in part
            shutil.rmtree(path.parent)
    return folder


def _publish(workdir: Path, folder: Path) -> dict[str, Any]:
    """Move the files of `folder` that are still there to the workdir; return the report.

    The old report is removed first and the new one is moved last: without a report the corpus is not finished.
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


def _summarise_inputs(units: list[Unit[InputConfig]]) -> dict[str, dict[str, Any]]:
    """Number of files, bytes, and a hash of file names, sizes and modification times, by input."""
    inputs: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(unit.source for unit in units):
        parts = [unit for unit in units if unit.source == name]
        inputs[name] = {
            "parts": len(parts),
            "bytes": sum(unit.size for unit in parts),
            "files": len({item.path for unit in parts for item in unit.items}),
            "fingerprint": token_store.compute_fingerprint({"parts": [repr((u.items, u.state)) for u in parts]}),
        }
    return inputs


def _remove_other_measurements(folder: Path, measurements: list[Measurement]) -> None:
    """Remove measurements that this corpus does not use, and partial files of a killed run."""
    remove_partial(folder)
    keys = {measurement.key for measurement in measurements}
    for path in folder.iterdir():
        if path.name.split(".")[0] not in keys and path.is_file():
            path.unlink()
