"""`llmjax compare`: the configs, scores, costs and answers of several runs, with paired tests."""

import os
import typing

from llmjax.cli.flags import make_parser
from llmjax.errors import UserError

if typing.TYPE_CHECKING:
    from etils import epath


def compare(arguments: list[str]) -> int:
    """Compare runs."""
    parser = make_parser(
        "compare",
        """\
        Compare two or more runs, and write one HTML page: the config fields that differ, training loss and scores on
        one plot, every score that two runs have with its 95% interval, and what each run cost.

        On each task of `llmjax eval --tasks`, every run is compared with the first one that has the task, example by
        example: the difference with its paired bootstrap interval, a p-value, and the examples where one run is right
        and the other wrong. The test is exact McNemar for scores that are 0 or 1, random sign flips for other means,
        and the bootstrap for correlations; p-values are corrected for all tests by Holm's method. Both runs need the
        same file, prompt and shots. Put the run that others must beat first.

        Reads the newest scores of each run; no model is loaded.""",
        "llmjax compare runs/baseline runs/improved --output=compare.html",
        overrides=False,
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="workdirs of two or more runs")
    parser.add_argument("--output", default="compare.html", metavar="FILE", help="the page (default compare.html)")
    flags = parser.parse_args(arguments)
    output = _parse_output(flags.output)
    from etils import epath

    from llmjax.report import compare_page, comparison, comparison_text

    result = comparison.compare([epath.Path(os.path.expanduser(run)) for run in flags.runs])
    compare_page.write_page(result, output)
    print(comparison_text.describe(result, output))
    return 0


def _parse_output(text: str) -> "epath.Path":
    from etils import epath

    path = epath.Path(os.path.expanduser(text))
    if not text or path.is_dir():
        raise UserError(f"--output={text}: {'this is a folder' if text else 'empty'}; give the HTML file to write")
    if not path.parent.is_dir():
        raise UserError(f"--output={text}: there is no folder {path.parent}; make it, or give another path")
    return path
