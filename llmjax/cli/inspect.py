"""`llmjax inspect`: the checkpoints, fingerprints and config of a run."""

import json

from llmjax.cli.flags import make_parser, parse_workdir


def inspect(arguments: list[str]) -> int:
    """Show a run."""
    parser = make_parser(
        "inspect",
        """\
        Show a run's checkpoints, their fingerprints and data states, and its config. --verify also reads the whole
        token store and verifies every checksum: damage ends the command with one line and exit status 78.""",
        "llmjax inspect --workdir=runs/mine --json",
        overrides=False,
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a run")
    parser.add_argument("--json", action="store_true", help="print JSON, oldest checkpoint first")
    parser.add_argument("--verify", action="store_true", help="verify every checksum of the token store")
    flags = parser.parse_args(arguments)
    from llmjax.run import inspection

    run = inspection.inspect(parse_workdir(flags.workdir))
    if flags.json:
        verified = {"verified": list(inspection.verify(run))} if flags.verify else {}
        print(json.dumps({**run, **verified}, indent=2))
        return 0
    if flags.verify:
        for part in inspection.verify(run):
            print(inspection.describe_verified(part), flush=True)
    print(inspection.describe(run))
    return 0
