"""`llmjax size`: choose a model size for a budget, or describe one."""

import argparse

from llmjax.cli.flags import int_range, make_parser, number, parse, parse_workdir
from llmjax.errors import UserError


def size(arguments: list[str]) -> int:
    """Choose a model size, or describe one."""
    parser = make_parser(
        "size",
        """\
        Choose a model size for a budget. Give one or two of: FLOPs (--flops, or --budget_hours on --devices of a
        --device), --tokens, --parameters. The rest follows from published scaling laws, which the output names.
        With --config, describe the model of a config: parameters by part, FLOPs per token, memory by remat policy.
        Nothing is trained, except with --reduce: start large, and shrink while the score holds. It trains the model of
        --config, then ever smaller ones on the same tokens, until the validation loss has risen by more than
        --max_loss_increase, and names the smallest within it. The same command resumes it.""",
        "llmjax size --budget_hours=24 --device=v5e --devices=8\n  llmjax size --config=llama:8B --vocab_size=128256\n"
        "  llmjax size --reduce --config=quickstart --workdir=runs/reduce --max_loss_increase=0.02",
    )
    from llmjax.plan.devices import NAMES

    parser.add_argument("--flops", type=number, help="floating-point operations of the budget, such as 1e21")
    parser.add_argument("--budget_hours", type=number, help="the budget as hours on --devices")
    parser.add_argument("--tokens", type=number, help="tokens to train on, such as 20e9")
    parser.add_argument("--parameters", type=number, help="size of the model, such as 1.3e9")
    parser.add_argument(
        "--device", default="v5e", help=f"one of {', '.join(NAMES)} (default v5e; `here` is this machine)"
    )
    parser.add_argument("--devices", type=int_range(1), default=8, help="devices for --budget_hours (default 8)")
    parser.add_argument("--mfu", type=number, default=0.4, help="model FLOPs utilisation, 0 to 1 (default 0.4)")
    parser.add_argument("--seq_len", type=int_range(1), default=2048, help="tokens in a row (default 2048)")
    parser.add_argument(
        "--config", metavar="NAME[:SIZE]", help="describe the model of this config: a name or a Python file"
    )
    parser.add_argument(
        "--vocab_size",
        type=int_range(1),
        help="vocabulary for --config (default: data.tokenizer.vocab_size of the config)",
    )
    parser.add_argument("--reduce", action="store_true", help="train smaller and smaller models of --config")
    parser.add_argument("--workdir", metavar="DIR", help="where the runs of --reduce go")
    parser.add_argument(
        "--max_loss_increase", type=number, default=0.02, help="nats per target, for --reduce (default 0.02)"
    )
    parser.add_argument("--rungs", type=int_range(1, 20), default=4, help="smaller models of --reduce (default 4)")
    flags, overrides = parse(parser, arguments)
    if flags.reduce:
        return _reduce(flags, overrides)
    if flags.workdir:
        raise UserError(f"--workdir={flags.workdir}: only --reduce trains; add --reduce, or leave it out")
    from llmjax.plan import budget, devices, size as sizes

    device = devices.find(flags.device)
    if not 0 < flags.mfu <= 1:
        raise UserError(f"--mfu={flags.mfu}: must be above 0 and at most 1")
    if flags.config:
        for name in ("flops", "budget_hours", "tokens", "parameters"):
            if getattr(flags, name) is not None:
                raise UserError(f"--{name} chooses a size and --config describes one: set only one of them")
        config = sizes.resolve(flags.config, flags.vocab_size, tuple(overrides))
        print("\n".join(sizes.describe_config(config, flags.config, device)))
        return 0
    if overrides:
        raise UserError(f"--config.{overrides[0][0]}: needs --config, whose field it sets")
    flops = flags.flops
    if flags.budget_hours is not None:
        if flops is not None:
            raise UserError("--flops and --budget_hours both set the FLOPs: set only one of them")
        flops = flags.budget_hours * 3600 * flags.devices * device.peak * flags.mfu
    choice = budget.choose(flops=flops, tokens=flags.tokens, parameters=flags.parameters)
    print("\n".join(sizes.describe_budget(choice, device, mfu=flags.mfu, seq_len=flags.seq_len)))
    return 0


def _reduce(flags: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    for name in ("flops", "budget_hours", "tokens", "parameters", "vocab_size"):
        if getattr(flags, name) is not None:
            raise UserError(f"--{name} has no meaning with --reduce, which trains the model of --config: leave it out")
    for name in ("config", "workdir"):
        if not getattr(flags, name):
            raise UserError(f"--{name} is missing: --reduce trains the model of a config in a folder; set it")
    workdir = parse_workdir(flags.workdir)
    from llmjax.plan import reduce

    lines = reduce.reduce(
        flags.config, overrides, workdir, max_loss_increase=flags.max_loss_increase, count=flags.rungs
    )
    print("\n".join(lines))
    return 0
