"""`llmjax generate`: continue prompts with a checkpoint."""

import argparse
from collections.abc import Sequence
import logging
import pathlib
from typing import TYPE_CHECKING, Any

from llmjax.cli.flags import Parser, int_range, make_parser, number, parse, parse_workdir
from llmjax.errors import UserError

if TYPE_CHECKING:
    from llmjax.inference.sampling import Sampling

logger = logging.getLogger(__name__)

# Flags that a beam search does not have.
_SAMPLING_FLAGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")
_TEMPERATURE = 0.8  # the default


def generate(arguments: list[str]) -> int:
    """Write text."""
    flags, overrides = parse(_make_parser(), arguments)
    if flags.prompt_form:
        overrides.append(("objective.prompt_form", flags.prompt_form))
    _check_flags(flags)
    from llmjax.run import loading

    workdir = parse_workdir(flags.workdir)
    loading.initialize(workdir, overrides)
    from llmjax.inference.generate import answer, complete
    from llmjax.parallel import hosts
    from llmjax.run import next_commands

    method = _make_method(flags)
    with loading.load(workdir, step=flags.step, overrides=overrides) as loaded:
        template = loading.load_chat_template(workdir, loaded) if flags.chat else None
        if flags.prompts is not None:
            _complete_file(flags, loaded, method, template)
            return 0
        if template is not None:
            system = [] if flags.system is None else [{"role": "system", "content": flags.system}]
            dialogues = [[*system, {"role": "user", "content": prompt}] for prompt in flags.prompt]
            texts = answer(loaded, dialogues, template, method, samples=flags.n)
        else:
            texts = complete(loaded, flags.prompt, method, samples=flags.n)
    answers = flags.chat or loaded.config.objective.prompt_form == "plain"
    if hosts.is_primary():
        prompts = [prompt for prompt in flags.prompt for _ in range(flags.n)]
        _print_texts(prompts, texts, with_prompt=not answers)
    description = _describe_method(method)
    if answers:
        description += ", chat template" if flags.chat else ", plain prompts"
    logger.info("\nstep %d (%s), %s", loaded.step, loaded.params_name, description)
    logger.info("next: %s", next_commands.score_model(flags.workdir, loaded.store))
    return 0


def _complete_file(flags: argparse.Namespace, loaded: Any, method: Any, template: Any) -> None:
    from llmjax.inference.prompt_files import PromptJob, complete_file

    source, output = (pathlib.Path(path).expanduser() for path in (flags.prompts, flags.output))
    job = PromptJob(
        prompts=source,
        output=output,
        method=method,
        samples=flags.n,
        batch_size=flags.batch_size or PromptJob.batch_size,
        template=template,
        system=flags.system,
    )
    before, total = complete_file(loaded, job)
    logger.info(
        "%s: %d completions, of which this command wrote %d, of the %s of step %d, %s",
        output, total, total - before, loaded.params_name, loaded.step, _describe_method(method),
    )  # fmt: skip


def _check_flags(flags: argparse.Namespace) -> None:
    """UserError for flags that have no effect beside others."""
    if flags.system is not None and not flags.chat:
        raise UserError("--system: only --chat has a system message; add --chat, or put the text into --prompt")
    if (flags.prompts is None) != (flags.output is None):
        given, missing = ("output", "prompts") if flags.prompts is None else ("prompts", "output")
        raise UserError(f"--{given}: needs --{missing}=FILE.jsonl as well")
    if flags.batch_size is not None and flags.prompts is None:
        raise UserError(f"--batch_size={flags.batch_size}: only --prompts=FILE has batches; leave it out")
    if flags.beams is None:
        if flags.length_penalty is not None:
            raise UserError(f"--length_penalty={flags.length_penalty:g}: only a beam search has one; add --beams=4")
        if flags.n > 1 and flags.temperature == 0:
            raise UserError(f"--n={flags.n}: --temperature=0 always takes the same text; give another, or --n=1")
        return
    for name in _SAMPLING_FLAGS:
        if getattr(flags, name) is not None:
            raise UserError(f"--{name}: a beam search does not draw tokens; leave it out, or leave out --beams")
    if flags.n > flags.beams:
        raise UserError(f"--n={flags.n}: a search with --beams={flags.beams} finds only so many; raise --beams")


def sampling_from_flags(flags: argparse.Namespace) -> "Sampling":
    """How the flags of `add_sampling_flags` sample. Imports JAX."""
    from llmjax.inference.sampling import Sampling

    given = {name: value for name in _SAMPLING_FLAGS if (value := getattr(flags, name)) is not None}
    given["stop"] = tuple(given.get("stop", ()))
    return Sampling(**{"max_tokens": flags.max_tokens, "temperature": _TEMPERATURE, **given})


def _make_method(flags: argparse.Namespace) -> Any:
    from llmjax.inference.beams import BeamSearch

    if flags.beams is None:
        return sampling_from_flags(flags)
    penalty = BeamSearch.length_penalty if flags.length_penalty is None else flags.length_penalty
    return BeamSearch(max_tokens=flags.max_tokens, beams=flags.beams, length_penalty=penalty)


def _describe_method(method: Any) -> str:
    if hasattr(method, "beams"):
        return f"{method.beams} beams, length penalty {method.length_penalty:g}"
    return f"temperature {method.temperature:g}, seed {method.seed}" if method.temperature else "greedy"


def _make_parser() -> Parser:
    parser = make_parser(
        "generate",
        """\
        Continue prompts with a checkpoint: prompt and continuation are printed on stdout, everything else on stderr.
        The n-th prompt and a seed give the same text each time, whatever the other prompts are. --temperature=0 always
        takes the most probable token.
        --prompts=FILE --output=FILE completes a file of prompts in batches. The same command continues after the last
        whole line if it was interrupted; OUTPUT.settings.json holds what the completions depend on.
        The encoder of an encoder-decoder reads the prompt in one of two forms, and its decoder generates. trained: as
        in training; for span corruption with a gap at the end, which the decoder fills. plain: the text and EOS, for
        instruction-tuned models such as Flan-T5; the answer is printed without the prompt.
        --chat puts the prompt as a user's turn through the chat template of the run's dialogues, else that of the
        imported model, and prints the assistant's answer alone. Names of special tokens in the prompt are then ordinary
        text.""",
        "llmjax generate --workdir=runs/mine --prompt='def main(' --temperature=0.8 --top_p=0.95 --seed=1",
        job=True,
    )
    from llmjax.data.config import PROMPT_FORMS

    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", help="a run")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", action="append", help="text to continue; may be given several times")
    prompts = "JSON lines with the field `prompt`, or `messages` with --chat; completions go to --output"
    prompt.add_argument("--prompts", metavar="FILE", help=prompts)
    add("--output", metavar="FILE", help="with --prompts: JSON lines with prompt and completion, in the same order")
    add("--batch_size", type=int_range(1, 2**20), help="with --prompts: how many are computed at a time (default 16)")
    forms = "how an encoder-decoder reads the prompt (default: objective.prompt_form of the run)"
    add("--prompt_form", choices=PROMPT_FORMS, help=forms)
    add("--chat", action="store_true", help="put each prompt as a user's turn through the model's chat template")
    add("--system", metavar="TEXT", help="with --chat: the system message before it")
    add("--step", type=int_range(0), help="the checkpoint (default: the newest)")
    add("--n", type=int_range(1, 2**20), default=1, help="texts for each prompt (default 1)")
    add_sampling_flags(parser)
    beams = "of an encoder-decoder: search the most probable text with so many beams, without draws"
    add("--beams", type=int_range(1, 2**10), help=beams)
    add("--length_penalty", type=number, help="with --beams: above 0, a higher one favours long texts (default 1)")
    return parser


def add_sampling_flags(parser: Parser, max_tokens: int = 100) -> None:
    """Add the flags that `sampling_from_flags` reads; max_tokens: the default."""
    add = parser.add_argument
    new_tokens = f"new tokens at most (default {max_tokens})"
    add("--max_tokens", type=int_range(1, 2**30), default=max_tokens, help=new_tokens)
    # Without a default, so that a flag that does not fit can be told from one that was not given.
    add("--temperature", type=number, help=f"randomness of the draws; 0: greedy (default {_TEMPERATURE})")
    add("--top_k", type=int_range(0), help="sample from the k most probable tokens; 0: all (default 0)")
    add("--top_p", type=number, help="sample from the fewest tokens with this total probability (default 1)")
    add("--min_p", type=number, help="sample from tokens at least this times as probable as the first (default 0)")
    add("--repetition_penalty", type=number, help="above 1: tokens of the text so far become less likely (default 1)")
    add("--stop", action="append", metavar="TEXT", help="end before this text; may be given several times")
    add("--seed", type=int_range(0, 2**32 - 1), help="seed of the random draws (default 0)")


def _print_texts(prompts: Sequence[str], texts: Sequence[str], *, with_prompt: bool) -> None:
    for prompt, text in zip(prompts, texts, strict=True):
        if len(texts) > 1:
            print(f"--- {prompt!r} ---")
        print(prompt + text if with_prompt else text, flush=True)
