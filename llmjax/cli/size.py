"""`llmjax size`: choose a model size for a budget, or describe one."""

from llmjax.cli.flags import int_range, make_parser, number, parse
from llmjax.errors import UserError


def size(arguments: list[str]) -> int:
    """Choose a model size, or describe one."""
    parser = make_parser(
        "size",
        """\
        Choose a model size for a budget. Give one or two of: FLOPs (--flops, or --budget_hours on --devices of a
        --device), --tokens, --parameters. The rest follows from published scaling laws, which the output names.
        With --config, describe the model of a config: parameters by part, FLOPs per token, memory by remat policy.
        Nothing is trained.""",
        "llmjax size --budget_hours=24 --device=v5e --devices=8\n  llmjax size --config=llama:8B",
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
    parser.add_argument("--config", metavar="FILE[:SIZE]", help="describe the model of this config")
    parser.add_argument("--vocab_size", type=int_range(1), help="vocabulary for --config (default: its tokenizer's)")
    flags, overrides = parse(parser, arguments)
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
