"""The summary of `llmjax compare` for the terminal."""

from collections.abc import Iterator, Sequence
import shlex

from etils import epath

from llmjax.evals.paired import SIGNIFICANCE
from llmjax.evals.paired_tasks import Pair
from llmjax.report.comparison import Comparison
from llmjax.run.inspection import align

_MAX_FIELDS = 20  # of the configs
_MAX_WIDTH = 40  # characters of a value of a config


def describe(comparison: Comparison, page: epath.Path) -> str:
    """The runs in tables with one column each, the tests in one line each, and the next step."""
    return "\n".join([*_list_lines(comparison), "", f"page: {page}", f"next: {_next_command(comparison, page)}"])


def _list_lines(comparison: Comparison) -> Iterator[str]:
    count = len(comparison.config)
    config = [(field, *map(_shorten, values)) for field, values in comparison.config[:_MAX_FIELDS]]
    yield from _align_indented(
        [("config, where it differs" if count else "config: the same", *comparison.names), *config]
    )
    if count > _MAX_FIELDS:
        yield f"  ... and {count - _MAX_FIELDS} more fields, on the page"
    quality = [
        (f"{score.name} {score.metric}", *("-" if value is None else _round(str(value)) for value in score.values))
        for score in comparison.quality
    ]
    yield ""
    yield from _align_indented([("scores, [95% interval]", *comparison.names), *quality])
    costs = [(name, *("-" if value is None else value for value in values)) for name, values in comparison.costs]
    if costs:
        yield ""
        yield from _align_indented([("cost of training", *comparison.names), *costs])
    num_tests = sum(pair.test is not None for pair in comparison.pairs)
    yield ""
    yield (
        f"paired tests at {SIGNIFICANCE}, corrected for {num_tests} test{'' if num_tests == 1 else 's'}"
        if comparison.pairs
        else "no paired test: no task was scored in two runs, and splits have no per-example results"
    )
    for pair in comparison.pairs:
        yield f"  {_describe_pair(pair)}"
        if pair.note:
            yield f"    settings differ: {pair.note}"
    yield from (f"note: {note}" for note in comparison.notes)


def _describe_pair(pair: Pair) -> str:
    first, second = pair.runs
    if pair.test is None or pair.corrected is None:
        return f"{pair.task}, {first} and {second}: no test: {pair.reason}"
    difference = pair.test.difference
    interval = f" [{difference.low:+.4f}, {difference.high:+.4f}]" if difference.low is not None else ""
    kind = "right" if pair.is_binary else "better"
    wins = f"; {kind} alone: {first} {pair.num_first:,}, {second} {pair.num_second:,}"
    return (
        f"{pair.task} {pair.metric}: {second} - {first} = {difference.value:+.4f}{interval}, p = {pair.corrected:.3g} "
        f"({pair.test.name}): {'significant' if pair.is_significant else 'not significant'}"
        f"{wins if pair.num_first + pair.num_second else ''}"
    )


def _next_command(comparison: Comparison, page: epath.Path) -> str:
    """Score what a run lacks, or look at the page."""
    if not comparison.missing:
        return f"open {page} in a browser"
    index, task = comparison.missing[0]
    scored = zip(comparison.names, comparison.runs, strict=True)
    name, record = next((name, record) for name, run in scored if (record := run.last_eval(task)) is not None)
    workdir = shlex.quote(str(comparison.runs[index].workdir))
    # A task of lm-eval is named by its file.
    file = shlex.quote(record.get("settings", {}).get("file", task))
    return f"llmjax eval --workdir={workdir} --tasks={file}   # a task that {name} was scored on"


def _round(estimate: str) -> str:
    """An estimate without an interval is a number alone."""
    return estimate.removesuffix(" [undefined, undefined]")


def _shorten(value: str | None) -> str:
    if value is None:
        return "-"
    value = value.encode(errors="backslashreplace").decode()  # a lone surrogate cannot be printed
    return value if len(value) <= _MAX_WIDTH else f"{value[: _MAX_WIDTH - 3]}..."


def _align_indented(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as columns; all but the first one are indented."""
    head, *others = rows
    return align([tuple(head), *((f"  {first}", *rest) for first, *rest in others)])
