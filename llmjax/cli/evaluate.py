"""`llmjax eval`: score a checkpoint on a split, or on tasks."""

import argparse
from collections.abc import Sequence
import functools
import logging
import os
import pathlib
import typing

from llmjax.cli.flags import int_range, make_parser, parse, parse_workdir
from llmjax.errors import UserError

if typing.TYPE_CHECKING:
    from etils import epath

    from llmjax.evals.lm_eval_tasks import TaskFile

logger = logging.getLogger(__name__)

_SPLITS = ("train", "validation", "test")


def evaluate(arguments: list[str]) -> int:
    """Score a checkpoint."""
    parser = make_parser(
        "eval",
        """\
        Score a checkpoint on a split: loss, perplexity and accuracy over every document, by source. For the objective
        causal also bits per byte of the original text, for others the accuracy of a majority-class baseline. Writes
        WORKDIR/eval/<step>/<split>.json. The scores do not depend on the mesh.

        With --tasks, score it on tasks instead. A name is that of a section eval.tasks.NAME of the config, which makes
        a task of a file of your own (JSONL, CSV, TSV, Parquet): multiple choice, generation, classification,
        regression, semantic similarity, factual consistency, minimal pairs, perplexity, or memorisation of the training
        documents. A path is that of a YAML file of lm-eval
        (multiple_choice, loglikelihood, loglikelihood_rolling, generate_until), which needs the extra `eval`. Writes
        every metric with a bootstrap 95% interval to WORKDIR/eval/<step>/<task>.json, and one line for each example to
        <task>.jsonl. A task that was scored before, with the same checkpoint and options, is not computed again.""",
        "llmjax eval --workdir=runs/mine --split=test\n  llmjax eval --workdir=runs/mine --tasks=task.yaml --shots=3",
        job=True,
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a run")
    parser.add_argument("--step", type=int_range(0), help="the checkpoint (default: the newest)")
    parser.add_argument("--split", choices=_SPLITS, help="documents to score (default validation)")
    parser.add_argument("--tasks", type=_parse_tasks, metavar="TASK,...", help="names of tasks, YAML files of lm-eval")
    parser.add_argument("--limit", type=int_range(1), metavar="N", help="examples of each task at most (default: all)")
    parser.add_argument(
        "--shots", type=int_range(0), metavar="K", help="solved examples in each prompt (default: task's)"
    )
    parser.add_argument("--batch", type=int_range(1), metavar="N", help="rows at a time (default train.global_batch)")
    parser.add_argument("--chat", action="store_true", help="write prompts by the model's chat template")
    flags, overrides = parse(parser, arguments)
    if flags.tasks is not None and flags.split is not None:
        raise UserError("--split scores documents, and --tasks tasks: set only one of them")
    for name in ("limit", "shots", "batch", "chat"):
        if flags.tasks is None and getattr(flags, name):
            raise UserError(f"--{name} is an option of tasks: give --tasks as well")
    from llmjax.run import loading

    workdir = parse_workdir(flags.workdir)
    loading.initialize(workdir, overrides)
    if flags.tasks is not None:
        return _evaluate_tasks(workdir, flags, overrides)
    from llmjax import report
    from llmjax.evals import harness
    from llmjax.parallel import hosts
    from llmjax.run import next_commands

    with loading.load(workdir, step=flags.step, overrides=overrides) as loaded:
        path = harness.evaluate(workdir, loaded, flags.split or "validation")
    if hosts.is_primary():
        logger.info("written to %s\nreport: %s", path, report.write_report(workdir))
    logger.info("next: %s", next_commands.use_step(workdir, loaded.step, loaded.config.objective.name))
    return 0


def _evaluate_tasks(workdir: "epath.Path", flags: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    from llmjax import report
    from llmjax.evals import results
    from llmjax.evals.requests import LanguageModel
    from llmjax.evals.tasks import run
    from llmjax.parallel import hosts
    from llmjax.run import loading, next_commands, workdir as workdirs

    options = results.Options(limit=flags.limit, shots=flags.shots, batch=flags.batch, chat=flags.chat)
    # Bad tasks are found before a checkpoint is read.
    names = [name for name in flags.tasks if not _is_path(name)]
    tasks = run.select_tasks(loading.read_config(workdir, overrides), names, options)
    files = _load_files([name for name in flags.tasks if _is_path(name)], options.shots)
    with loading.load(workdir, step=flags.step, overrides=overrides) as loaded:
        template = loading.load_chat_template(workdir, loaded) if options.chat else None
        make_model = functools.cache(lambda: LanguageModel(loaded, options.batch))
        logger.info("step %d (%s), %d task(s)", loaded.step, loaded.params_name, len(flags.tasks))
        for name in flags.tasks:
            if name in tasks:
                record = run.evaluate(workdir, loaded, name, tasks[name], make_model=make_model)
            else:
                from llmjax.evals import lm_eval_tasks

                record = lm_eval_tasks.evaluate(
                    workdir, loaded, files[name], options, make_model=make_model, template=template
                )
            path = workdirs.eval_path(workdir, loaded.step, record["task"])
            logger.info("%s", "\n".join([*results.describe(record), f"  {path}, examples in {path.stem}.jsonl"]))
    if hosts.is_primary():
        logger.info("report: %s", report.write_report(workdir))
    logger.info("next: %s", next_commands.use_step(workdir, loaded.step, loaded.config.objective.name))
    return 0


def _load_files(paths: list[str], shots: int | None) -> dict[str, "TaskFile"]:
    """The tasks of YAML files by their paths; without any, lm-eval need not be installed."""
    if not paths:
        return {}
    from llmjax.evals import lm_eval_tasks

    return {path: lm_eval_tasks.load_task(pathlib.Path(os.path.expanduser(path)), shots) for path in paths}


def _parse_tasks(text: str) -> list[str]:
    names = text.split(",")
    if "" in names:
        raise argparse.ArgumentTypeError("expected names with commas between them")
    if double := next((name for name in names if names.count(name) > 1), None):
        raise argparse.ArgumentTypeError(f"{double} is given twice")
    return names


def _is_path(name: str) -> bool:
    """Whether a task is a YAML file of lm-eval."""
    return name.endswith((".yaml", ".yml"))
