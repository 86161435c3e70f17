"""`llmjax generate`: continue prompts with a checkpoint."""

from collections.abc import Sequence
import logging

from llmjax.cli.flags import Parser, int_range, make_parser, number, parse, parse_workdir

logger = logging.getLogger(__name__)


def generate(arguments: list[str]) -> int:
    """Write text."""
    flags, overrides = parse(_make_parser(), arguments)
    if flags.prompt_form:
        overrides.append(("objective.prompt_form", flags.prompt_form))
    from llmjax.run import loading

    workdir = parse_workdir(flags.workdir)
    loading.initialize(workdir, overrides)
    from llmjax.inference.generate import Sampling, complete
    from llmjax.parallel import hosts

    sampling = Sampling(
        max_tokens=flags.max_tokens,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        seed=flags.seed,
    )
    with loading.load(workdir, step=flags.step, overrides=overrides) as loaded:
        texts = complete(loaded, flags.prompt, sampling)
    answers = loaded.config.objective.prompt_form == "plain"
    if hosts.is_primary():
        _print_texts(flags.prompt, texts, with_prompt=not answers)
    method = f"temperature {flags.temperature:g}, seed {flags.seed}" if flags.temperature else "greedy"
    method += ", plain prompts" if answers else ""
    logger.info("\nstep %d (%s), %s", loaded.step, loaded.params_name, method)
    logger.info("next: llmjax eval --workdir=%s --split=test", flags.workdir)
    return 0


def _make_parser() -> Parser:
    parser = make_parser(
        "generate",
        """\
        Continue prompts with a checkpoint: prompt and continuation are printed on stdout, everything else on stderr.
        The n-th prompt and a seed give the same text each time, whatever the other prompts are. --temperature=0 always
        takes the most probable token.
        The encoder of an encoder-decoder reads the prompt in one of two forms, and its decoder generates. trained: as
        in training; for span corruption with a gap at the end, which the decoder fills. plain: the text and EOS, for
        instruction-tuned models such as Flan-T5; the answer is printed without the prompt.""",
        "llmjax generate --workdir=runs/mine --prompt='def main(' --temperature=0.8 --top_p=0.95 --seed=1",
    )
    from llmjax.data.config import PROMPT_FORMS

    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", help="a run")
    add("--prompt", action="append", required=True, help="text to continue; may be given several times")
    forms = "of an encoder-decoder (default: objective.prompt_form of the run: plain after an import, else trained)"
    add("--prompt_form", choices=PROMPT_FORMS, help=forms)
    add("--step", type=int_range(0), help="the checkpoint (default: the newest)")
    add("--max_tokens", type=int_range(1, 2**30), default=100, help="new tokens at most (default 100)")
    add("--temperature", type=number, default=0.8, help="0: greedy (default 0.8)")
    add("--top_k", type=int_range(0), default=0, help="sample from the k most probable tokens; 0: all (default)")
    add(
        "--top_p",
        type=number,
        default=1.0,
        help="sample from the fewest tokens with this total probability (default 1)",
    )
    add("--seed", type=int_range(0, 2**32 - 1), default=0, help="of the random draws (default 0)")
    return parser


def _print_texts(prompts: Sequence[str], texts: Sequence[str], *, with_prompt: bool) -> None:
    for prompt, text in zip(prompts, texts, strict=True):
        if len(texts) > 1:
            print(f"--- {prompt!r} ---")
        print(prompt + text if with_prompt else text, flush=True)
