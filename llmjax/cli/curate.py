"""`llmjax curate`: from raw text to a corpus, and its data card."""

import contextlib
import glob
import json
import logging
import math
import os
import pathlib
import shlex
from typing import Any

from llmjax.binding import bind_overridden, load_file
from llmjax.cli.flags import CONFIG, Parser, make_parser, parse, parse_workdir
from llmjax.errors import UserError

logger = logging.getLogger(__name__)

_EXAMPLE = "llmjax curate --config=curate --workdir=runs/web --config.curate.inputs.web.path='crawl/*.warc.gz'"


def curate(arguments: list[str]) -> int:
    """Raw text to a corpus."""
    if arguments[:1] == ["report"]:
        return _report(arguments[1:])
    if arguments[:1] == ["classifier"]:
        return _classifier(arguments[1:])
    parser = _make_parser()
    flags, overrides = parse(parser, arguments)
    from llmjax.curate import packages

    packages.check_installed()
    from llmjax.curate.engine import curate as curating, runners
    from llmjax.data.store import workers
    from llmjax.run import workdir as workdirs

    workdir = _workdir(parser, flags.workdir)
    tree = _read_tree(flags, workdir / "config.json")
    config = _bind(tree, overrides).curate
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--workdir={flags.workdir}: cannot be created ({error.strerror}); give another folder"
        ) from None
    with contextlib.ExitStack() as stack:
        stack.enter_context(workdirs.Lock(workdir, primary=True))
        if flags.runner == "ray":
            runner = stack.enter_context(runners.RayRunner(flags.ray_address))
        else:
            runner = stack.enter_context(runners.LocalRunner(config.workers or workers.count_cores()))
        report = curating.curate(config, workdir, runner)
    return _write_report(workdir, report, flags.workdir)


def _make_parser() -> Parser:
    parser = make_parser(
        "curate",
        """\
        Read raw text of any kind, repair it, filter it, remove duplicates, evaluation data and personal data, and split
        it. Kept documents are written to WORKDIR/curated, dropped ones to WORKDIR/dropped with the stage and the
        reason, and the data card to WORKDIR/report.html. Rerun the same command to resume; after a change of thresholds
        alone, nothing is measured again.

        llmjax curate report --workdir=DIR prints the card of a finished corpus and writes report.html again.
        llmjax curate classifier --good=A --bad=B --to=FILE.npz trains a quality classifier on two folders.""",
        _EXAMPLE,
    )
    parser.add_argument("--config", metavar="NAME", help=f"{CONFIG.split(';')[0]}; not needed with --resume")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of the corpus")
    parser.add_argument("--resume", action="store_true", help="use the config in the workdir")
    parser.add_argument(
        "--runner", choices=("local", "ray"), default="local", help="processes of this machine (default), or Ray"
    )
    parser.add_argument(
        "--ray_address",
        default="auto",
        metavar="HOST:PORT",
        help="of the cluster (default auto: the one this machine is in)",
    )
    return parser


def _report(arguments: list[str]) -> int:
    parser = make_parser(
        "curate report",
        "Print the data card of a curated corpus, and write report.html.",
        "llmjax curate report --workdir=runs/web",
        overrides=False,
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a workdir of llmjax curate")
    flags = parser.parse_args(arguments)

    workdir = _workdir(parser, flags.workdir)
    path = workdir / "report.json"
    if not path.is_file():
        raise UserError(f"--workdir={flags.workdir}: no report.json there, so no corpus; run `llmjax curate` first")
    try:
        return _write_report(workdir, json.loads(path.read_text()), flags.workdir)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a report of this version of llmjax; run `llmjax curate` again") from None


def _classifier(arguments: list[str]) -> int:
    parser = make_parser(
        "curate classifier",
        """\
        Train a linear classifier of good and bad text on words, pairs of words and pieces of four bytes, for
        --config.curate.quality.classifier. A fifth of the texts, drawn by their content, evaluates it.""",
        "llmjax curate classifier --good=/my/good --bad=/my/bad --to=quality.npz",
        overrides=False,
    )
    parser.add_argument("--good", required=True, metavar="DIR", help="folder, file or glob of texts, JSONL, Parquet")
    parser.add_argument("--bad", required=True, metavar="DIR", help="the same, for texts to drop")
    parser.add_argument("--to", required=True, metavar="FILE", help="file of the model, ending in .npz")
    flags = parser.parse_args(arguments)
    from llmjax.curate import packages

    packages.check_installed()
    from llmjax.curate.filters import classifier

    if not flags.to.endswith(".npz"):
        raise UserError(f"--to={flags.to}: must end in .npz")
    for name, path in (("good", flags.good), ("bad", flags.bad)):
        files = glob.iglob(os.path.join(path, "**") if os.path.isdir(path) else path, recursive=True)
        if not any(map(os.path.isfile, files)):
            raise UserError(f"--{name}={path}: no file there; give a folder, a file or a quoted glob of texts")
    model, evaluation = classifier.train_folders(flags.good, flags.bad)
    model.save(flags.to)
    if math.isnan(evaluation.auc):
        logger.info(f"held out {evaluation.num_texts} texts: too few of each class to evaluate the model")
    else:
        accuracy = f"{evaluation.accuracy:.1%} correct (the mean of both classes)"
        logger.info(f"held out {evaluation.num_texts} texts: {accuracy};")
        logger.info(f"a good one scores above a bad one with probability {evaluation.auc:.3f}")
    logger.info(f"\nmodel: {flags.to}, trained on all texts")
    logger.info(
        f"next: run `llmjax curate` with --config.curate.quality.classifier={shlex.quote(flags.to)}, which scores "
        "every text, and with --config.curate.quality.min_classifier_score=0.5, which drops the texts below that score"
    )
    return 0


def _write_report(workdir: pathlib.Path, report: dict[str, Any], flag: str) -> int:
    """Log the data card and write report.html. `flag` is the workdir as the user wrote it."""
    from llmjax.report import data_card

    lines, page = list(data_card.format_summary(report)), data_card.render_page(report)
    for line in lines:
        logger.info(line)
    (workdir / "report.html").write_text(page)
    logger.info(f"\nreport: {flag.rstrip('/')}/report.html")
    if not report["kept"]["documents"]:
        return 0
    pattern = shlex.quote(f"{glob.escape(flag.rstrip('/'))}/curated/*.jsonl.zst")
    logger.info(
        "next: llmjax prepare --config=quickstart --workdir=runs/mine "
        f"--config.data.sources.main.path={pattern}"
        + (" --config.data.sources.main.split_field=split" if report["splits"] else "")
    )
    return 0


def _read_tree(flags: Any, path: pathlib.Path) -> dict[str, Any]:
    from llmjax.run import workdir as workdirs

    saved = workdirs.read_json(path) if path.is_file() else None
    if saved is not None and "curate" not in saved:
        raise UserError(f"--workdir={flags.workdir}: contains a training run, not a corpus; give another folder")
    if flags.config is not None:
        tree = load_file(flags.config)
        if "curate" not in tree:
            raise UserError(f"--config={flags.config}: has no section `curate`; give a config such as --config=curate")
        return tree
    if not flags.resume:
        raise UserError("--config is missing: give a Python file with get_config(), or a name, such as --config=curate")
    if saved is None:
        raise UserError(f"--workdir={flags.workdir} --resume: there is no config file; give --config")
    return saved


def _bind(tree: dict[str, Any], overrides: list[tuple[str, str]]) -> Any:
    from llmjax.curate.config import Curation

    return bind_overridden(Curation, tree, overrides, inputs="curate.inputs")


def _workdir(parser: Parser, text: str) -> pathlib.Path:
    """A local or shared folder: parts of it are memory-mapped."""
    if "://" in text:
        raise UserError(f"--workdir={text}: {parser.prog} maps files into memory; give a local or shared folder")
    return pathlib.Path(parse_workdir(text)).absolute()  # a process of a cluster may run in another folder
