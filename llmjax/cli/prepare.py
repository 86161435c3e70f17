"""`llmjax prepare`: from text to a token store."""

import itertools
import logging
import shlex

from llmjax.cli.flags import CONFIG, int_range, make_parser, parse, parse_workdir

logger = logging.getLogger(__name__)


def prepare(arguments: list[str]) -> int:
    """Text to token store."""
    parser = make_parser(
        "prepare",
        """\
        Read the text, split it into train, validation and test, train a tokenizer (or read an existing one), and write
        the token store. No model is trained. Finished parts are kept: after an interruption, the same command resumes.
        --preview prints the first samples as the model will see them.""",
        "llmjax prepare --config=quickstart --workdir=runs/a --config.data.sources.main.path='texts/*.txt'",
    )
    parser.add_argument("--config", metavar="NAME[:SIZE]", help=CONFIG)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the run's files go")
    parser.add_argument("--preview", type=int_range(0), default=0, metavar="N", help="print the first N samples")
    flags, overrides = parse(parser, arguments)
    import numpy as np

    from llmjax.data.batches.pipeline import TrainData
    from llmjax.data.objectives import preview
    from llmjax.data.store import prepare as preparing
    from llmjax.data.store.tokenizer import load_tokenizer
    from llmjax.run import config as run_config, loading, workdir as workdirs

    workdir = parse_workdir(flags.workdir)
    config = loading.resolve(flags.config, workdir, overrides)
    loading.log_config_source(flags.config, workdir)
    store = loading.store_folder(config, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with workdirs.Lock(workdir, primary=True):
        preparing.prepare(config.data, store)
        tokenizer = load_tokenizer(store)
        objective = run_config.objective(config, tokenizer)
        data = TrainData(store, config.data, seed=config.seed, global_batch=1, objective=objective)
    rows = f"{config.data.seq_len:,} tokens"
    if objective.target_len != config.data.seq_len:
        rows = f"{config.data.seq_len:,} source and {objective.target_len:,} target tokens"
    for name, source in data.summary().items():
        scored = f", {source['scored']:,} tokens scored" if "scored" in source else ""
        logger.info(f"{name}: packed in {source['rows']:,} rows of {rows}, {source['density']:.2%} full{scored}")
    if flags.preview:
        logger.info("\n%s: %s", config.objective.name, preview.LEGEND)
        remaining = data.remaining(data.start())
        count = flags.preview if remaining is None else min(flags.preview, remaining)
        for batch, _ in itertools.islice(data.batches(data.start(), np.arange), count):
            logger.info("%s", "\n".join(["", *preview.format_batch(batch, objective, tokenizer)]))
        data.close()
    same_flags = [f"--config={flags.config}"] if flags.config else []
    same_flags += [f"--workdir={flags.workdir}", *(f"--config.{field}={value}" for field, value in overrides)]
    logger.info("next: %s", shlex.join(["llmjax", "train", *same_flags]))
    return 0
