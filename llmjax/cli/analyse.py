"""`llmjax analyse`: what a run gets wrong on a task, and what to do about it."""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import json
import logging
import os
import typing

from llmjax.cli.flags import int_range, make_parser, parse, parse_workdir
from llmjax.errors import UserError

if typing.TYPE_CHECKING:
    from etils import epath
    import numpy as np

    from llmjax.analysis.result import Analysis
    from llmjax.analysis.task_examples import TaskExamples
    from llmjax.analysis.train_texts import TrainTexts
    from llmjax.run.loading import Loaded

logger = logging.getLogger(__name__)

_TFIDF = "tfidf"


def analyse(arguments: list[str]) -> int:
    """Analyse errors."""
    parser = make_parser(
        "analyse",
        """\
        Analyse what a run gets wrong on a task that `llmjax eval --tasks` scored. Writes WORKDIR/analysis.html and
        WORKDIR/analysis.json: a ranked list of what to do next, the worst examples with the loss of each token or the
        probability of each class, confusions, slices (length, class, fields of the records, rare words) on which the
        model fails, likely label errors by confident learning, tests whether the task's texts differ from the training
        texts, near-duplicates between both, and a learning curve with what more data would bring.

        Training texts are those of the run's token store. Vectors for label errors and the learning curve are the
        pooled states of the run if it is an encoder, else TF-IDF. Needs the extra `analysis`.""",
        "llmjax analyse --workdir=runs/sentiment --task=reviews --fix",
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a run")
    parser.add_argument("--task", required=True, metavar="NAME", help="a task that was scored")
    parser.add_argument("--step", type=int_range(0), help="the results to read (default: the newest of the task)")
    parser.add_argument("--train", metavar="FILE", help="training texts, a file with the fields of the task's file")
    parser.add_argument(
        "--vectors",
        metavar="RUN",
        help=f"the run whose states are the vectors of texts, or {_TFIDF}, which loads no model",
    )
    parser.add_argument(
        "--fix",
        metavar="FILE",
        nargs="?",
        const="",
        help="also write the task's records with suggested labels to a new JSON lines file "
        "(default WORKDIR/NAME.suggested.jsonl)",
    )
    flags, overrides = parse(parser, arguments)
    workdir = parse_workdir(flags.workdir)
    from llmjax.analysis import task_examples, vectors

    vectors.require_sklearn()
    scored = task_examples.read(workdir, flags.task, flags.step)
    fix = _check_fix(workdir, flags.fix, scored) if flags.fix is not None else None
    analysis, train = _analyse(workdir, flags, overrides, scored)
    _write(workdir, scored, analysis, train, fix)
    return 0


def _analyse(
    workdir: "epath.Path", flags: argparse.Namespace, overrides: Sequence[tuple[str, str]], scored: "TaskExamples"
) -> "tuple[Analysis, TrainTexts | str]":
    from llmjax.analysis import analyse as analysis, token_losses, train_texts
    from llmjax.run import loading

    config = loading.read_config(workdir, overrides)
    train = (
        train_texts.read_file(flags.train, scored) if flags.train else train_texts.read_store(workdir, config, scored)
    )
    losses = None
    other = None if flags.vectors in (None, _TFIDF) else parse_workdir(flags.vectors)
    has_losses = flags.vectors != _TFIDF and _has_token_losses(config, scored)
    is_own = flags.vectors is None and bool(scored.classes) and config.model.family == "encoder"
    if has_losses or is_own or other is not None:
        loading.initialize(workdir, overrides)
    if has_losses:
        from llmjax.evals.requests import LanguageModel

        with loading.load(workdir, step=scored.step, overrides=overrides) as loaded:
            worst = analysis.find_worst(scored)
            logger.info("token losses of the %d worst examples", len(worst))
            losses = token_losses.compute_token_losses(LanguageModel(loaded), scored, worst)
    with contextlib.ExitStack() as stack:
        embed, name = None, ""
        if other is not None:
            loaded = stack.enter_context(loading.load(other))
            embed, name = _make_embed(other, loaded), f"the states of {other}"
        elif is_own:
            loaded = stack.enter_context(loading.load(workdir, step=scored.step, overrides=overrides))
            embed, name = _make_embed(workdir, loaded), "the run's own states"
        result = analysis.analyse(
            scored, train, embed=embed, vectors_name=name, is_trained=other is None, token_losses=losses
        )
    return result, train


def _make_embed(workdir: "epath.Path", loaded: "Loaded") -> "typing.Callable[[Sequence[str]], np.ndarray]":
    """The function that computes vectors of texts, each text once."""
    import numpy as np

    from llmjax.inference import embed

    settings = embed.choose(workdir, loaded.config.objective)
    known: dict[str, np.ndarray] = {}

    def compute(texts: Sequence[str]) -> np.ndarray:
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            logger.info("  vectors of %d texts", len(new))
            known.update(zip(new, embed.embed(loaded, new, settings)[0], strict=True))
        return np.stack([known[text] for text in texts]).astype(np.float64)

    return compute


def _has_token_losses(config: typing.Any, scored: "TaskExamples") -> bool:
    from llmjax.data.config import EMBEDDING, LABELLED

    is_text = config.objective.name not in (*LABELLED, *EMBEDDING, "reward")
    return is_text and config.model.generates and not config.model.reads_source and scored.task.kind != "regress"


def _check_fix(workdir: "epath.Path", text: str, scored: "TaskExamples") -> "epath.Path":
    from etils import epath

    path = epath.Path(os.path.expanduser(text)) if text else workdir / f"{scored.name}.suggested.jsonl"
    if not scored.classes:
        raise UserError(
            f"--fix={path}: kind={scored.task.kind!r} has no classes, so no label is suggested; leave it out"
        )
    if path.suffix != ".jsonl":
        raise UserError(f"--fix={path}: give a new file whose name ends in .jsonl")
    if path.exists():
        raise UserError(f"--fix={path}: already exists; give a new file")
    if not path.parent.is_dir():
        raise UserError(f"--fix={path}: there is no folder {path.parent}; create it")
    return path


def _write(
    workdir: "epath.Path",
    scored: "TaskExamples",
    analysis: "Analysis",
    train: "TrainTexts | str",
    fix: "epath.Path | None",
) -> None:
    from llmjax import atomic
    from llmjax.analysis import analyse as parts
    from llmjax.report import analysis_page
    from llmjax.run import next_commands, workdir as workdirs

    page = workdir / workdirs.ANALYSIS_PAGE
    workdirs.write_json(workdir / workdirs.ANALYSIS, parts.to_json(analysis))
    analysis_page.write_page(analysis, scored, page, train_texts=() if isinstance(train, str) else train.texts)
    for line in _describe(analysis):
        logger.info("%s", line)
    if fix is not None:
        records = parts.list_suggestions(scored, analysis)
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        atomic.write_bytes(fix, text.encode(errors="backslashreplace"))
        field = scored.task.label_field
        logger.info(
            "suggested labels: %s; where suggested_label is right, copy it to %s, and train on the file", fix, field
        )
    logger.info("analysis: %s, and %s", page, workdirs.ANALYSIS)
    if fix is None and analysis.label_errors:
        logger.info("next: %s", next_commands.suggest_labels(workdir, analysis.task))
    else:
        logger.info("next: open %s in a browser", page)


def _describe(analysis: "Analysis") -> Iterator[str]:
    yield f"{analysis.task}: {analysis.count:,} examples of step {analysis.step}; what to do next:"
    for number, step in enumerate(analysis.next_steps, 1):
        yield f"  {number}. {step.text} {step.reason}"
