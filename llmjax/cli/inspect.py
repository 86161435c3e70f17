"""`llmjax inspect`: the checkpoints, fingerprints and config of a run."""

import json

from llmjax.cli.flags import make_parser, parse_workdir


def inspect(arguments: list[str]) -> int:
    """Look at a run."""
    parser = make_parser(
        "inspect",
        """\
        Show a run's checkpoints, their fingerprints and data states, and its config. --verify also reads the whole
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
