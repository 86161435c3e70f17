"""Suggestions on the data card: settings to change, derived from the numbers."""

from typing import Any

from llmjax.curate.document import NOT_STATED
from llmjax.curate.readers.warc import NO_PAGE
from llmjax.report.markup import format_count

_FALLIBLE_STAGES = ("read", "extract", "normalise", "language", "quality")  # they may drop good texts
_SECTIONS = {"read": "inputs.NAME"}  # config sections that are not named like their stage
# Reasons that are not named like the setting that causes them.
_FIELDS = {
    "exact duplicate": "duplicates.exact",
    "near duplicate": "duplicates.similarity",
    "language uncertain": "language.min_confidence",
    "all lines removed": "quality.c4_remove_policy",
    "no main text": "inputs.NAME.content",
}


def suggest(report: dict[str, Any]) -> list[str]:
    """Suggestions for the user; [] if the numbers give no cause."""
    advice = _advise_on_rejections(report) + _advise_on_sources(report)
    if "decontaminate" in report["config"]["stages"] and not report["config"]["decontaminate"]["against"]:
        advice.append("No evaluation set was given: list their files in curate.decontaminate.against.")
    if report["personal_data"].get("action") == "count" and report["personal_data"]["kinds"]:
        advice.append("Personal data are still in the text: curate.personal_data.action='replace' replaces them.")
    missing = report["licences"].get(NOT_STATED, 0)
    if missing:
        subject = "All documents" if missing == report["kept"]["documents"] else f"{format_count(missing)} documents"
        advice.append(
            f"{subject} have no licence: set curate.inputs.NAME.licence, or add a field `licence` to the records."
        )
    return advice if report["kept"]["documents"] else ["No document was kept.", *advice]


def _advise_on_rejections(report: dict[str, Any]) -> list[str]:
    """For reasons that rejected more than 5% of all documents."""
    advice, total = [], max(report["records"]["documents"], 1)
    for stage in report["stages"]:
        for dropped in stage["dropped"]:
            reason, share = dropped["reason"], dropped["documents"] / total
            if share > 0.05 and stage["stage"] in _FALLIBLE_STAGES and not reason.startswith(NO_PAGE):
                advice.append(
                    f"{share:.0%} of all documents were dropped in {stage['stage'].replace('_', ' ')} for “{reason}”. "
                    f"If its samples below are good text, change {_find_config_field(stage['stage'], reason)}."
                )
    return advice


def _advise_on_sources(report: dict[str, Any]) -> list[str]:
    """For inputs of which less than 20% of the documents are kept, or that have more than 80% of all tokens."""
    advice = []
    for name, source in report["sources"].items():
        num_records, num_kept = source["records"]["documents"], source["kept"]["documents"]
        if num_records and num_kept < 0.2 * num_records:
            _, stage, dropped = max(
                ((d["by_source"].get(name, 0), s["stage"], d) for s in report["stages"] for d in s["dropped"]),
                key=lambda item: item[0],
            )
            hint = ": are its text field and format correct?" if stage in _FALLIBLE_STAGES else "."
            advice.append(
                f"Of {name}, {format_count(num_kept)} of {format_count(num_records)} documents are kept; most were "
                f"dropped in {stage.replace('_', ' ')} for “{dropped['reason']}”{hint}"
            )
        if len(report["sources"]) > 1 and source["kept"]["tokens"] > 0.8 * max(report["kept"]["tokens"], 1):
            share = source["kept"]["tokens"] / report["kept"]["tokens"]
            advice.append(
                f"{share:.1%} of all tokens are from {name}: "
                "curate.inputs.NAME.weight and .max_tokens balance the inputs."
            )
    return advice


def _find_config_field(stage: str, reason: str) -> str:
    """The setting that causes a reason, as on the command line."""
    if stage == "quality" and "_" in reason:
        return f"curate.quality.{reason}"
    if stage == "language" and reason.startswith("language ") and reason not in _FIELDS:
        return "curate.language.keep"
    return f"curate.{_FIELDS.get(reason) or _SECTIONS.get(stage, stage)}"
