"""Compare runs from their files: the fields of their configs that differ, their scores, paired tests, and costs."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
from typing import Any

from etils import epath

from llmjax.data.store.tokenizer import Bytes
from llmjax.errors import UserError
from llmjax.evals import paired_tasks, results
from llmjax.evals.paired_tasks import Pair, TaskFiles
from llmjax.metrics import duration
from llmjax.report import cost
from llmjax.report.files import RunFiles, read
from llmjax.report.markup import format_count
from llmjax.run import config as run_config, loading, workdir as workdirs

MAX_RUNS = 8  # columns of a table, and colours of a plot
_EMPTY = {None, '""', "[]", "null", "false"}  # values of a config that say nothing
_SPLIT_SCORES = ("loss", "perplexity", "bits_per_byte", "accuracy", "macro_f1", "pearson", "spearman", "margin")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """A score of a split or a task in every run, None in those that have none. A split's scores have no interval.

    steps     the newest step of each run that was scored
    is_main   whether it is the main score of its task; of a split, all are
    """

    name: str
    metric: str
    values: Sequence[results.Estimate | None]
    steps: Sequence[int | None]
    is_main: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is the same and what differs between runs. Every row has one value for each run, in their order.

    names    short names of the runs
    config   (field, values) of the fields that differ, as JSON; None where a config has no such field
    scores   of the splits and tasks that at least two runs have
    pairs    for each of these tasks, every run with it against the first run with it
    costs    (name, values)
    missing  (run, task) of the tasks that another run has
    notes    what else the reader must know
    """

    names: Sequence[str]
    runs: Sequence[RunFiles]
    config: Sequence[tuple[str, Sequence[str | None]]]
    scores: Sequence[Score]
    pairs: Sequence[Pair]
    costs: Sequence[tuple[str, Sequence[str | None]]]
    missing: Sequence[tuple[int, str]]
    notes: Sequence[str]

    @property
    def quality(self) -> list[Score]:
        """The main scores."""
        return [score for score in self.scores if score.is_main]


def compare(workdirs_: Sequence[epath.Path]) -> Comparison:
    """Compare two to MAX_RUNS runs.

    Raises UserError for another number, a folder that is no run, a run that is given twice, runs that have no split and
    no task in common, and damaged results of examples.
    """
    _check(workdirs_)
    runs = [read(path) for path in workdirs_]
    names = _choose_names(workdirs_)
    shared = _list_shared(runs, names)
    costs, notes = _list_costs(runs, names)
    notes += [f"{path} cannot be read and was left out" for run in runs for path in run.unreadable]
    tasks = [name for name in shared if is_task(_newest(runs, name))]
    notes += [note for name in shared if name not in tasks for note in _compare_documents(name, runs, names)]
    return Comparison(
        names=names,
        runs=runs,
        config=_compare_configs([run.config or {} for run in runs]),
        scores=[score for name in shared for score in _list_scores(name, _newest(runs, name))],
        pairs=paired_tasks.correct([pair for name in tasks for pair in _pair_runs(name, runs, names)]),
        costs=costs,
        missing=[
            (index, name) for name in _list_tasks(runs) for index, run in enumerate(runs) if name not in run.evals
        ],
        notes=notes,
    )


def is_task(records: Sequence[Mapping[str, Any] | None]) -> bool:
    """Whether the files of the runs are those of a task, not of a split."""
    return any(record is not None and "metrics" in record for record in records)


def _check(folders: Sequence[epath.Path]) -> None:
    if not 2 <= len(folders) <= MAX_RUNS:
        raise UserError(
            f"llmjax compare takes 2 to {MAX_RUNS} runs, and {len(folders)} were given: name their workdirs, such as "
            "`llmjax compare runs/first runs/second`"
        )
    seen: dict[str, epath.Path] = {}
    for folder in folders:
        if not folder.exists():
            raise UserError(f"{folder}: no such folder; give the workdir of a run")
        if workdirs.read_run_config(folder) is None:
            raise UserError(f"{folder}: no run there (no {workdirs.CONFIG}); give the workdir of a run")
        resolved = str(folder.resolve())
        if resolved in seen:
            raise UserError(f"{folder}: the same run as {seen[resolved]}; give each run once")
        seen[resolved] = folder


def _choose_names(folders: Sequence[epath.Path]) -> list[str]:
    """The last part of each path, or the paths where two have the same one."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _newest(runs: Sequence[RunFiles], name: str) -> list[dict[str, Any] | None]:
    return [run.last_eval(name) for run in runs]


def _list_shared(runs: Sequence[RunFiles], names: Sequence[str]) -> list[str]:
    """The splits, then the tasks, that at least two runs have."""
    every = dict.fromkeys(name for run in runs for name in run.evals)
    shared = [name for name in every if sum(name in run.evals for run in runs) > 1]
    if not shared:
        listed = "; ".join(
            f"{name} has {', '.join(run.evals) or 'none'}" for name, run in zip(names, runs, strict=True)
        )
        raise UserError(
            f"no two of the runs have an evaluation in common ({listed}): score them on the same split or task with "
            "`llmjax eval --workdir=DIR`"
        )
    return sorted(shared, key=lambda name: is_task(_newest(runs, name)))


def _list_tasks(runs: Sequence[RunFiles]) -> list[str]:
    every = dict.fromkeys(name for run in runs for name in run.evals)
    return [name for name in every if is_task(_newest(runs, name))]


def _compare_configs(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str | None]]]:
    """(field, values as JSON) of the fields of nested dicts that are not the same in all of them.

    A field that only some of them have, such as those of one more source, is left out where no value says anything.
    """
    flat = [dict(_flatten(config)) for config in configs]
    rows = [(field, [each.get(field) for each in flat]) for field in dict.fromkeys(f for each in flat for f in each)]
    return [
        (field, values)
        for field, values in rows
        if len(set(values)) > 1 and not (None in values and set(values) <= _EMPTY)
    ]


def _flatten(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        field = f"{path}.{name}" if path else name
        if isinstance(value, dict) and value:
            yield from _flatten(value, field)
        else:
            yield field, json.dumps(value, ensure_ascii=False)


def _list_scores(name: str, records: Sequence[Mapping[str, Any] | None]) -> Iterator[Score]:
    """The scores of a split or a task that at least two runs have."""
    steps = [None if record is None else record["step"] for record in records]
    if is_task(records):
        numbers = [{} if record is None else _read_estimates(record) for record in records]
        mains = {results.find_main(record) for record in records if record is not None}
    else:
        totals = [{} if record is None else record["total"] for record in records]
        numbers = [
            {
                metric: results.Estimate(value=total[metric], low=None, high=None)
                for metric in _SPLIT_SCORES
                if total.get(metric) is not None
            }
            for total in totals
        ]
        mains = set(_SPLIT_SCORES)
    for metric in sorted(dict.fromkeys(metric for each in numbers for metric in each), key=lambda m: m not in mains):
        values = [each.get(metric) for each in numbers]
        if sum(value is not None for value in values) > 1:
            yield Score(name=name, metric=metric, values=values, steps=steps, is_main=metric in mains)


def _read_estimates(record: Mapping[str, Any]) -> dict[str, results.Estimate]:
    return {metric: results.Estimate(**number) for metric, number in record["metrics"].items()}


def _compare_documents(split: str, runs: Sequence[RunFiles], names: Sequence[str]) -> Iterator[str]:
    """A line where the runs were not scored on the same documents, or not with the same tokens."""
    totals = {
        name: scores["total"] for name, scores in zip(names, _newest(runs, split), strict=True) if scores is not None
    }
    for fields, remark in (
        (("documents", "text_bytes"), "they were scored on other documents, so the scores do not compare"),
        (("num_targets",), "they score other targets, so compare bits per byte, not loss or perplexity"),
    ):
        seen = {name: tuple(total.get(field) for field in fields) for name, total in totals.items()}
        if len(set(seen.values())) > 1:
            listed = ", ".join(
                f"{name} {' and '.join(f'{format_count(n)} {f}' for n, f in zip(numbers, fields, strict=True))}"
                for name, numbers in seen.items()
            )
            yield f"{split}: {listed.replace('_', ' ')}: {remark}"
            return


def _pair_runs(task: str, runs: Sequence[RunFiles], names: Sequence[str]) -> Iterator[Pair]:
    """Every run with the task against the first one that has it."""
    files = [
        TaskFiles(run=name, record=record, path=workdirs.eval_path(run.workdir, record["step"], task))
        for name, run in zip(names, runs, strict=True)
        if (record := run.last_eval(task)) is not None
    ]
    first, *others = files
    return (paired_tasks.pair(task, first, other) for other in others)


def _list_costs(runs: Sequence[RunFiles], names: Sequence[str]) -> tuple[list[tuple[str, list[str | None]]], list[str]]:
    """(rows of what each run took, notes); None where a run does not say."""
    columns, notes = [], []
    for name, run in zip(names, runs, strict=True):
        about, seconds, tokens = run.run or {}, run.sum_over_steps("step_seconds"), run.sum_over_steps("num_tokens")
        last = run.metrics[-1] if run.metrics else {}
        devices, total = about.get("num_devices"), cost.compute(run)
        if total is not None and total.unmeasured:
            notes.append(f"{name}: device-hours leave out {cost.describe_unmeasured(total)}")
        flops = None
        if tokens:
            try:
                flops = tokens * _flops_per_token(run)
            except UserError as error:
                notes.append(f"{name}: no model FLOPs, since its config cannot be read: {error}")
        columns.append(
            {
                "parameters": _count(about.get("parameters")),
                "trained parameters": _count(about.get("trained_parameters")),
                "steps": _count(last.get("step")),
                "tokens, without padding": f"about {format_count(tokens)}" if tokens else None,
                "targets scored in training": _count(last.get("total_targets")),
                "model FLOPs": None if flops is None else f"{flops:.3g}",
                "devices": f"{devices} x {about.get('device', '?')}" if devices else None,
                "time in steps": duration(seconds) if seconds else None,
                "device-hours": None if total is None else cost.format_amount(total.hours),
            }
        )
    rows = [(name, [column[name] for column in columns]) for name in columns[0]]
    return [(name, values) for name, values in rows if any(value is not None for value in values)], notes


def _count(number: int | None) -> str | None:
    return None if number is None else format_count(number)


def _flops_per_token(run: RunFiles) -> float:
    """Model FLOPs of a token in training, as for MFU: those of a teacher's forward pass are part of them."""
    config = loading.read_config(run.workdir)
    of_teacher = ((run.run or {}).get("teacher") or {}).get("forward_flops_per_token", 0.0)
    return run_config.flops_per_token(config, run_config.objective(config, Bytes()).target_len) + of_teacher
