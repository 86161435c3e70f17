"""Suggestions on the data card: which setting to change, given the numbers."""

from typing import Any

from llmjax.curate.readers.warc import NO_PAGE
from llmjax.report.markup import count

_STAGES_THAT_JUDGE = ("read", "extract", "normalise", "language", "quality")  # they may be wrong about a good text
_NO_LICENCE = "not given"
_SECTIONS = {"read": "inputs.NAME"}  # the settings of a stage, if not in a section of its name
# A reason is the name of the setting that causes it, except for these.
_FIELDS = {
    "exact duplicate": "duplicates.exact",
    "near duplicate": "duplicates.similarity",
    "language uncertain": "language.min_confidence",
    "no line left": "quality.c4_policy",
    "no main text": "inputs.NAME.content",
}


def of(report: dict[str, Any]) -> list[str]:
    """What the user may want to change; [] if no number of the report suggests it."""
    advice = _rejection_advice(report) + _source_advice(report)
    if "decontaminate" in report["config"]["stages"] and not report["config"]["decontaminate"]["against"]:
        advice.append("No evaluation set was looked for: name their files in curate.decontaminate.against.")
    if report["personal_data"].get("action") == "count" and report["personal_data"]["kinds"]:
        advice.append("Personal data are still in the text: curate.personal_data.action='replace' hides them.")
    missing = report["licences"].get(_NO_LICENCE, 0)
    if missing:
        which = "All documents" if missing == report["kept"]["documents"] else f"{count(missing)} documents"
        advice.append(f"{which} have no licence: set curate.inputs.NAME.licence, or carry a field named licence.")
    return advice if report["kept"]["documents"] else ["No document was kept.", *advice]


def _rejection_advice(report: dict[str, Any]) -> list[str]:
    """For reasons that rejected more than 5% of all documents."""
    advice, total = [], max(report["records"]["documents"], 1)
    for stage in report["stages"]:
        for dropped in stage["dropped"]:
            reason, share = dropped["reason"], dropped["documents"] / total
            if share > 0.05 and stage["stage"] in _STAGES_THAT_JUDGE and not reason.startswith(NO_PAGE):
                advice.append(
                    f"{share:.0%} of all documents were dropped in {stage['stage'].replace('_', ' ')} for “{reason}”. "
                    f"If its samples below are good text, change {_field(stage['stage'], reason)}."
                )
    return advice


def _source_advice(report: dict[str, Any]) -> list[str]:
    """For inputs that keep less than 20% of their documents, or that have more than 80% of all tokens."""
    advice = []
    for name, source in report["sources"].items():
        read = source["given"]["documents"]
        if read and source["documents"] < 0.2 * read:
            _, stage, dropped = max(
                ((d["by_source"].get(name, 0), s["stage"], d) for s in report["stages"] for d in s["dropped"]),
                key=lambda item: item[0],
            )
            question = ": are its text field and format right?" if stage in _STAGES_THAT_JUDGE else "."
            advice.append(
                f"Of {name}, {count(source['documents'])} of {count(read)} documents are kept; most were dropped in "
                f"{stage.replace('_', ' ')} for “{dropped['reason']}”{question}"
            )
        if len(report["sources"]) > 1 and source["tokens"] > 0.8 * max(report["kept"]["tokens"], 1):
            advice.append(
                f"{source['tokens'] / report['kept']['tokens']:.1%} of all tokens are from {name}: "
                "curate.inputs.NAME.weight and .max_tokens balance the inputs."
            )
    return advice


def _field(stage: str, reason: str) -> str:
    """The setting that causes a reason, as it is written on the command line."""
    if stage == "quality" and "_" in reason:
        return f"curate.quality.{reason}"
    if stage == "language" and reason.startswith("language ") and reason not in _FIELDS:
        return "curate.language.keep"
    return f"curate.{_FIELDS.get(reason) or _SECTIONS.get(stage, stage)}"
