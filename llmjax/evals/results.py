"""Results of tasks: bootstrap intervals, the files of a task, and whether earlier results still hold."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import logging
import math
from typing import Any

from etils import epath
import numpy as np

import llmjax
from llmjax import atomic
from llmjax.data.store.token_store import compute_fingerprint
from llmjax.errors import UserError
from llmjax.evals.config import check_name
from llmjax.parallel import hosts
from llmjax.run import config as run_config, workdir as workdirs
from llmjax.run.loading import Loaded

logger = logging.getLogger(__name__)

Line = Mapping[str, Any]  # the result of one example
LEVEL = 0.95
DRAWS = 1000
_SEED = 0
# Of every other score a larger value is better.
_LOWER_IS_BETTER = (
    "loss",
    "perplexity",
    "byte_perplexity",
    "word_perplexity",
    "bits_per_byte",
    "rmse",
    "log_loss",
    "log_loss_scaled",
    "brier",
    "ece",
    "ece_scaled",
    "unsupported",
    "sample_nats",
    "extraction_rate",
)
_CHUNK = 1 << 22  # indices that are drawn at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and the ends of its 95% interval; None where the examples do not define it."""

    value: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.value is None:
            return "undefined"
        low, high = ("undefined" if end is None else f"{end:.4f}" for end in (self.low, self.high))
        return f"{self.value:.4f} [{low}, {high}]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `llmjax eval --tasks`.

    limit   examples of each task at most; None: all
    shots   solved examples before each one; None: as the task says
    batch   rows that are computed at a time; None: eval.batch, or train.global_batch
    chat    whether prompts are written by the model's chat template
    """

    limit: int | None = None
    shots: int | None = None
    batch: int | None = None
    chat: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskResult:
    """The result of a task.

    task       its name, which names its files
    metrics    name -> estimate
    examples   one JSON object each, in the order of the task, with the index, the text that the model read, the target,
               what the model answered, and the metrics of this example
    settings   options that the result depends on
    details    further fields of the task's file, such as a confusion matrix
    """

    task: str
    metrics: Mapping[str, Estimate]
    examples: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def estimate(
    statistics: Callable[[np.ndarray], Mapping[str, float]], count: int, *, draws: int = DRAWS
) -> dict[str, Estimate]:
    """Numbers of `count` examples with percentile bootstrap intervals (Efron and Tibshirani, 1993, chapter 13).

    statistics   indices of examples, of which some may repeat -> the numbers of these examples by name; nan where the
                 examples do not define a number. It is called for all examples, and for each of `draws` resamples
    """
    values = dict(statistics(np.arange(count)))
    resampled: dict[str, list[float]] = {name: [] for name in values}
    rng = np.random.default_rng(_SEED)
    for _ in range(draws):
        for name, number in statistics(rng.integers(0, count, count)).items():
            resampled[name].append(number)
    return {name: _summarize(value, np.array(resampled[name])) for name, value in values.items()}


def estimate_means(values: Mapping[str, Sequence[float] | np.ndarray], *, draws: int = DRAWS) -> dict[str, Estimate]:
    """Means over the same examples by name, with intervals as of `estimate`, for the same resamples."""
    names, table = list(values), np.array([np.asarray(column, np.float64) for column in values.values()])
    count = table.shape[-1]
    rng, means = np.random.default_rng(_SEED), []
    size = max(1, _CHUNK // max(count, 1))
    for start in range(0, draws, size):
        indices = rng.integers(0, count, (min(size, draws - start), count))
        means.append(np.stack([column[indices].mean(-1) for column in table], axis=1))
    resampled = np.concatenate(means)
    return {name: _summarize(table[i].mean(), resampled[:, i]) for i, name in enumerate(names)}


def _summarize(value: float, resampled: np.ndarray) -> Estimate:
    defined = resampled[~np.isnan(resampled)]
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    # Without interpolation, since an end between a number and infinity is neither.
    ends = np.quantile(defined, tails, method="inverted_cdf").tolist() if len(defined) else [math.nan, math.nan]
    finite = [float(number) if math.isfinite(number) else None for number in (value, *ends)]
    return Estimate(value=finite[0], low=finite[1], high=finite[2])


def make_key(loaded: Loaded, task: Mapping[str, Any]) -> str:
    """A fingerprint of all that a result depends on: the parameters, how they are used, the task, and this version.

    task   JSON-ready: the content of the task's files and its options
    """
    config = run_config.to_json(loaded.config)
    return compute_fingerprint(
        {
            "task": dict(task),
            "parameters": [loaded.fingerprint, loaded.params_name],
            "model": config["model"],
            "objective": config["objective"],
            "seq_len": config["data"]["seq_len"],
            "tokenizer": loaded.tokenizer.sha256,
            "llmjax": llmjax.__version__,
        }
    )


def read_cached(workdir: epath.Path, step: int, task: str, key: str) -> dict[str, Any] | None:
    """The content of the task's file if it was written for the same key; else None. All processes get one answer.

    Raises UserError for a name that cannot be that of files.
    """
    check_name(task, "task")
    found = None
    if hosts.is_primary():
        path = workdirs.eval_path(workdir, step, task)
        found = workdirs.read_json(path)
        if found is not None and (found.get("key") != key or not path.with_suffix(".jsonl").exists()):
            found = None
    return json.loads(hosts.broadcast("cached", json.dumps(found)))


def make_record(loaded: Loaded, result: TaskResult, key: str) -> dict[str, Any]:
    """The content of eval/<step>/<task>.json."""
    return _json_ready(
        {
            "task": result.task,
            "step": loaded.step,
            "n": len(result.examples),
            "metrics": {name: dataclasses.asdict(number) for name, number in result.metrics.items()},
            "parameters": loaded.params_name,
            "fingerprint": loaded.fingerprint,
            "key": key,
            "settings": dict(result.settings),
            "bootstrap": {"level": LEVEL, "draws": DRAWS, "seed": _SEED},
            **result.details,
        }
    )


def write(workdir: epath.Path, loaded: Loaded, result: TaskResult, key: str) -> epath.Path:
    """Write eval/<step>/<task>.jsonl, then eval/<step>/<task>.json, on process 0. Returns the path of the latter."""
    check_name(result.task, "task")
    path = workdirs.eval_path(workdir, loaded.step, result.task)
    if hosts.is_primary():
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(_json_ready(example), ensure_ascii=False) + "\n" for example in result.examples]
        # A lone surrogate, which a text may contain, has no UTF-8.
        atomic.write_bytes(path.with_suffix(".jsonl"), "".join(lines).encode(errors="backslashreplace"))
        workdirs.write_json(path, make_record(loaded, result, key))
    hosts.barrier(f"task {result.task} written")
    return path


def find_main(record: Mapping[str, Any]) -> str:
    """The name of the main score of a task's file: that which it names, or its first one."""
    return record.get("main") or next(iter(record["metrics"]))


def read_lines(path: epath.Path, fix: str) -> list[Line]:
    """The lines of eval/<step>/<task>.jsonl, one for each example.

    Raises UserError for a line that is none; it says to remove the file, and then `fix`.
    """
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or "index" not in line:
            raise UserError(f"{path}: line {number} is not the result of an example; remove the file{fix}")
        lines.append(line)
    return lines


def is_lower_better(metric: str) -> bool:
    """Whether a lower value of a score is better; `metric,filter` of lm-eval is named by the metric."""
    return metric.partition(",")[0] in _LOWER_IS_BETTER


def is_eval_metric_lower_better(metric: str) -> bool:
    """`is_lower_better` of an eval.metric: a score of the split, or TASK/METRIC or TASK/METRIC/GROUP of a task."""
    return is_lower_better(metric.split("/")[1] if "/" in metric else metric)


def describe(record: Mapping[str, Any]) -> list[str]:
    """The content of a task's file as lines for people."""
    metrics = {name: Estimate(**number) for name, number in record["metrics"].items()}
    width = max(map(len, metrics), default=0)
    chance = record.get("chance_levels", {})
    return [
        f"{record['task']}: {record['n']:,} examples, with 95% intervals",
        *(f"  {name:{width}}  {number}{compare(number, chance.get(name))}" for name, number in metrics.items()),
        *([f"  note: {record['note']}"] if "note" in record else []),
    ]


def compare(number: Estimate, chance: float | None) -> str:
    """What is said of a number beside the score of a random choice: " (at chance)" where the interval holds that."""
    if chance is None or number.low is None or number.high is None:
        return ""
    position = "at" if number.low <= chance <= number.high else "below" if number.high < chance else "above"
    return f"  ({position} chance, {chance:.3g})"


def _json_ready(value: Any) -> Any:
    """The value in the types of JSON: no numpy types, no sets, no nan."""
    if isinstance(value, Mapping):
        return {str(name): _json_ready(item) for name, item in value.items()}
    if isinstance(value, np.ndarray):
        return _json_ready(value.tolist())
    if isinstance(value, list | tuple):
        return [_json_ready(item) for item in value]
    if isinstance(value, np.generic):
        return _json_ready(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)
