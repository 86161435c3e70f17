"""The corpora of `llmjax curate` that a run was trained on, for its model card."""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

from llmjax.errors import UserError
from llmjax.run import workdir as workdirs

_GLOB = "*?[{"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A source of a run that `llmjax curate` wrote. `report` is the content of its report.json."""

    source: str
    report: Mapping[str, Any]


def find_corpora(config: Mapping[str, Any]) -> Sequence[Corpus]:
    """The corpora of the sources in a run's config, by the report.json above the files of data.sources.NAME.path.

    A corpus that was moved or removed since is not found.
    """
    sources = (config.get("data") or {}).get("sources") or {}
    found = ((name, _read_report(source.get("path", ""))) for name, source in sources.items())
    return [Corpus(name, report) for name, report in found if report is not None]


def _read_report(path: str) -> Mapping[str, Any] | None:
    """The report of the corpus whose files a path or glob names; None where there is none."""
    if not path or "://" in path or path.startswith(("stdlib:", "tfds:")):
        return None
    parts = pathlib.Path(path).expanduser().parts
    fixed = next((number for number, part in enumerate(parts) if set(part) & set(_GLOB)), len(parts))
    folder = pathlib.Path(*parts[:fixed])
    for candidate in (folder, *list(folder.parents)[:2]):  # WORKDIR, WORKDIR/curated, WORKDIR/curated/FILE
        try:
            report = workdirs.read_json(candidate / workdirs.REPORT_JSON)
        except UserError:
            continue
        if report is not None and {"records", "kept", "personal_data", "config"} <= report.keys():
            return report
    return None
