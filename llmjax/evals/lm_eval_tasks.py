"""Tasks of lm-eval (EleutherAI's evaluation harness), from YAML files, with this process's model."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import pathlib
from typing import Any

from etils import epath
import jinja2
import numpy as np

from llmjax.data.chat_template import ChatTemplate, RefusedDialogueError
from llmjax.errors import UserError, suggest
from llmjax.evals import results
from llmjax.evals.config import check_name
from llmjax.evals.requests import LanguageModel
from llmjax.evals.results import Estimate, Options, TaskResult
from llmjax.run.loading import Loaded

os.environ.setdefault("TQDM_DISABLE", "1")  # bars of all processes, in the middle of the log
try:
    import lm_eval
    from lm_eval import evaluator
    from lm_eval.api.metrics import mean
    from lm_eval.api.model import LM
    from lm_eval.api.registry import metric_registry
    from lm_eval.api.task import ALL_OUTPUT_TYPES, Task, TaskConfig
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml
except ImportError as error:
    raise UserError(
        f"--tasks: lm-eval is not installed ({error}); run `pip install 'llmjax[eval]'` for tasks in YAML files"
    ) from None

logger = logging.getLogger(__name__)

_FEWSHOT_SEED = 1234  # the default of lm-eval
_MAX_NEW_TOKENS = 256  # where a task says nothing: the default of lm-eval's hf backend
_SLOW_AGGREGATIONS = ("bleu", "chrf", "chrf++", "ter")  # seconds for each resample
_SLOW_DRAWS = 100
_MULTIMODAL = ("doc_to_image", "doc_to_audio")


@dataclasses.dataclass(frozen=True)
class TaskFile:
    """A task, and the identity of its definition: its fields, and hashes of the Python files that it may call."""

    path: pathlib.Path
    task: Task
    identity: Mapping[str, Any]


def load_task(path: pathlib.Path, shots: int | None) -> TaskFile:
    """Read a YAML file of lm-eval, and its documents. Raises UserError for a file that is no task of text."""
    if not path.is_file():
        raise UserError(f"--tasks={path}: no such file; give a YAML file of lm-eval")
    fields = _read_fields(path)
    _check_fields(path, fields)
    # Libraries raise errors of any type for a wrong value, a template that fails, or documents that are not there.
    try:
        [task] = TaskManager(include_defaults=False).load([str(path)])["tasks"].values()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or "no further details"
        raise UserError(f"{path}: lm-eval cannot load it: {type(error).__name__}: {reason}") from error
    check_name(task.task_name, f"{path}: task")
    # As lm-eval's own command: a task that demands 0 keeps it.
    if shots is not None and task.config.num_fewshot != 0:
        task.set_config(key="num_fewshot", value=shots)
    elif task.config.num_fewshot is None:
        task.set_config(key="num_fewshot", value=0)
    code = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.parent.glob("*.py"))}
    fields = json.loads(json.dumps(fields, default=str))
    return TaskFile(path, task, {"fields": fields, "code": code, "lm_eval": lm_eval.__version__})


def evaluate(
    workdir: epath.Path,
    loaded: Loaded,
    file: TaskFile,
    options: Options,
    *,
    make_model: Callable[[], LanguageModel],
    template: ChatTemplate | None,
) -> dict[str, Any]:
    """Score a checkpoint on a task, and write its files; returns the content of eval/<step>/<task>.json.

    Where the files hold the result of the same task and parameters, they are not written again.
    make_model   called where the task has to be computed
    template     writes the prompts, with options.chat
    """
    task, settings = file.task, {"file": file.path.name, **dataclasses.asdict(options)}
    settings["shots"] = task.config.num_fewshot
    del settings["batch"]  # has no effect on the result
    adapter = Adapter(template)
    _build_requests(file, adapter, options)
    identity = {
        **file.identity,
        "requests": _hash_requests(task),
        "settings": settings,
        "template": template and template.source,
    }
    key = results.make_key(loaded, identity)
    if (cached := results.read_cached(workdir, loaded.step, task.task_name, key)) is not None:
        logger.info("%s: cached, since neither the checkpoint nor the task has changed", task.task_name)
        return cached
    adapter.model = model = make_model()
    cut = model.num_cut
    samples = _evaluate(file, adapter, options)
    if num_cut := model.num_cut - cut:
        logger.info("  %d request(s) were cut on the left to fit into %d tokens", num_cut, model.max_length)
    result = TaskResult(
        task=task.task_name,
        metrics=_estimate(samples, task.aggregation() or {}),
        examples=list(_list_examples(samples, task.OUTPUT_TYPE)),
        settings=settings,
        details={"num_cut": num_cut, "max_length": model.max_length, "lm_eval": lm_eval.__version__},
    )
    results.write(workdir, loaded, result, key)
    return results.make_record(loaded, result, key)


class Adapter(LM):
    """The interface through which lm-eval sends its requests. `rank` and `world_size` stay those of one process: every
    process of a job evaluates the whole task, and lm-eval would import torch for more."""

    def __init__(self, template: ChatTemplate | None, model: LanguageModel | None = None):
        """template: of chats; model: may be set later, as requests are built without it."""
        super().__init__()
        self.model = model
        self._template = template

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Of requests with (context, continuation)."""
        model = self._require_model()
        return model.loglikelihoods([model.encode_pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Of requests with a text."""
        model = self._require_model()
        return model.rolling([model.encode(request.args[0]) for request in requests])

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Of requests with (prompt, generation_kwargs); those with equal options are computed together."""
        model = self._require_model()
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts = [""] * len(requests)
        for name, numbers in groups.items():
            new = model.generate(
                [model.encode_prompt(requests[number].args[0]) for number in numbers],
                **_generation_options(json.loads(name)),
                template=self._template,
            )
            for number, text in zip(numbers, new, strict=True):
                texts[number] = text
        return texts

    @property
    def tokenizer_name(self) -> str:
        """Part of the name of lm-eval's own cache of requests, which is not used."""
        return "llmjax"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a dialogue, up to the assistant's turn, or to the end of the text with which a task begins it."""
        assert self._template is not None
        try:
            text = self._template.render(chat_history, add_generation_prompt=add_generation_prompt)
        except RefusedDialogueError:  # as lm-eval does: some templates refuse a system message
            rest = [message for message in chat_history if message["role"] != "system"]
            text = self._template.render(rest, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        begun = chat_history[-1]["content"].strip()
        return text[: text.rindex(begun) + len(begun)]

    def _require_model(self) -> LanguageModel:
        assert self.model is not None
        return self.model


def _read_fields(path: pathlib.Path) -> dict[str, Any]:
    """The fields of a YAML file and those that it includes, with functions as their names."""
    import yaml

    try:
        return load_yaml(path.resolve(), resolve_func=False)
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a YAML file with the fields of a task ({' '.join(str(error).split())})") from None


def _check_fields(path: pathlib.Path, fields: dict[str, Any]) -> None:
    """Raise UserError for the fields that lm-eval would report by a traceback, or that no model here can serve."""
    if "group" in fields or isinstance(fields.get("task"), list):
        raise UserError(f"{path}: a group of tasks; give the files of its tasks")
    if not isinstance(fields.get("task"), str):
        raise UserError(f"{path}: has no name in the field `task`; add one, such as `task: my_task`")
    known = [field.name for field in dataclasses.fields(TaskConfig)]
    for field in fields.keys() - {*known, "class", "group", "tag", "task_list", "include"}:
        raise UserError(f"{path}: unknown field {field!r}{suggest(str(field), known)}")
    kind = fields.get("output_type", ALL_OUTPUT_TYPES[0])
    if kind not in ALL_OUTPUT_TYPES:
        raise UserError(
            f"{path}: output_type={kind!r}{suggest(str(kind), ALL_OUTPUT_TYPES)}: choose one of "
            f"{', '.join(ALL_OUTPUT_TYPES)}"
        )
    if not fields.get("process_results"):
        _check_metrics(path, fields.get("metric_list") or [])
    for field in _MULTIMODAL:
        if fields.get(field):
            raise UserError(f"{path}: {field} needs a model of images or sounds; give tasks of text")
    if fields.get("unsafe_code"):
        raise UserError(f"{path}: unsafe_code runs programs that the model writes, which is not supported")


def _check_metrics(path: pathlib.Path, metrics: list[Any]) -> None:
    """Raise UserError for a metric that lm-eval would look for on a hub."""
    known = sorted(metric_registry)
    for entry in metrics:
        name = entry.get("metric") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise UserError(f"{path}: metric_list: {entry!r} has no metric; give entries such as `- metric: acc`")
        is_function = pathlib.Path(name).is_absolute()  # `!function module.name`, as it is read without its module
        if entry.get("hf_evaluate") or (name not in known and not is_function):
            raise UserError(
                f"{path}: metric_list: unknown metric {name!r}{suggest(name, known)}; choose one of "
                f"{', '.join(known)}, or a function of your own (`!function module.name`)"
            )


def _build_requests(file: TaskFile, adapter: Adapter, options: Options) -> None:
    """Build the requests of a task, as lm-eval does when it evaluates the task."""
    file.task.set_fewshot_seed(_FEWSHOT_SEED)
    try:
        file.task.build_all_requests(
            limit=options.limit,
            apply_chat_template=options.chat,
            fewshot_as_multiturn=options.chat,
            chat_template=adapter.apply_chat_template if options.chat else None,
        )
    except (jinja2.TemplateError, ValueError) as error:
        raise UserError(f"{file.path}: lm-eval cannot build its requests: {type(error).__name__}: {error}") from error


def _evaluate(file: TaskFile, adapter: Adapter, options: Options) -> list[dict[str, Any]]:
    """What lm-eval logs of each example and filter."""
    file.task.set_fewshot_seed(_FEWSHOT_SEED)
    name = file.task.task_name
    try:
        evaluated: Any = evaluator.evaluate(
            lm=adapter,
            task_dict={"tasks": {name: file.task}},
            limit=options.limit,
            bootstrap_iters=0,
            apply_chat_template=options.chat,
            fewshot_as_multiturn=options.chat,
        )
    except OverflowError as error:
        raise UserError(
            f"{file.path}: a metric is too large for a float ({error}); leave word_perplexity out of metric_list for a "
            "model as bad as this, or for texts of long words"
        ) from error
    return evaluated["samples"][name]


def _hash_requests(task: Task) -> str:
    digest = hashlib.sha256()
    for request in task.instances:
        digest.update(json.dumps([request.args, request.doc, request.doc_id], default=str).encode())
    return digest.hexdigest()


def _generation_options(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `LanguageModel.generate` for `generation_kwargs`. Raises UserError for options without one."""
    options = dict(normalize_gen_kwargs(options, _MAX_NEW_TOKENS))
    is_sampled = options.pop("do_sample", False)
    arguments = {
        "max_tokens": options.pop("max_gen_toks"),
        "temperature": options.pop("temperature", 1.0 if is_sampled else 0.0),
        "stop": [text for text in options.pop("until", []) if text],
    }
    if is_sampled and options:  # the most likely token needs none of them
        raise UserError(
            f"generation_kwargs: {', '.join(sorted(options))} is not supported; only until, max_gen_toks, do_sample "
            "and temperature are"
        )
    return arguments


def _estimate(samples: list[dict[str, Any]], aggregations: Mapping[str, Callable]) -> dict[str, Estimate]:
    """Metrics by name, those of a task with several filters as `metric,filter`."""
    by_name: dict[str, list[Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            by_name.setdefault(_name(metric, sample["filter"]), []).append(sample[metric])
    metrics = {}
    for name, values in by_name.items():
        metric = name.partition(",")[0]
        aggregate = aggregations.get(metric, mean)
        if aggregate is mean:
            metrics |= results.estimate_means({name: values})
            continue
        statistic = functools.partial(_aggregate, name, values, aggregate)
        draws = _SLOW_DRAWS if metric in _SLOW_AGGREGATIONS else results.DRAWS
        metrics |= results.estimate(statistic, len(values), draws=draws)
    return metrics


def _aggregate(name: str, values: list[Any], aggregate: Callable, at: np.ndarray) -> dict[str, float]:
    try:
        return {name: float(aggregate([values[index] for index in at]))}
    except OverflowError:  # a perplexity
        return {name: math.inf}


def _name(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def _list_examples(samples: list[dict[str, Any]], output_type: str | None) -> Iterator[dict[str, Any]]:
    """One object an example, with the answers of the first filter and the metrics of all of them."""
    by_index: dict[int, list[dict[str, Any]]] = {}
    for sample in samples:
        by_index.setdefault(sample["doc_id"], []).append(sample)
    for index, (first, *rest) in by_index.items():
        metrics = {_name(m, sample["filter"]): sample[m] for sample in (first, *rest) for m in sample["metrics"]}
        example = {"index": index, "document": first["doc"]}
        answers, requests = first["filtered_resps"], first["arguments"]
        if output_type == "generate_until":
            example |= {"prompt": requests[0][0], "prediction": answers[0], "generated": first["resps"][0]}
        elif output_type == "loglikelihood_rolling":
            example |= {"loglikelihood": answers[0]}
        else:
            example |= {
                "prompt": requests[0][0],
                "continuations": [request[1] for request in requests],
                "loglikelihoods": [score for score, _ in answers],
                "greedy": [is_greedy for _, is_greedy in answers],
            }
        if output_type == "multiple_choice":
            example["prediction"] = int(np.argmax(example["loglikelihoods"]))
        yield {**example, "target": first["target"], "metrics": metrics}
