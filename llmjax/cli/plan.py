"""`llmjax plan`: what a config's step needs, moves and takes on a machine that need not be present."""

import argparse
import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from llmjax.cli.flags import int_range, make_parser, number, parse, parse_workdir
from llmjax.errors import UserError

if TYPE_CHECKING:
    from etils import epath

    from llmjax.plan.plan import Plan
    from llmjax.plan.topology import Topology
    from llmjax.run.config import RunConfig


def plan(arguments: list[str]) -> int:
    """Compile the step for a machine and print what it needs."""
    parser = make_parser(
        "plan",
        """\
        Compile the train step of a config for a machine, with the machine's own compiler, and print: does it fit, the
        FLOPs it executes, the bytes it sends, the predicted time of a step, and what a run costs. Nothing is trained
        and no TPU is needed; for TPUs, `pip install 'llmjax[plan]'`. All figures are of one device and one step.

        --quick stops at the optimized program, after seconds: memory, FLOPs and bytes are those of the full depth, and
        the time is estimated from them. The full depth lets the compiler finish, which takes minutes for a large model,
        and adds up the cycles that it expects of each instruction.""",
        "llmjax plan --config=llama:8B --topology=v6e:16x16 --quick --config.model.vocab_size=128256 "
        "--tokens=15e12 --price=1.2",
    )
    parser.add_argument("--config", metavar="NAME[:SIZE]", required=True, help="a name of `llmjax configs`, or a file")
    parser.add_argument(
        "--topology",
        required=True,
        metavar="CHIP:AxB",
        help="v4, v5e, v5p, v6e or tpu7x with the shape of a slice, such as v6e:16x16 or v5p:4x4x4; cpu or "
        "cpu:DEVICES; gpu (those of this machine)",
    )
    parser.add_argument("--slices", type=int_range(1), default=1, help="TPU slices of that shape (default 1)")
    parser.add_argument("--quick", action="store_true", help="stop at the optimized program")
    parser.add_argument("--tokens", type=number, help="tokens of a run, such as 15e12: time, chip-hours, energy, CO2")
    parser.add_argument(
        "--price", type=number, help="of a chip and hour, in any currency; needs --tokens, or a config with phases"
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="try mesh shapes, remat policies and microbatches; print the best of time against memory as overrides",
    )
    parser.add_argument(
        "--search_minutes", type=number, default=10, help="start no further layout after these (default 10)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line of the standard output")
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        help="keep the plan in DIR/plan.json, for the report of the run there",
    )
    parser.add_argument("--dump", metavar="DIR", help="keep the program: optimized.txt, in full depth scheduled.txt")
    flags, overrides = parse(parser, arguments)
    _check(flags)
    workdir = None if flags.workdir is None else parse_workdir(flags.workdir)
    from llmjax.plan import describe, plan as plans, topology as topologies, tree_cost
    from llmjax.run import config as run_config

    topology = topologies.parse(flags.topology, flags.slices)
    config = run_config.resolve(flags.config, overrides)
    if flags.price is not None and flags.tokens is None and not config.phases:
        raise UserError(f"--price={flags.price:g}: give --tokens as well, whose cost it sets")
    plans.check_vocabulary(config, flags.config)
    topologies.check_installed(topology)
    if flags.slices > 1 and config.mesh.slice == 1:
        config = run_config.with_fields(config, [("mesh.slice", flags.slices)])
    if config.phases:
        return _plan_phases(config, topology, flags)
    result, lines, extra = _make_plan(config, topology, flags)
    default = None
    if result.tree is not None:  # the same step with the default reduction, to compare with
        fields = [("parallel.reduction", "xla"), ("parallel.virtual_shards", 0)]
        default = plans.make_plan(run_config.with_fields(result.config, fields), topology, quick=flags.quick)
    if flags.dump:
        _dump(pathlib.Path(flags.dump).expanduser(), result.program)
    lines += describe.describe(result, flags.config)
    output = result.to_json() | extra
    if result.tree is not None and default is not None:
        lines += ["", *tree_cost.describe(result.tree, topology.chip, result.step_seconds, default.step_seconds)]
        output["fixed_tree"] |= {"default_step_seconds": default.step_seconds}
    if flags.tokens:
        cost = describe.cost_of_run(result, flags.tokens, flags.price)
        lines += describe.describe_run(result, flags.tokens, cost)
        output["run"] = None if cost is None else cost.to_json()
    if workdir is not None:
        _keep(workdir, output)
    print("\n".join(lines), file=sys.stderr if flags.json else sys.stdout, flush=True)
    if flags.json:
        print(json.dumps(output))
    return 0


def _plan_phases(config: "RunConfig", topology: "Topology", flags: argparse.Namespace) -> int:
    """The plan of each phase that has steps of its own shape, and the cost of all steps."""
    from llmjax.plan import describe, plan as plans
    from llmjax.run import config as run_config, phases

    for name in ("tokens", "search", "workdir"):
        if getattr(flags, name):
            raise UserError(
                f"--{name}={getattr(flags, name)}: not with a config of phases, whose steps are planned one after "
                "another; leave it out"
            )
    if config.model.remat == "auto":
        remat = _make_plan(phases.largest_config(config), topology, flags)[0].config.model.remat
        config = run_config.with_fields(config, [("model.remat", remat)])
    made: dict[tuple[int, int], Plan] = {}
    lines, costs, output = [], [], {}
    for phase in phases.split(config):
        key = phase.rows, phase.batch
        lines += [*([""] if lines else []), str(phase)]
        if key in made:
            lines.append("its steps are those of an earlier phase")
        else:
            made[key] = plans.make_plan(phase.steps, topology, quick=flags.quick)
            lines += describe.describe(made[key], flags.config)
            if flags.dump:
                _dump(pathlib.Path(flags.dump).expanduser() / phase.name, made[key].program)
        tokens = (phase.last - phase.first) * made[key].step_tokens
        costs.append((tokens, describe.cost_of_run(made[key], tokens, flags.price)))
        output[phase.name] = made[key].to_json() | {"first_step": phase.first + 1, "last_step": phase.last}
    total = describe.add_costs([cost for _, cost in costs])
    first = next(iter(made.values()))
    lines += describe.describe_run(first, sum(tokens for tokens, _ in costs), total)
    print("\n".join(lines), file=sys.stderr if flags.json else sys.stdout, flush=True)
    if flags.json:
        print(json.dumps({"phases": output, "run": None if total is None else total.to_json()}))
    return 0


def _make_plan(
    config: "RunConfig", topology: "Topology", flags: argparse.Namespace
) -> tuple["Plan", list[str], dict[str, Any]]:
    """The plan, of the best layout with --search; lines to print before it, and what --json adds to it."""
    from llmjax.plan import plan as plans, remat_choice, search

    lines: list[str] = []
    extra: dict[str, Any] = {}
    if flags.search:
        candidates = search.search(config, topology, quick=flags.quick, seconds=60 * flags.search_minutes)
        extra = {"overrides": dict(candidates[0].overrides)}
        return candidates[0].plan, [*search.describe(candidates, flags.config), ""], extra
    if config.model.remat == "auto":
        choice = remat_choice.choose_remat(config, topology)
        lines, extra = [*choice.describe(), ""], {"remat": choice.to_json()}
        if flags.quick:
            return choice.plan, lines, extra
        config = choice.plan.config
    return plans.make_plan(config, topology, quick=flags.quick), lines, extra


def _check(flags) -> None:
    for name in ("tokens", "price", "search_minutes"):
        value = getattr(flags, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name}={value:g}: must be above 0")
    if flags.dump and pathlib.Path(flags.dump).expanduser().is_file():
        raise UserError(f"--dump={flags.dump}: this is a file; give a folder")


def _keep(workdir: "epath.Path", output: dict[str, Any]) -> None:
    """Write the plan into a workdir, and the report of the run that is there, if any."""
    from llmjax import report
    from llmjax.run import workdir as workdirs

    workdir.mkdir(parents=True, exist_ok=True)
    workdirs.write_json(workdir / workdirs.PLAN, output)
    if (workdir / workdirs.METRICS).exists():
        report.write_report(workdir)


def _dump(folder: pathlib.Path, program) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("optimized", "scheduled"):
        if text := getattr(program, name):
            (folder / f"{name}.txt").write_text(text)
