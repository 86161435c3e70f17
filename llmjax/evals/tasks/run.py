"""Score a checkpoint on a task of the user's own: read the examples, score them, and write the results."""

from collections.abc import Callable, Sequence
import dataclasses
import hashlib
import logging
from pathlib import Path
from typing import Any

from etils import epath

from llmjax import atomic
from llmjax.data.chat_template import ChatTemplate
from llmjax.data.config import EMBEDDING, LABELLED
from llmjax.data.readers import formats
from llmjax.data.readers.sources import make_units
from llmjax.data.store.tokenizer import Tokenizer
from llmjax.errors import UserError, suggest
from llmjax.evals import results
from llmjax.evals.config import TaskConfig, check_metric, check_tasks
from llmjax.evals.requests import LanguageModel
from llmjax.evals.tasks import (
    choice,
    classify,
    consistency,
    generate,
    memorisation,
    multi_label,
    pairs,
    perplexity,
    regress,
    similarity,
    truthful,
)
from llmjax.evals.tasks.examples import Example, read_examples
from llmjax.evals.tasks.outcome import Groups, Outcome
from llmjax.inference import embed
from llmjax.parallel import hosts
from llmjax.run import workdir as workdirs
from llmjax.run.config import RunConfig
from llmjax.run.loading import Loaded, require_chat_template

logger = logging.getLogger(__name__)

_NO_TEXT = (*LABELLED, *EMBEDDING, "reward")  # objectives whose models give no likelihood of text
_HEADS = {"classify": classify.run_head, "regress": regress.run}  # of runs whose objective has this name
_LIKELIHOODS = {
    "choice": choice.run,
    "classify": classify.run_likelihoods,
    "consistency": consistency.run,
    "generate": generate.run,
    "pairs": pairs.run,
    "perplexity": perplexity.run,
    "stereotypes": pairs.run_stereotypes,
    "truthful": truthful.run,
}


def select_tasks(config: RunConfig, names: Sequence[str], options: results.Options) -> dict[str, TaskConfig]:
    """The tasks of these names, with `limit`, `shots` and `chat` of the options where these are set.

    Raises UserError for an unknown name, and for a task that the run cannot have.
    """
    selected = {}
    for name in names:
        if name not in config.eval.tasks:
            listed = ", ".join(config.eval.tasks) or "none"
            raise UserError(
                f"task {name!r}{suggest(name, config.eval.tasks)}: the config has no such task (it has: {listed}); "
                f"set eval.tasks.{name}.kind and eval.tasks.{name}.path, see `llmjax fields eval.tasks.NAME`"
            )
        changes = {"limit": options.limit, "shots": options.shots, "chat": options.chat or None}
        task = dataclasses.replace(config.eval.tasks[name], **{k: v for k, v in changes.items() if v is not None})
        check_tasks({name: task})
        _check_run(f"eval.tasks.{name}", task, config)
        selected[name] = task
    return selected


def _check_run(where: str, task: TaskConfig, config: RunConfig) -> None:
    """Raise UserError for a task that a model of this run cannot do."""
    if task.embedder and not (epath.Path(task.embedder) / workdirs.CONFIG).exists():
        raise UserError(f"{where}.embedder={task.embedder!r}: has no {workdirs.CONFIG}; give the workdir of a run")
    if task.kind == "similarity":
        return  # every model has hidden states
    objective = config.objective.name
    if objective in _NO_TEXT and task.kind != objective:
        hint = f"; use kind={objective!r}, or another run" if objective in LABELLED else "; use another run"
        raise UserError(
            f"{where}.kind={task.kind!r}: a run with objective.name={objective!r} gives no likelihood of text{hint}"
        )
    if task.kind == "regress" and objective != "regress":
        raise UserError(
            f"{where}.kind='regress': needs a run with objective.name='regress', and this one has {objective!r}"
        )
    model = config.model
    if objective in LABELLED:
        _check_head(where, task, config)
    elif model.reads_source and task.chat:
        raise UserError(
            f"{where}.chat=True: model.family={model.family!r} reads prompts without a chat template; unset it"
        )
    elif model.reads_source and task.kind == "memorisation":
        raise UserError(
            f"{where}.kind='memorisation': the decoder of model.family={model.family!r} does not continue documents; "
            "use another run"
        )
    elif not model.generates:
        raise UserError(
            f"{where}.kind={task.kind!r}: model.family={model.family!r} gives no likelihood of text; use another run"
        )
    elif task.kind == "classify" and not task.choices:
        raise UserError(
            f"{where}.choices is not set: the run has no head for classes, so name them as they may follow the prompt"
        )


def _check_head(where: str, task: TaskConfig, config: RunConfig) -> None:
    """Raise UserError for options that a head for labels does not use, and for texts that it was not trained on."""
    data = config.data
    for field in ("prompt", "shots", "chat", "choices"):
        if value := getattr(task, field):
            raise UserError(
                f"{where}.{field}={value!r}: the run has a head for labels, which reads texts as in training; unset it"
            )
    if task.labels and len(task.labels) != len(data.classes):
        raise UserError(f"{where}.labels={task.labels}: give one for each of data.classes ({', '.join(data.classes)})")
    trained_on_pairs = {bool(source.pair_field) for source in data.sources.values()}
    if trained_on_pairs and bool(task.pair_field) not in trained_on_pairs:
        raise UserError(
            f"{where}.pair_field={task.pair_field!r}: the model was trained on "
            f"{'single texts: unset it' if task.pair_field else 'pairs: name the field of the second text'}"
        )


class TaskScorer:
    """Scores the parameters of a run in training on the tasks of eval.during_training; compiles once.

    Raises UserError for a task that the config does not have, or the run cannot, and for an unknown eval.metric of one.
    """

    def __init__(self, config: RunConfig):
        self.tasks = select_tasks(config, config.eval.during_training, results.Options())
        if "/" in config.eval.metric:
            check_metric(config.eval.metric, self.tasks, multi_label=config.data.multi_label)
        self._model: LanguageModel | None = None

    def check_files(self) -> None:
        """Raise UserError for a file of a task that cannot be read."""
        for name, task in self.tasks.items():
            if not task.reads_store:
                read_examples(name, task)

    def check_template(self, workdir: epath.Path, store: Path, tokenizer: Tokenizer) -> None:
        """Raise UserError where a task needs the chat template of a run that has none."""
        if any(task.chat for task in self.tasks.values()):
            require_chat_template(workdir, store, tokenizer)

    def score(self, workdir: epath.Path, loaded: Loaded, name: str) -> dict[str, float]:
        """TASK/METRIC -> value of one task, without those that are undefined; writes its files, as `evaluate` does."""

        def make_model() -> LanguageModel:
            if self._model is None:
                self._model = LanguageModel(loaded)
            self._model.use(loaded)
            return self._model

        record = evaluate(workdir, loaded, name, self.tasks[name], make_model=make_model)
        values = {metric: number["value"] for metric, number in record["metrics"].items()}
        main = results.Estimate(**record["metrics"][record["main"]])
        logger.info("  %s: %s %s", name, record["main"], main)
        return {f"{name}/{metric}": value for metric, value in values.items() if value is not None}


def evaluate(
    workdir: epath.Path, loaded: Loaded, name: str, task: TaskConfig, *, make_model: Callable[[], LanguageModel]
) -> dict[str, Any]:
    """Score a checkpoint on a task, and return the content of its file. Runs on the mesh of `use_mesh`.

    Results that an earlier call wrote for the same checkpoint, task and files are returned instead.
    make_model   called where the task needs the likelihood of text
    A collective: all processes call it, and process 0 writes.
    """
    settings = dataclasses.asdict(task)
    # The files of an imported folder say how vectors are made of texts.
    embedding = embed.choose(workdir, loaded.config.objective) if task.kind == "similarity" else None
    if embedding:
        settings["embedding"] = dataclasses.asdict(embedding)
    if task.reads_store:
        files = [memorisation.fingerprint_store(loaded, f"eval.tasks.{name}")]
    else:
        files = _hash_files(name, task)
    if task.embedder:
        files.append(similarity.fingerprint_embedder(epath.Path(task.embedder)))
    template = require_chat_template(workdir, loaded.store, loaded.tokenizer) if task.chat else None
    key = results.make_key(loaded, {"config": settings, "files": files, "template": template and template.source})
    if (record := results.read_cached(workdir, loaded.step, name, key)) is not None:
        logger.info("%s: scored before, with the same checkpoint, options and files", name)
        return record
    if task.reads_store:
        outcome = memorisation.run(task, loaded, make_model(), f"eval.tasks.{name}")
    else:
        outcome = _score(task, loaded, read_examples(name, task), embedding, make_model, template)
    if outcome.num_cut:
        logger.info(
            "  %s: %d texts were cut to fit into data.seq_len=%d", name, outcome.num_cut, loaded.config.data.seq_len
        )
    if outcome.plot and hosts.is_primary():
        path = workdirs.eval_path(workdir, loaded.step, name).with_suffix(".svg")
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(path, outcome.plot.encode())
    result = results.TaskResult(
        task=name,
        metrics=results.estimate(outcome.score, len(outcome.lines)),
        examples=outcome.lines,
        settings=settings,
        details={"main": outcome.main, "num_cut": outcome.num_cut, **outcome.details},
    )
    results.write(workdir, loaded, result, key)
    return results.make_record(loaded, result, key)


def _score(
    task: TaskConfig,
    loaded: Loaded,
    examples: list[Example],
    embedding: embed.Embedding | None,
    make_model: Callable[[], LanguageModel],
    template: ChatTemplate | None,
) -> Outcome:
    field = task.group_field
    groups = Groups([example.text("group_field", field) for example in examples[task.shots :]] if field else None)
    if embedding is not None:
        outcome = similarity.run(task, loaded, embedding, examples, groups)
    elif loaded.config.objective.name in LABELLED:
        score_head = multi_label.run if loaded.config.data.multi_label else _HEADS[task.kind]
        outcome = score_head(task, loaded, examples, groups)
    else:
        model = make_model()
        num_cut = model.num_cut
        chat = {"template": template} if task.chat else {}  # other kinds have no turns
        outcome = _LIKELIHOODS[task.kind](task, model, examples, groups, **chat)
        outcome = dataclasses.replace(outcome, num_cut=model.num_cut - num_cut)
    return dataclasses.replace(outcome, details={**outcome.details, "groups": groups.counts()})


def _hash_files(name: str, task: TaskConfig) -> list[str]:
    """The SHA-256 of each file of a task. The processes of a job must see the same files."""
    units = make_units(name, task, f"eval.tasks.{name}", formats.FORMATS)
    if task.path.startswith("tfds:"):
        return [unit.state for unit in units]
    paths = dict.fromkeys(item.path for unit in units for item in unit.items)
    hashes = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths]
    hosts.all_equal(f"eval.tasks.{name}.path={task.path}", " ".join(hashes))
    return hashes
