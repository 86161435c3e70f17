"""`llmjax embed`: one vector for each text of a file."""

import logging
import pathlib

from llmjax.cli.flags import int_range, make_parser, parse, parse_workdir

logger = logging.getLogger(__name__)


def embed(arguments: list[str]) -> int:
    """Embed texts."""
    parser = make_parser(
        "embed",
        """\
        Write one vector for each text of a JSON lines file, in its order: as a NumPy array float32 [texts, dimensions],
        or as Parquet with the columns text and embedding. Pooling, length and normalization are those of the imported
        folder (modules.json, 1_Pooling and sentence_bert_config.json of sentence-transformers); where it has none,
        pooling is mean. A run of objective.name='contrastive' or 'similarity' has the pooling that was
        trained.""",
        "llmjax embed --workdir=runs/minilm --input=texts.jsonl --output=vectors.npy",
        job=True,
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a run")
    parser.add_argument("--input", required=True, metavar="FILE", help="JSON lines, one object a line")
    parser.add_argument("--output", required=True, metavar="FILE", help="a new file: .npy or .parquet")
    parser.add_argument("--field", default="text", help="the field with the text (default text)")
    parser.add_argument("--pooling", help="mean, first, last or max, in place of the imported folder's")
    parser.add_argument("--max_tokens", type=int_range(1), help="cut longer texts, in place of the imported folder's")
    parser.add_argument("--step", type=int_range(0), help="the checkpoint (default: the newest)")
    flags, overrides = parse(parser, arguments)
    from llmjax.run import loading

    workdir = parse_workdir(flags.workdir)
    loading.initialize(workdir, overrides)
    from llmjax.inference import embed as embedding, embedding_files
    from llmjax.inference.text_batches import read_texts
    from llmjax.parallel import hosts

    source, output = (pathlib.Path(path).expanduser() for path in (flags.input, flags.output))
    embedding_files.check_output(output)
    texts = read_texts(source, flags.field)
    objective = loading.read_config(workdir, overrides).objective
    settings = embedding.choose(workdir, objective, pooling=flags.pooling, max_tokens=flags.max_tokens)
    with loading.load(workdir, step=flags.step, overrides=overrides) as loaded:
        vectors, cut = embedding.embed(loaded, texts, settings)
    if hosts.is_primary():
        embedding_files.write_vectors(output, texts, vectors)
    logger.info(
        "%s: %d vectors of %d dimensions, pooling %s, %s, of the %s of step %d",
        output,
        *vectors.shape,
        settings.pooling,
        "normalized" if settings.normalize else "not normalized",
        loaded.params_name,
        loaded.step,
    )
    if cut:
        logger.info(
            "  note: %d texts were cut to %d tokens", cut, settings.max_tokens or loaded.config.model.max_seq_len
        )
    return 0
