"""The door: `llmjax VERB ...` finds the verb's module, and turns every bad input into one line and status 78."""

import argparse
from collections.abc import Callable
import dataclasses
import errno
import itertools
import json
import math
import os
import shlex
import sys
import textwrap
import traceback
import typing

import llmjax
from llmjax.config import UserError, families_of, suggest

BAD_INPUT, HANG = 78, 75
_CONFIG = "a Python file with get_config(); may be left out where a checkpoint was imported"

OVERVIEW = """\
llmjax: pretrain language models, from a laptop to a pod

  llmjax prepare   --config=FILE --workdir=DIR   text -> tokenizer, token store, packing plan
  llmjax train     --config=FILE --workdir=DIR   prepares if needed, trains, resumes, evaluates, writes report.html
  llmjax eval      --workdir=DIR                 scores a checkpoint on a split
  llmjax generate  --workdir=DIR --prompt=TEXT   writes text with a checkpoint
  llmjax fill      --workdir=DIR --text=TEXT     fills the masks of a text with a masked-LM checkpoint
  llmjax import    --from=DIR --workdir=DIR      a Hugging Face checkpoint on disk -> a workdir
  llmjax export    --workdir=DIR --to=DIR        a checkpoint -> a folder that transformers loads
  llmjax inspect   --workdir=DIR                 checkpoints, their fingerprints, the config
  llmjax size      --flops=1e21 | --config=FILE  what to train for a budget; what a model is made of and costs
  llmjax fields    [SECTION]                     every config field, its meaning and its default

Every config field can be set on the command line: --config.train.steps=500
`llmjax VERB --help` says more. To begin: llmjax train --config=configs/quickstart.py --workdir=runs/quickstart
"""


class Parser(argparse.ArgumentParser):
    """argparse, but a bad flag is a UserError: one line, like every other bad input."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{self.prog}: {message}; see `{self.prog} --help`")


def main() -> typing.NoReturn:
    """Run a verb and exit: 0 done, 75 hang, 78 bad input (no restart helps), 85 saved on request, else a crash."""
    try:
        status = run(sys.argv[1:])
    except UserError as error:
        status = _fail(str(error))
    except TimeoutError as error:
        print(f"llmjax: error: {error}", file=sys.stderr, flush=True)
        status = HANG
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        if mend := _mend(error):
            status = _fail(mend)
        else:
            traceback.print_exc()
            status = 1
    _exit(status)


def _mend(error: Exception) -> str:
    """One line for what the system refuses and only the user can mend; '' for any other error."""
    if not isinstance(error, OSError):
        return ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no space left{f' for {error.filename}' if error.filename else ''}: free some and start again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR) and error.filename:
        return f"{error.filename}: {os.strerror(error.errno).lower()}; make it accessible, or name another place"
    return ""


def _fail(message: str) -> int:
    print(f"llmjax: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return BAD_INPUT


def _exit(status: int) -> typing.NoReturn:
    """In a job of several processes, one that failed must not wait for the others in JAX's shutdown barrier."""
    if status and "jax" in sys.modules:
        import jax

        from llmjax.parallel import hosts

        if jax.distributed.is_initialized():
            hosts.exit_now(status)
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Run one command line (without the program's name) and return its exit status."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(OVERVIEW, end="")
        return 0
    if arguments[0] == "--version":
        print(f"llmjax {llmjax.__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        raise UserError(f"unknown verb {verb!r}{suggest(verb, VERBS)}: known are {', '.join(VERBS)}")
    return VERBS[verb](rest)


def _parser(verb: str, description: str, example: str) -> Parser:
    fields = "\n\n--config.FIELD=VALUE sets any config field; `llmjax fields` lists them"
    overrides = "" if verb in ("inspect", "fields") else fields
    return Parser(
        prog=f"llmjax {verb}",
        description=textwrap.dedent(description),
        epilog=f"example:\n  {example}{overrides}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _parse(parser: Parser, arguments: list[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Flags, and the `--config.FIELD=VALUE` overrides in order."""
    plain, overrides, waiting = [], [], iter(arguments)
    for argument in waiting:
        if not argument.startswith("--config."):
            plain.append(argument)
            continue
        field, equals, value = argument.removeprefix("--config.").partition("=")
        if not equals and (value := next(waiting, None)) is None:
            raise UserError(f"{argument}: give a value, {argument}=VALUE")
        overrides.append((field, value))
    return parser.parse_args(plain), overrides


def _workdir(text: str):
    from etils import epath

    if not text or os.path.isfile(os.path.expanduser(text)):
        raise UserError(f"--workdir={text}: {'this is a file' if text else 'empty'}; give a folder for the run's files")
    return epath.Path(os.path.expanduser(text))


def _say(line: str) -> None:
    """Print on process 0 alone."""
    from llmjax.parallel import hosts

    if hosts.is_primary():
        print(line, flush=True)


def _whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise ValueError
        return value

    whole_number.__name__ = f"whole number, {least} {'or more' if most == math.inf else f'to {most}'}"
    return whole_number


def prepare(arguments: list[str]) -> int:
    """Text to token store."""
    parser = _parser(
        "prepare",
        """\
        Read the text, split it into train, validation and test, train a tokenizer (or take a given one), write the
        token store. Finished parts are kept: started again, it goes on where it was. Nothing is trained.
        --preview shows what the model will see of the first samples.""",
        "llmjax prepare --config=configs/quickstart.py --workdir=runs/a --config.data.sources.main.path='texts/*.txt'",
    )
    parser.add_argument("--config", metavar="FILE[:SIZE]", help=_CONFIG)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the run's files go")
    parser.add_argument("--preview", type=_whole(0), default=0, metavar="N", help="print the first N samples")
    flags, overrides = _parse(parser, arguments)
    import numpy as np

    from llmjax import loading, run_config, workdir as workdirs
    from llmjax.data import prepare as preparing, preview
    from llmjax.data.pipeline import TrainData
    from llmjax.data.tokenizer import load_tokenizer

    workdir = _workdir(flags.workdir)
    config = loading.resolve(flags.config, workdir, overrides)
    store = loading.store_folder(config, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with workdirs.Lock(workdir, primary=True):
        preparing.prepare(config.data, store, say=lambda line: print(line, flush=True))
        tokenizer = load_tokenizer(store)
        objective = run_config.objective(config, tokenizer)
        data = TrainData(store, config.data, seed=config.seed, global_batch=1, objective=objective)
    rows = f"{config.data.seq_len:,} tokens"
    if objective.target_len != config.data.seq_len:
        rows = f"{config.data.seq_len:,} source and {objective.target_len:,} target tokens"
    for name, part in data.summary().items():
        print(f"{name}: packed in {part['rows']:,} rows of {rows}, {part['density']:.2%} full")
    if flags.preview:
        print(f"\n{config.objective.name}: {preview.LEGEND}")
        left = data.remaining(data.start())
        count = flags.preview if left is None else min(flags.preview, left)
        for batch, _ in itertools.islice(data.batches(data.start(), np.arange(1)), count):
            print("", *preview.lines(batch, objective, tokenizer), sep="\n")
        data.close()
    again = [f"--config={flags.config}", f"--workdir={flags.workdir}"]
    again += [f"--config.{field}={value}" for field, value in overrides]
    print(f"next: {shlex.join(['llmjax', 'train', *again])}")
    return 0


def train(arguments: list[str]) -> int:
    """Train, or resume."""
    parser = _parser(
        "train",
        """\
        Train a model: the token store is prepared first where it is missing, and a workdir that holds a checkpoint is
        resumed from its newest good one. Ends with an evaluation, samples and report.html.
        For several processes on one machine: launch/local.py --processes=2 --devices=4 -- llmjax train ...""",
        "llmjax train --config=configs/quickstart.py --workdir=runs/mine --config.train.steps=500",
    )
    parser.add_argument("--config", metavar="FILE[:SIZE]", help=_CONFIG)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the run's files go")
    flags, overrides = _parse(parser, arguments)
    from llmjax import loading
    from llmjax.parallel import hosts

    said: list[str] = []
    config = loading.resolve(flags.config, _workdir(flags.workdir), overrides, said.append)
    hosts.initialize()
    for line in said:  # who is primary is known from here on
        _say(line)
    from llmjax.train import loop

    return loop.train(config, _workdir(flags.workdir), _say)


def evaluate(arguments: list[str]) -> int:
    """Score a checkpoint."""
    parser = _parser(
        "eval",
        """\
        Score a checkpoint on every document of a split, once each: loss, perplexity, accuracy, by source; and bits per
        byte over the original text (causal), or the accuracy of always guessing the commonest target. Writes
        WORKDIR/eval/<step>/<split>.json. Any mesh will do.""",
        "llmjax eval --workdir=runs/mine --split=test",
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a run")
    parser.add_argument("--step", type=_whole(0), help="the checkpoint (default: the newest)")
    splits = ("train", "validation", "test")
    parser.add_argument("--split", default="validation", choices=splits, help="which documents (default validation)")
    flags, overrides = _parse(parser, arguments)
    from llmjax.parallel import hosts

    hosts.initialize()
    from llmjax import loading, report
    from llmjax.evals import harness

    path, scores = harness.evaluate(
        _workdir(flags.workdir), step=flags.step, split=flags.split, overrides=overrides, say=_say
    )
    for line in harness.describe(scores):
        _say(line)
    if hosts.is_primary():
        print(f"written to {path}\nreport: {report.write_report(_workdir(flags.workdir))}")
    if loading.read_config(_workdir(flags.workdir)).model.generates:
        _say(f"next: llmjax generate --workdir={flags.workdir} --prompt='Once upon a time'")
    return 0


def generate(arguments: list[str]) -> int:
    """Write text."""
    parser = _parser(
        "generate",
        """\
        Continue prompts with a checkpoint. The same seed gives the same text, whatever the other prompts are.
        --temperature=0 always takes the likeliest token.""",
        "llmjax generate --workdir=runs/mine --prompt='def main(' --temperature=0.8 --top_p=0.95 --seed=1",
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a run")
    parser.add_argument("--prompt", action="append", required=True, help="text to continue; may be given several times")
    parser.add_argument("--step", type=_whole(0), help="the checkpoint (default: the newest)")
    parser.add_argument(
        "--max_tokens", type=_whole(1, 2**30), default=100, help="tokens to write at most (default 100)"
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy (default 0.8)")
    parser.add_argument("--top_k", type=_whole(0), default=0, help="only the k likeliest tokens; 0: all (default)")
    parser.add_argument("--top_p", type=float, default=1.0, help="only the likeliest tokens that hold this probability")
    parser.add_argument("--seed", type=_whole(0, 2**32 - 1), default=0, help="another seed, another text (default 0)")
    flags, overrides = _parse(parser, arguments)
    from llmjax.parallel import hosts

    hosts.initialize()
    from llmjax import loading, run_config, sampling

    loaded = loading.load(_workdir(flags.workdir), step=flags.step, overrides=overrides, say=_say)
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
    for prompt, text in zip(flags.prompt, texts, strict=True):
        if len(texts) > 1:
            _say(f"--- {prompt!r} ---")
        _say(prompt + text)
    if hosts.is_primary():  # apart from the text itself, which may go into a file
        drawn = f"temperature {flags.temperature:g}, seed {flags.seed}" if flags.temperature else "greedy"
        print(f"\nstep {loaded.step} ({loaded.parameters}), {drawn}", file=sys.stderr)
        print(f"next: llmjax eval --workdir={flags.workdir} --split=test", file=sys.stderr)
    return 0


def fill(arguments: list[str]) -> int:
    """Fill masks."""
    parser = _parser(
        "fill",
        """\
        Say what belongs in the place of each mask of a text, the likeliest token first, with a checkpoint that was
        trained with objective.name='masked'. A mask is [MASK], or what the tokenizer calls it, and hides one token; a
        space before it is part of that token.""",
        "llmjax fill --workdir=runs/bert --text='import [MASK] as np' --count=3",
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a run")
    parser.add_argument("--text", action="append", required=True, help="text with masks; may be given several times")
    parser.add_argument("--step", type=_whole(0), help="the checkpoint (default: the newest)")
    parser.add_argument("--count", type=_whole(1), default=5, help="tokens to name for each mask (default 5)")
    flags, overrides = _parse(parser, arguments)
    from llmjax.parallel import hosts

    hosts.initialize()
    from llmjax import fill as filling, loading

    loaded = loading.load(_workdir(flags.workdir), step=flags.step, overrides=overrides, say=_say)
    filled = filling.fill(
        flags.text,
        graph=loaded.graph,
        params=loaded.params,
        model=loaded.config.model,
        mesh=loaded.mesh,
        rules=loaded.config.parallel.rules,
        tokenizer=loaded.tokenizer,
        count=flags.count,
    )
    for text, masks in zip(flags.text, filled, strict=True):
        _say(text)
        for number, fillers in enumerate(masks, 1):
            if len(masks) > 1:
                _say(f" mask {number}")
            for filler in fillers:
                _say(f"  {filler.probability:6.1%}  {filler.text!r}")
    _say(f"step {loaded.step} ({loaded.parameters})")
    return 0


def import_(arguments: list[str]) -> int:
    """Take over a published checkpoint."""
    parser = _parser(
        "import",
        """\
        Read a checkpoint of Hugging Face transformers from a local folder (config.json, model.safetensors or shards
        with their index, tokenizer.json or a SentencePiece model) into checkpoint 0 of a new workdir. Tensors go to the
        devices part by part, so that the host holds no copy of the whole. Model and tokenizer are kept with the
        workdir: generate, eval and export work on it at once, and train goes on from these parameters.""",
        "llmjax import --from=checkpoints/gpt2 --workdir=runs/gpt2 --config.model.dtype=bfloat16",
    )
    parser.add_argument("--from", dest="source", required=True, metavar="DIR", help="a folder with config.json")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a new folder for the run")
    flags, overrides = _parse(parser, arguments)
    from llmjax.parallel import hosts

    hosts.initialize()
    import pathlib

    from llmjax.interop import importing

    source = pathlib.Path(os.path.expanduser(flags.source))
    found = importing.import_checkpoint(source, _workdir(flags.workdir), overrides=overrides, say=_say)
    model, workdir = found.config.model, flags.workdir
    _say(
        f"{found.architecture} is now {workdir}: model.family={model.family!r}, {found.parameters:,} parameters stored "
        f"as {model.param_dtype}, read from {found.nbytes / 1e9:.2f} GB of {', '.join(found.types)}, {found.tokenizer}"
    )
    if model.generates:
        _say(f"next: llmjax generate --workdir={workdir} --prompt='Once upon a time'")
    _say(f"      llmjax train --workdir={workdir} --config.data.sources.main.path='/my/texts/**/*.txt'")
    return 0


def export(arguments: list[str]) -> int:
    """Give a checkpoint to others."""
    parser = _parser(
        "export",
        """\
        Write a checkpoint as a folder that transformers loads with from_pretrained: config.json, model.safetensors or
        shards with their index, the tokenizer. The class is the one that expresses the model; where none does, the
        field is named. What is exported is what `llmjax eval` scores: an average where the optimizer keeps one.""",
        "llmjax export --workdir=runs/mine --to=exports/mine --dtype=bfloat16",
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a run")
    parser.add_argument("--to", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--step", type=_whole(0), help="the checkpoint (default: the newest)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="on disk (default float32)")
    parser.add_argument(
        "--max_shard_bytes", type=_whole(1), default=5_000_000_000, help="of a file (default 5,000,000,000)"
    )
    flags, overrides = _parse(parser, arguments)
    from llmjax.parallel import hosts

    hosts.initialize()
    import pathlib

    from llmjax.interop import exporting

    made = exporting.export(
        _workdir(flags.workdir),
        pathlib.Path(os.path.expanduser(flags.to)),
        step=flags.step,
        dtype=flags.dtype,
        max_shard_bytes=flags.max_shard_bytes,
        overrides=overrides,
        say=_say,
    )
    _say(f"written to {flags.to}: {made.architecture} in {len(made.files)} file(s), {made.nbytes / 1e9:.2f} GB")
    _say(f"tokenizer: {made.tokenizer}")
    auto = "AutoModelForCausalLM" if made.architecture.endswith(("CausalLM", "LMHeadModel")) else made.architecture
    _say(f"next: from transformers import {auto}; {auto}.from_pretrained({flags.to!r})")
    return 0


def inspect(arguments: list[str]) -> int:
    """Look at a run."""
    parser = _parser(
        "inspect",
        "Show a run's checkpoints, their fingerprints and data states, and its config.",
        "llmjax inspect --workdir=runs/mine --json",
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a run")
    parser.add_argument("--json", action="store_true", help="machine-readable, oldest checkpoint first")
    flags = parser.parse_args(arguments)
    from llmjax import inspection

    found = inspection.inspect(_workdir(flags.workdir))
    print(json.dumps(found, indent=2) if flags.json else inspection.describe(found))
    return 0


def size(arguments: list[str]) -> int:
    """Choose a size, or look at one."""
    parser = _parser(
        "size",
        """\
        Which size to train: from a budget (--flops, or --budget_hours on --devices of a --device), a number of
        --tokens or of --parameters, or two of them; what is left open follows from published scaling laws, each named.
        Or, with --config, what a config's model is made of: parameters by part, FLOPs per token, memory by remat
        policy. Nothing is trained.""",
        "llmjax size --budget_hours=24 --device=v5e --devices=8\n  llmjax size --config=configs/llama.py:8B",
    )
    from llmjax.plan.devices import NAMES

    parser.add_argument("--flops", type=float, help="arithmetic to spend, such as 1e21")
    parser.add_argument("--budget_hours", type=float, help="the same as hours of --devices")
    parser.add_argument("--tokens", type=float, help="tokens to train on, such as 20e9")
    parser.add_argument("--parameters", type=float, help="size of the model, such as 1.3e9")
    parser.add_argument("--device", default="v5e", help=f"one of {', '.join(NAMES)} (default v5e; here: this machine)")
    parser.add_argument("--devices", type=_whole(1), default=8, help="for --budget_hours (default 8)")
    parser.add_argument("--mfu", type=float, default=0.4, help="part of the peak that training reaches (default 0.4)")
    parser.add_argument("--seq_len", type=_whole(1), default=2048, help="tokens in a row (default 2048)")
    parser.add_argument("--config", metavar="FILE[:SIZE]", help="look at this config instead")
    parser.add_argument("--vocab_size", type=_whole(1), help="for --config (default: its tokenizer's)")
    flags, overrides = _parse(parser, arguments)
    from llmjax.plan import budget, devices, size as sizes

    device = devices.find(flags.device)
    if not 0 < flags.mfu <= 1:
        raise UserError(f"--mfu={flags.mfu}: must be above 0 and at most 1")
    if flags.config:
        spent = [name for name in ("flops", "budget_hours", "tokens", "parameters") if getattr(flags, name) is not None]
        if spent:
            raise UserError(f"--{spent[0]} chooses a size and --config looks at one: give one of the two")
        config = sizes.resolve(flags.config, flags.vocab_size, tuple(overrides))
        print("\n".join(sizes.describe_config(config, flags.config, device)))
        return 0
    if overrides:
        raise UserError(f"--config.{overrides[0][0]}: there is no --config whose field this could set")
    flops = flags.flops
    if flags.budget_hours is not None:
        if flops is not None:
            raise UserError("--flops and --budget_hours say the same thing: leave one of them away")
        flops = flags.budget_hours * 3600 * flags.devices * device.peak * flags.mfu
    chosen = budget.choose(flops=flops, tokens=flags.tokens, parameters=flags.parameters)
    print("\n".join(sizes.describe_budget(chosen, device, mfu=flags.mfu, seq_len=flags.seq_len)))
    return 0


def fields(arguments: list[str]) -> int:
    """Explain the config."""
    parser = _parser("fields", "Every config field: its meaning, unit and default.", "llmjax fields optimizer")
    parser.add_argument("section", nargs="?", metavar="SECTION", help="one section, such as model or data.tokenizer")
    flags = parser.parse_args(arguments)
    from llmjax.run_config import RunConfig

    shown = []

    def show(cls: type, path: str, family: str = "") -> None:
        hints = typing.get_type_hints(cls)
        shown.append(path)
        if not flags.section or path == flags.section:
            print(f"[{path or 'top level'}{family}] {textwrap.dedent('    ' + (cls.__doc__ or '')).strip()}\n")
            for field in dataclasses.fields(cls):
                if not dataclasses.is_dataclass(hints[field.name]) and field.default is not dataclasses.MISSING:
                    print(f"  --config.{path}{'.' if path else ''}{field.name}={field.default!r}")
            print()
        for name, hint in hints.items():
            families = families_of(hint)
            for family, config in families.items():
                show(config, f"{path}.{name}" if path else name, f", {name}.family={family}")
            if families:
                continue
            inner = next((h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)), None)
            if inner is not None:
                entry = f"{name}.NAME" if inner is not hint else name
                show(typing.cast(type, inner), f"{path}.{entry}" if path else entry)

    show(RunConfig, "")
    if flags.section and flags.section not in shown:
        known = ", ".join(dict.fromkeys(shown[1:]))
        raise UserError(f"no section {flags.section!r}{suggest(flags.section, shown)}: known are {known}")
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "prepare": prepare,
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "fill": fill,
    "import": import_,
    "export": export,
    "inspect": inspect,
    "size": size,
    "fields": fields,
}
