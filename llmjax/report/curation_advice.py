"""Suggestions on the data card: which setting to change, given the numbers."""

from typing import Any

from llmjax.curate.readers.warc import NO_PAGE
from llmjax.report.markup import count

_JUDGING = ("read", "extract", "normalise", "language", "quality")  # stages that may be wrong about a good text
_NOT_GIVEN = "not given"
# Where a stage has no section of settings of its own.
_SECTIONS = {"read": "inputs.NAME"}
# A rule's name says which bound to change; these reasons are governed by other fields.
_FIELDS = {
    "exact duplicate": "duplicates.exact",
    "near duplicate": "duplicates.similarity",
    "language uncertain": "language.min_confidence",
    "no line left": "quality.c4_policy",
    "no main text": "inputs.NAME.content",
}


def suggest(report: dict[str, Any]) -> list[str]:
    """Settings that may need a change, each with the number that says so."""
    advice, num_records = [], max(report["records"]["documents"], 1)
    for stage in report["stages"]:
        for one in stage["dropped"]:
            judged = stage["stage"] in _JUDGING and not one["reason"].startswith(NO_PAGE)
            if one["documents"] > 0.05 * num_records and judged:
                advice.append(
                    f"{one['documents'] / num_records:.0%} of all documents went in "
                    f"{stage['stage'].replace('_', ' ')} for “{one['reason']}”. "
                    f"If its samples below are good text, change {_field(stage['stage'], one)}."
                )
    for name, one in report["sources"].items():
        before = one["given"]["documents"]
        if before and one["documents"] < 0.2 * before:
            _, stage, reason = max(
                ((r["by_source"].get(name, 0), s["stage"], r) for s in report["stages"] for r in s["dropped"]),
                key=lambda item: item[0],
            )
            ask = ": are its text field and format right?" if stage in _JUDGING else "."
            advice.append(
                f"Of {name}, {count(one['documents'])} of {count(before)} documents stay; most went in "
                f"{stage.replace('_', ' ')} for “{reason['reason']}”{ask}"
            )
        if len(report["sources"]) > 1 and one["tokens"] > 0.8 * max(report["kept"]["tokens"], 1):
            advice.append(
                f"{one['tokens'] / report['kept']['tokens']:.1%} of all tokens are of {name}: "
                "curate.inputs.NAME.weight and .max_tokens balance the inputs."
            )
    if "decontaminate" in report["config"]["stages"] and not report["config"]["decontaminate"]["against"]:
        advice.append("No evaluation set was looked for: name their files in curate.decontaminate.against.")
    if report["personal_data"].get("action") == "count" and report["personal_data"]["kinds"]:
        advice.append("Personal data are still in the text: curate.personal_data.action='replace' hides them.")
    missing = report["licences"].get(_NOT_GIVEN, 0)
    if missing:
        which = "All documents" if missing == report["kept"]["documents"] else f"{count(missing)} documents"
        advice.append(f"{which} have no licence: set curate.inputs.NAME.licence, or carry a field named licence.")
    if not report["kept"]["documents"]:
        advice.insert(0, "Nothing stays.")
    return advice


def _field(stage: str, dropped: dict[str, Any]) -> str:
    """The setting that a reason hangs on, as it is written on the command line."""
    reason = dropped["reason"]
    if stage == "quality" and "_" in reason:
        return f"curate.quality.{reason}"
    if stage == "language" and reason.startswith("language ") and reason not in _FIELDS:
        return "curate.language.keep"
    return f"curate.{_FIELDS.get(reason) or _SECTIONS.get(stage, stage)}"
