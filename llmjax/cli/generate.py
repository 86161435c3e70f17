"""`llmjax generate`: continue prompts with a checkpoint."""

import sys

from llmjax.cli.flags import int_range, make_parser, parse, parse_workdir, say


def generate(arguments: list[str]) -> int:
    """Write text."""
    parser = make_parser(
        "generate",
        """\
        Continue prompts with a checkpoint. The same seed gives a prompt in the same place the same text, whatever the
        others are. --temperature=0 always takes the likeliest token.
        An encoder-decoder reads the prompt with its encoder, in one of two forms, and its decoder writes. trained: as
        in training, for span corruption with a gap at the end, which the decoder fills. plain: the text and EOS, for
        instruction-tuned models such as Flan-T5; the answer is printed without the prompt.""",
        "llmjax generate --workdir=runs/mine --prompt='def main(' --temperature=0.8 --top_p=0.95 --seed=1",
    )
    from llmjax.data.config import PROMPT_FORMS

    parser.add_argument("--workdir", required=True, metavar="DIR", help="a run")
    parser.add_argument("--prompt", action="append", required=True, help="text to continue; may be given several times")
    parser.add_argument(
        "--prompt_form",
        choices=PROMPT_FORMS,
        help="of an encoder-decoder (default: the run's objective.prompt_form, plain after an import, else trained)",
    )
    parser.add_argument("--step", type=int_range(0), help="the checkpoint (default: the newest)")
    parser.add_argument(
        "--max_tokens", type=int_range(1, 2**30), default=100, help="tokens to write at most (default 100)"
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy (default 0.8)")
    parser.add_argument("--top_k", type=int_range(0), default=0, help="only the k likeliest tokens; 0: all (default)")
    parser.add_argument("--top_p", type=float, default=1.0, help="only the likeliest tokens that hold this probability")
    parser.add_argument(
        "--seed", type=int_range(0, 2**32 - 1), default=0, help="another seed, another text (default 0)"
    )
    flags, overrides = parse(parser, arguments)
    if flags.prompt_form:
        overrides.append(("objective.prompt_form", flags.prompt_form))
    from llmjax.parallel import hosts
    from llmjax.run import loading

    loading.initialize(parse_workdir(flags.workdir), overrides)
    from llmjax.inference import sampling
    from llmjax.run import config as run_config

    loaded = loading.load(parse_workdir(flags.workdir), step=flags.step, overrides=overrides, say=say)
    texts = sampling.complete(
        flags.prompt,
        graph=loaded.graph,
        params=loaded.params,
        model=loaded.config.model,
        mesh=loaded.mesh,
        rules=loaded.config.parallel.rules,
        tokenizer=loaded.tokenizer,
        objective=run_config.objective(loaded.config, loaded.tokenizer),
        max_tokens=flags.max_tokens,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        seed=flags.seed,
    )
    plain = loaded.config.objective.prompt_form == "plain"
    for prompt, text in zip(flags.prompt, texts, strict=True):
        if len(texts) > 1:
            say(f"--- {prompt!r} ---")
        say(text if plain else prompt + text)
    if hosts.is_primary():  # apart from the text itself, which may go into a file
        drawn = f"temperature {flags.temperature:g}, seed {flags.seed}" if flags.temperature else "greedy"
        drawn += ", plain prompts" if plain else ""
        print(f"\nstep {loaded.step} ({loaded.parameters}), {drawn}", file=sys.stderr)
        print(f"next: llmjax eval --workdir={flags.workdir} --split=test", file=sys.stderr)
    return 0
