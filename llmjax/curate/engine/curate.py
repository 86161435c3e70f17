"""Run a curation: measure every unit, decide on the scores, write the corpus. Resumable at every step.

WORKDIR/measured/     texts and scores of every unit; a later run with other thresholds starts from them
WORKDIR/unfinished/   what a run is about to hand over
WORKDIR/curated/      NAME-00000-train.jsonl.zst ...: documents that stay
WORKDIR/dropped/      NAME-00000.jsonl.zst: what does not, with the stage and the reason
WORKDIR/report.json   what happened, and hashes of inputs, configuration and outputs
WORKDIR/splits.npz    every document that ever stayed here, and its cluster: more data moves and ousts none of them
WORKDIR/config.json   the config, which --resume takes up
"""

from collections.abc import Callable
import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path
import shutil
from typing import Any

import numpy as np

import llmjax
from llmjax.atomic import remove_partial, write_bytes
from llmjax.curate.config import CurateConfig
from llmjax.curate.dedup import decontaminate
from llmjax.curate.engine import decide, measure, summary, write
from llmjax.curate.engine.measurements import Measured
from llmjax.curate.engine.runners import Runner
from llmjax.curate.filters import language, personal_data
from llmjax.curate.readers import warc
from llmjax.curate.readers.inputs import list_units
from llmjax.data.readers import sources
from llmjax.data.readers.documents import EMPTY
from llmjax.data.store import split, token_store
from llmjax.data.store.workers import with_progress
from llmjax.errors import UserError

Say = Callable[[str], None]
_SPLITS = "splits.npz"


def curate(config: CurateConfig, workdir: Path, runner: Runner, *, say: Say) -> dict[str, Any]:
    """The report of the corpus in `workdir`, which is made first where it is missing or was made otherwise.

    An interrupted run goes on where it stopped. The files depend on the inputs and the config alone (and, for splits,
    on what was curated in this workdir before), on no runner and no number of workers. Raises UserError for input that
    cannot be honoured.
    """
    if not config.inputs:
        raise UserError("curate.inputs is empty: name one, such as --config.curate.inputs.web.path='crawl/*.warc.gz'")
    told = config_of(config)
    config = _located(config)
    personal_data.check(config.personal_data)
    language.check(config.language)
    if "decontaminate" in config.stages:
        decontaminate.check(config.decontaminate)
    split.check(config.split, "curate.split")
    units = [unit for name, given in config.inputs.items() for unit in list_units(name, given)]
    asked = measure.settings_of(config)
    measured = [Measured(workdir / "measured", measure.key_of(unit, asked)) for unit in units]
    unfinished = workdir / "unfinished"
    named = [unit.source for unit in units]
    key = token_store.fingerprint_of({"config": told, "measured": [m.key for m in measured], "sources": named})
    write_bytes(workdir / "config.json", (json.dumps({"curate": told}, indent=1) + "\n").encode())
    if (done := _finished(workdir)) and done["key"] == key:
        say("nothing left to do: the corpus is there, made from these inputs with this configuration")
        return done
    out = _ready(unfinished, key)
    if out is None:
        out = _make(units, measured, config, told, key, workdir, runner, say)
    else:
        say("the interrupted run had finished: its files are handed over")
    report = _hand_over(workdir, out)
    shutil.rmtree(unfinished, ignore_errors=True)
    _forget(workdir / "measured", measured)
    return report


def _make(units, measured: list[Measured], config, told, key: str, workdir: Path, runner: Runner, say: Say) -> Path:
    """The folder with all that is to be handed over, the report last."""
    _measure(units, measured, config, runner, say)
    table = decide.Table(measured, [unit.source for unit in units])
    known = decide.Known.read(workdir / _SPLITS)
    _check_rejects(table, config)
    made = decide.decide(table, config, runner, workdir / "unfinished" / "exchange", known)
    say(f"deciding: {int(made.kept.sum()):,} of {len(table):,} records stay")
    tag = token_store.fingerprint_of({"key": key, "known": known.digest()})
    out = workdir / "unfinished" / f"written-{tag[:24]}"
    chosen = summary.choose_samples(table, made, config)
    results = _write(units, table, made, chosen, config, runner, out, say)
    report = summary.summarise(table, made, results, config)
    report |= {
        "version": llmjax.__version__,
        "key": key,
        "config": told,
        "config_sha256": token_store.fingerprint_of(told),
    }
    report["inputs"] = _inputs(units)
    known.with_new(table, made, config).save(out / _SPLITS)
    write_bytes(out / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    return out


def _located(config: CurateConfig) -> CurateConfig:
    """With absolute paths of the files that measuring reads: a process of a cluster may stand in another folder."""

    def located(path: str) -> str:
        return os.path.abspath(os.path.expanduser(path)) if path else ""

    quality, against, terms = config.quality, config.decontaminate.against, config.sample.terms
    return dataclasses.replace(
        config,
        quality=dataclasses.replace(quality, classifier=located(quality.classifier)),
        decontaminate=dataclasses.replace(config.decontaminate, against=tuple(map(located, against))),
        sample=dataclasses.replace(config.sample, terms=tuple(map(located, terms))),
    )


def config_of(config: CurateConfig) -> dict[str, Any]:
    """The config as JSON holds it, without what has no influence on the corpus."""
    told = json.loads(json.dumps(dataclasses.asdict(config)))
    del told["workers"]
    return told


def _finished(workdir: Path) -> dict[str, Any] | None:
    """The report of a finished run whose files are all there, else None."""
    try:
        report = json.loads((workdir / "report.json").read_text())
        whole = all((workdir / name).stat().st_size == file["bytes"] for name, file in report["outputs"].items())
        whole = whole and (workdir / _SPLITS).is_file()
    except (OSError, ValueError, KeyError):
        return None
    return report if whole else None


def _measure(units, measured: list[Measured], config: CurateConfig, runner: Runner, say: Say) -> None:
    for name in dict.fromkeys(unit.source for unit in units):
        say(f"{name}: {sources.describe_formats([unit for unit in units if unit.source == name])}")
    left = [(unit, one) for unit, one in zip(units, measured, strict=True) if not one.complete()]
    if len(left) < len(units):
        say(f"{len(units) - len(left)} of {len(units)} parts were measured before")
    if left:
        tasks = [(unit, config, one) for unit, one in left]
        sizes = [unit.size for unit, _ in left]
        with_progress(say, "measuring", runner.map(measure.measure, tasks), len(tasks), sizes)


def _check_rejects(table: decide.Table, config: CurateConfig) -> None:
    """Raises UserError where an input has more unreadable records than it may."""
    for index, name in enumerate(table.names):
        mine = table.source == index
        total = np.count_nonzero(mine)
        sizes = table["sizes"][mine, 0, 0]
        lost, size = int(sizes[table["early"][mine] == 0].sum()), int(sizes.sum())
        numbers, counts = np.unique(table["reason"][mine & (table["early"] == 0)], return_counts=True)
        counted = zip([table.reasons[number] for number in numbers], counts.tolist(), strict=True)
        reasons = {r: n for r, n in counted if r != EMPTY and not r.startswith(warc.NO_PAGE)}
        bad = sum(reasons.values())
        # By records, and by bytes: what a damaged file lost is one record.
        for count, of, what in ((bad, total, "records"), (lost, size, "bytes")):
            if count > config.max_bad_fraction * of:
                listed = ", ".join(f"{number} {reason}" for reason, number in sorted(reasons.items()))
                raise UserError(
                    f"curate.inputs.{name}.path={config.inputs[name].path!r}: {count} of {of} {what} cannot be read "
                    f"({listed}), more than curate.max_bad_fraction={config.max_bad_fraction} allows; fix the input, "
                    f"or allow more with --config.curate.max_bad_fraction={math.ceil(100 * count / of) / 100}"
                )


def _write(units, table, made, chosen, config: CurateConfig, runner: Runner, out: Path, say: Say) -> list[dict]:
    """The results of all units; what an interrupted run with the same decisions wrote is taken as it is."""
    results: list[Any] = [None] * len(units)
    tasks, places, numbers = [], [], {}
    for index, unit in enumerate(units):
        numbers[unit.source] = number = numbers.get(unit.source, -1) + 1
        name, rows = f"{unit.source}-{number:05d}", slice(table.edges[index], table.edges[index + 1])
        if (result := write.finished(out, name)) is not None:
            results[index] = result
            continue
        task = write.Task(
            name=name,
            source=unit.source,
            measured=table.units[index],
            stage=made.stage[rows],
            reason=made.reason[rows],
            split=made.split[rows],
            samples=frozenset(int(row) for row in chosen[(chosen >= rows.start) & (chosen < rows.stop)] - rows.start),
        )
        tasks.append((task, table.reasons, config, out))
        places.append(index)
    sizes = [units[index].size for index in places]
    written = with_progress(say, "writing", runner.map(write.write, tasks), len(tasks), sizes) if tasks else []
    for index, result in zip(places, written, strict=True):
        results[index] = result
    for name in ("curated", "dropped"):
        (out / name).mkdir(parents=True, exist_ok=True)
        remove_partial(out / name)
    return results


def _ready(unfinished: Path, key: str) -> Path | None:
    """The folder of a run that had written everything, its report last, and ended before all was handed over."""
    ready = None
    for path in unfinished.glob("written-*/report.json"):
        if json.loads(path.read_text())["key"] == key:
            ready = path.parent
        else:  # of another configuration, and perhaps handed over in part
            shutil.rmtree(path.parent)
    return ready


def _hand_over(workdir: Path, out: Path) -> dict[str, Any]:
    """Put what a run has written in the place of what was there, as far as that is not done; returns its report.

    The old report goes first and the new one comes last: without it nothing counts.
    """
    report = json.loads((out / "report.json").read_text())
    (workdir / "report.json").unlink(missing_ok=True)
    for name in ("curated", "dropped"):
        if (out / name).is_dir():
            shutil.rmtree(workdir / name, ignore_errors=True)
            (out / name).replace(workdir / name)
    for name in (_SPLITS, "report.json"):
        if (out / name).is_file():
            (out / name).replace(workdir / name)
    return report


def _inputs(units) -> dict[str, dict[str, Any]]:
    """Of every input its files' number, bytes, and a hash of their names, sizes and times of change."""
    made: dict[str, dict[str, Any]] = {}
    for unit in units:
        one = made.setdefault(unit.source, {"parts": 0, "bytes": 0, "files": [], "state": hashlib.sha256()})
        one["parts"] += 1
        one["bytes"] += unit.size
        one["files"] += [item.path for item in unit.items]
        one["state"].update(repr((unit.items, unit.state)).encode())
    for one in made.values():
        one["files"], one["state"] = len(set(one["files"])), one["state"].hexdigest()
    return made


def _forget(folder: Path, measured: list[Measured]) -> None:
    """Remove measurements that this corpus does not rest on, and what a killed run left."""
    remove_partial(folder)
    keys = {one.key for one in measured}
    for path in folder.iterdir():
        if path.name.split(".")[0] not in keys and path.is_file():
            path.unlink()
