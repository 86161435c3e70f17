"""`llmjax card`: the model card of a checkpoint, from the files of its run."""

import os
import pathlib

from llmjax.cli.flags import int_range, make_parser, parse_workdir
from llmjax.errors import UserError


def card(arguments: list[str]) -> int:
    """Write the model card of a checkpoint."""
    parser = make_parser(
        "card",
        """\
        Write a model card in the Hugging Face layout: metadata, then model, data, personal data, training, evaluation
        with intervals, bias, limits, cost and energy, and how to use the model. It has what the files of the run know,
        and says "not recorded" for the rest, with the command that records it. `llmjax export` puts a card into the
        folder that it writes; where you edited WORKDIR/README.md, it takes that one.

        The license, languages and prices are in the section report of the run's config:
        `llmjax train --workdir=DIR --config.report.license=apache-2.0` sets one, also after training.""",
        "llmjax card --workdir=runs/mine",
        overrides=False,
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a run")
    parser.add_argument("--out", metavar="FILE", help="the card (default WORKDIR/README.md)")
    parser.add_argument("--step", type=int_range(0), help="the checkpoint (default: the newest)")
    flags = parser.parse_args(arguments)
    workdir = parse_workdir(flags.workdir)
    path = workdir / "README.md" if flags.out is None else pathlib.Path(os.path.expanduser(flags.out))
    if path.is_dir():
        raise UserError(f"--out={flags.out}: this is a folder; give the file to write, such as README.md")
    from llmjax.interop import exporting
    from llmjax.models import registry
    from llmjax.report import model_card
    from llmjax.run import loading, workdir as workdirs

    config = loading.read_config(workdir)
    try:
        preferred = (workdirs.read_json(workdir / workdirs.IMPORT) or {}).get("architecture")
        name = exporting.choose_class(registry.without_adapters(config.model), preferred)[0]
    except UserError:
        name = ""  # no class of transformers has this model, so the card names none
    text = model_card.make_card(workdir, step=flags.step, transformers_class=name)
    model_card.write(path, text)
    count = text.lower().count("not recorded")
    print(f"written to {path}; {count} places say what is not recorded")
    print(f"next: edit {path}, then llmjax export --workdir={flags.workdir} --to=exports/{workdir.name}")
    return 0
