"""The verbs: each reads its flags, then imports what it needs and does it. Returns the exit status."""

from collections.abc import Callable
import itertools
import json
import os
import pathlib
import shlex
import sys

from llmjax.cli.configs import configs
from llmjax.cli.curate import curate
from llmjax.cli.fields import fields
from llmjax.cli.flags import CONFIG, int_range, make_parser, parse, parse_workdir, say
from llmjax.errors import UserError


def prepare(arguments: list[str]) -> int:
    """Text to token store."""
    parser = make_parser(
        "prepare",
        """\
        Read the text, split it into train, validation and test, train a tokenizer (or take a given one), write the
        token store. Finished parts are kept: started again, it goes on where it was. Nothing is trained.
        --preview shows what the model will see of the first samples.""",
        "llmjax prepare --config=quickstart --workdir=runs/a --config.data.sources.main.path='texts/*.txt'",
    )
    parser.add_argument("--config", metavar="FILE[:SIZE]", help=CONFIG)
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
    again = [f"--config={flags.config}"] if flags.config else []
    again += [f"--workdir={flags.workdir}"]
    again += [f"--config.{field}={value}" for field, value in overrides]
    print(f"next: {shlex.join(['llmjax', 'train', *again])}")
    return 0


def train(arguments: list[str]) -> int:
    """Train, or resume."""
    parser = make_parser(
        "train",
        """\
        Train a model: the token store is prepared first where it is missing, and a workdir that holds a checkpoint is
        resumed from its newest good one; --config and overrides need not be repeated then. Ends with an evaluation,
        samples and report.html.
        For several processes on one machine: launch/local.py --processes=2 --devices=4 -- llmjax train ...""",
        "llmjax train --config=quickstart --workdir=runs/mine --config.train.steps=500",
    )
    parser.add_argument("--config", metavar="FILE[:SIZE]", help=CONFIG)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the run's files go")
    flags, overrides = parse(parser, arguments)
    from llmjax.parallel import hosts
    from llmjax.run import loading

    said: list[str] = []
    config = loading.resolve(flags.config, parse_workdir(flags.workdir), overrides, said.append)
    hosts.initialize(config.parallel.cpu_threads)
    for line in said:  # who is primary is known from here on
        say(line)
    from llmjax.train import loop

    return loop.train(config, parse_workdir(flags.workdir), say)


def evaluate(arguments: list[str]) -> int:
    """Score a checkpoint."""
    parser = make_parser(
        "eval",
        """\
        Score a checkpoint on every document of a split, once each: loss, perplexity, accuracy, by source; and bits per
        byte over the original text (causal), or the accuracy of always guessing the commonest target. Writes
        WORKDIR/eval/<step>/<split>.json. Any mesh will do.""",
        "llmjax eval --workdir=runs/mine --split=test",
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a run")
    parser.add_argument("--step", type=int_range(0), help="the checkpoint (default: the newest)")
    splits = ("train", "validation", "test")
    parser.add_argument("--split", default="validation", choices=splits, help="which documents (default validation)")
    flags, overrides = parse(parser, arguments)
    from llmjax.parallel import hosts
    from llmjax.run import loading

    loading.initialize(parse_workdir(flags.workdir), overrides)
    from llmjax import report
    from llmjax.evals import harness

    path, _ = harness.evaluate(
        parse_workdir(flags.workdir), step=flags.step, split=flags.split, overrides=overrides, say=say
    )
    if hosts.is_primary():
        print(f"written to {path}\nreport: {report.write_report(parse_workdir(flags.workdir))}")
    if loading.read_config(parse_workdir(flags.workdir)).model.generates:
        say(f"next: llmjax generate --workdir={flags.workdir} --prompt='Once upon a time'")
    return 0


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


def fill(arguments: list[str]) -> int:
    """Fill masks."""
    parser = make_parser(
        "fill",
        """\
        Say what belongs in the place of each mask of a text, the likeliest token first, with a checkpoint that was
        trained with objective.name='masked'. A mask is [MASK], or what the tokenizer calls it, and hides one token; a
        space before it is part of that token.""",
        "llmjax fill --workdir=runs/bert --text='import [MASK] as np' --count=3",
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a run")
    parser.add_argument("--text", action="append", required=True, help="text with masks; may be given several times")
    parser.add_argument("--step", type=int_range(0), help="the checkpoint (default: the newest)")
    parser.add_argument("--count", type=int_range(1), default=5, help="tokens to name for each mask (default 5)")
    flags, overrides = parse(parser, arguments)
    from llmjax.run import loading

    loading.initialize(parse_workdir(flags.workdir), overrides)
    from llmjax.inference import fill_mask as filling

    loaded = loading.load(parse_workdir(flags.workdir), step=flags.step, overrides=overrides, say=say)
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
        say(text)
        for number, fillers in enumerate(masks, 1):
            if len(masks) > 1:
                say(f" mask {number}")
            for filler in fillers:
                say(f"  {filler.probability:6.1%}  {filler.text!r}")
    say(f"step {loaded.step} ({loaded.parameters})")
    return 0


def import_(arguments: list[str]) -> int:
    """Take over a published checkpoint."""
    parser = make_parser(
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
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="FIELD",
        help="accept this unknown field of config.json, which changes no number of the model; may be repeated",
    )
    flags, overrides = parse(parser, arguments)
    from llmjax.parallel import hosts
    from llmjax.run import config as run_config

    # The model is known once the source is read; what the backend needs of the config is in the overrides alone.
    parallel = run_config.apply_overrides(
        {}, [(name, text) for name, text in overrides if name.startswith("parallel.")]
    )
    hosts.initialize(parallel.parallel.cpu_threads)
    from llmjax.interop import importing

    source = pathlib.Path(os.path.expanduser(flags.source))
    found = importing.import_checkpoint(
        source, parse_workdir(flags.workdir), overrides=overrides, ignore=flags.ignore, say=say
    )
    model, workdir = found.config.model, flags.workdir
    say(
        f"{found.architecture} is now {workdir}: model.family={model.family!r}, {found.parameters:,} parameters stored "
        f"as {model.param_dtype}, read from {found.nbytes / 1e9:.2f} GB of {', '.join(found.types)}, {found.tokenizer}"
    )
    if model.generates:
        say(f"next: llmjax generate --workdir={workdir} --prompt='Once upon a time'")
    say(f"      llmjax train --workdir={workdir} --config.data.sources.main.path='/my/texts/**/*.txt'")
    return 0


def export(arguments: list[str]) -> int:
    """Give a checkpoint to others."""
    parser = make_parser(
        "export",
        """\
        Write a checkpoint as a folder that transformers loads with from_pretrained: config.json, model.safetensors or
        shards with their index, the tokenizer. The class is the one that expresses the model; where none does, the
        field is named. What is exported is what `llmjax eval` scores: an average where the optimizer keeps one.""",
        "llmjax export --workdir=runs/mine --to=exports/mine --dtype=bfloat16",
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a run")
    parser.add_argument("--to", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--step", type=int_range(0), help="the checkpoint (default: the newest)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="on disk (default float32)")
    parser.add_argument(
        "--max_shard_bytes", type=int_range(1), default=5_000_000_000, help="of a file (default 5,000,000,000)"
    )
    flags, overrides = parse(parser, arguments)
    from llmjax.run import loading

    loading.initialize(parse_workdir(flags.workdir), overrides)
    from llmjax.interop import exporting

    made = exporting.export(
        parse_workdir(flags.workdir),
        pathlib.Path(os.path.expanduser(flags.to)),
        step=flags.step,
        dtype=flags.dtype,
        max_shard_bytes=flags.max_shard_bytes,
        overrides=overrides,
        say=say,
    )
    say(f"written to {flags.to}: {made.architecture} in {len(made.files)} file(s), {made.nbytes / 1e9:.2f} GB")
    say(f"tokenizer: {made.tokenizer}")
    auto = "AutoModelForCausalLM" if made.architecture.endswith(("CausalLM", "LMHeadModel")) else made.architecture
    say(f"next: from transformers import {auto}; {auto}.from_pretrained({flags.to!r})")
    return 0


def inspect(arguments: list[str]) -> int:
    """Look at a run."""
    parser = make_parser(
        "inspect",
        """\
        Show a run's checkpoints, their fingerprints and data states, and its config. --verify also reads the int_range
        token store and compares every checksum: damage ends it with one line and status 78.""",
        "llmjax inspect --workdir=runs/mine --json",
        overrides=False,
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a run")
    parser.add_argument("--json", action="store_true", help="machine-readable, oldest checkpoint first")
    parser.add_argument("--verify", action="store_true", help="read all of the token store and compare its checksums")
    flags = parser.parse_args(arguments)
    from llmjax.run import inspection

    found = inspection.inspect(parse_workdir(flags.workdir))
    if flags.json:
        verified = {"verified": list(inspection.verify(found))} if flags.verify else {}
        print(json.dumps({**found, **verified}, indent=2))
        return 0
    print(inspection.describe(found))
    for part in inspection.verify(found) if flags.verify else ():
        print(inspection.describe_verified(part), flush=True)
    return 0


def size(arguments: list[str]) -> int:
    """Choose a size, or look at one."""
    parser = make_parser(
        "size",
        """\
        Which size to train: from a budget (--flops, or --budget_hours on --devices of a --device), a number of
        --tokens or of --parameters, or two of them; what is left open follows from published scaling laws, each named.
        Or, with --config, what a config's model is made of: parameters by part, FLOPs per token, memory by remat
        policy. Nothing is trained.""",
        "llmjax size --budget_hours=24 --device=v5e --devices=8\n  llmjax size --config=llama:8B",
    )
    from llmjax.plan.devices import NAMES

    parser.add_argument("--flops", type=float, help="arithmetic to spend, such as 1e21")
    parser.add_argument("--budget_hours", type=float, help="the same as hours of --devices")
    parser.add_argument("--tokens", type=float, help="tokens to train on, such as 20e9")
    parser.add_argument("--parameters", type=float, help="size of the model, such as 1.3e9")
    parser.add_argument("--device", default="v5e", help=f"one of {', '.join(NAMES)} (default v5e; here: this machine)")
    parser.add_argument("--devices", type=int_range(1), default=8, help="for --budget_hours (default 8)")
    parser.add_argument("--mfu", type=float, default=0.4, help="part of the peak that training reaches (default 0.4)")
    parser.add_argument("--seq_len", type=int_range(1), default=2048, help="tokens in a row (default 2048)")
    parser.add_argument("--config", metavar="FILE[:SIZE]", help="look at this config instead")
    parser.add_argument("--vocab_size", type=int_range(1), help="for --config (default: its tokenizer's)")
    flags, overrides = parse(parser, arguments)
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


VERBS: dict[str, Callable[[list[str]], int]] = {
    "curate": curate,
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
    "configs": configs,
}
