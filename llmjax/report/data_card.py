"""The data card of `llmjax curate`, rendered from report.json."""

from collections.abc import Iterable, Iterator
import json
from typing import Any

from llmjax.report import curation_advice
from llmjax.report.markup import (
    chart_grid,
    collapsed,
    definition_list,
    escape,
    excerpt,
    facts_and_chart,
    format_count,
    format_number,
    html_page,
    section,
    table,
)
from llmjax.report.plot import Bar, draw_bars

_MAX_BARS, _MAX_REASONS = 14, 12  # in a chart
_REPAIR_LABELS = {
    "nfc": "Unicode composition (NFC)",
    "control": "control characters",
    "zero_width": "zero-width characters",
    "spaces": "Unicode spaces",
    "cut off": "truncated files, read up to the damage",
}
_ACTION_LABELS = {
    "replace": "replaced by placeholders",
    "drop": "a reason to drop the document",
    "count": "only counted",
}


def format_summary(report: dict[str, Any]) -> Iterator[str]:
    """A summary of the card for a terminal."""
    records, kept = report["records"], report["kept"]
    yield ""
    yield f"{'stage':<15}{'documents in':>14}{'dropped':>10}{'out':>12}{'MB out':>10}   main reasons"
    for stage in report["stages"]:
        num_in, num_out, mb_out = stage["in"]["documents"], stage["out"]["documents"], stage["out"]["bytes"] / 1e6
        reasons = [f"{entry['reason']} {entry['documents']:,}" for entry in stage["dropped"]]
        num_more = len(reasons) - 3
        more = f", and {num_more} more reason{'s' if num_more > 1 else ''}" if num_more > 0 else ""
        line = f"{stage['stage']:<15}{num_in:>14,}{num_in - num_out:>10,}{num_out:>12,}{mb_out:>10,.1f}"
        yield f"{line}   {', '.join(reasons[:3])}{more}".rstrip()
    if kinds := report["personal_data"].get("kinds"):
        occurrences = ", ".join(f"{entry['occurrences']:,} {kind}" for kind, entry in sorted(kinds.items()))
        yield f"personal data: {occurrences} ({_ACTION_LABELS[report['personal_data']['action']]})"
    for name, entry in report["contamination"].items():
        if entry["documents"]:
            yield f"contamination: {_format_documents(entry)} with {entry['occurrences']:,} n-grams of {name}"
    if not kept["documents"]:
        yield (
            f"no document is kept of {records['documents']:,}; report.html shows samples with the reasons"
            if records["documents"]
            else "no document is kept: the inputs are empty"
        )
        return
    splits = ", ".join(f"{name} {amount['documents']:,}" for name, amount in report["splits"].items())
    yield (
        f"{kept['documents']:,} of {records['documents']:,} documents are kept ({_format_share(kept, records)}), "
        f"{kept['bytes'] / 1e6:,.1f} MB, about {kept['tokens']:,} tokens{f': {splits}' if splits else ''}"
    )


def render_page(report: dict[str, Any]) -> str:
    """The card as an HTML page without external resources."""
    parts = (
        _render_header,
        _render_headline,
        _render_advice,
        _render_reasons,
        _render_stages,
        _render_sources,
        _render_lengths_and_languages,
        _render_duplicates,
        _render_contamination,
        _render_personal_data,
        _render_terms,
        _render_files,
    )
    return html_page("Data card", "\n".join(filter(None, (render(report) for render in parts))))


def _format_documents(amount: dict[str, Any]) -> str:
    return f"{amount['documents']:,} document{'' if amount['documents'] == 1 else 's'}"


def _format_share(part: dict, total: dict, field: str = "documents") -> str:
    return _format_percent(part[field], total[field]) or "none"


def _format_percent(part: float, total: float) -> str:
    """A percentage, "" for a total of 0. A small part is not rounded to none, nor a large one to all."""
    if not total:
        return ""
    share = part / total
    if 0 < share < 0.001:
        return "<0.1%"
    return ">99.9%" if 0.999 < share < 1 else f"{share:.1%}"


def _label(name: str) -> str:
    return name.replace("_", " ")


def _format_bytes(size: float) -> str:
    """312 bytes, 4.2 kB, 12.7 MB, 3.1 GB."""
    for minimum, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= minimum:
            return f"{size / minimum:,.1f} {unit}"
    return f"{size:,.0f} bytes"


def _render_header(report: dict[str, Any]) -> str:
    names = list(report["sources"])
    listed = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    subtitle = f"{len(names)} input{'' if len(names) == 1 else 's'}: {listed} · llmjax {report['version']}"
    return f"<header><h1>Data card</h1><p>{escape(subtitle)}</p></header>"


def _render_headline(report: dict[str, Any]) -> str:
    records, kept = report["records"], report["kept"]
    num_kept, num_records = format_count(kept["documents"]), format_count(records["documents"])
    facts = [
        (_format_share(kept, records), f"of documents are kept: {num_kept} of {num_records}"),
        (
            format_number(kept["tokens"]),
            f"tokens, {_format_share(kept, records, 'tokens')} of those read, markup included",
        ),
        (_format_bytes(kept["bytes"]), "of text"),
    ]
    rows = [Bar("read", records["documents"])]
    for stage in report["stages"]:
        if stage["dropped"]:
            rows.append(Bar(f"after {_label(stage['stage'])}", stage["out"]["documents"]))
    rows[-1] = Bar(rows[-1].label, rows[-1].value, highlight=True)
    chart = draw_bars(rows, label="documents", unit="number", format_value=format_number)
    return f"<section>{facts_and_chart(facts, 'Documents', chart)}</section>"


def _render_advice(report: dict[str, Any]) -> str:
    advice = curation_advice.suggest(report)
    if not advice:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in advice)
    note = "Change settings with --config.FIELD=VALUE. `llmjax fields curate` explains all fields."
    return section("Suggestions", f'<ul class="advice">{items}</ul>', note=note)


def _render_reasons(report: dict[str, Any]) -> str:
    """A chart of the reasons, and samples of each."""
    title = "Why documents were dropped"
    reasons = sorted((entry for stage in report["stages"] for entry in stage["dropped"]), key=lambda r: -r["documents"])
    if not reasons:
        return section(title, '<p class="missing">No document was dropped.</p>')
    rows = [Bar(entry["reason"], entry["documents"]) for entry in reasons[:_MAX_REASONS]]
    chart = draw_bars(rows, label="documents by reason", unit="number", format_value=format_number, label_width=215)
    is_cut = len(reasons) > _MAX_REASONS
    heading = f"The {_MAX_REASONS} most frequent of {len(reasons)} reasons" if is_cut else "All reasons"
    body = f'<div class="narrow"><h3>{heading}, documents</h3>{chart}</div>'
    for stage in report["stages"]:
        if not stage["dropped"]:
            continue
        num_dropped = sum(entry["documents"] for entry in stage["dropped"])
        body += f"<h3 class='part'>{escape(_label(stage['stage']))}, {format_count(num_dropped)} documents</h3>"
        for entry in stage["dropped"]:
            bound = report["config"]["quality"].get(entry["reason"]) if stage["stage"] == "quality" else None
            name = entry["reason"] if bound is None else f"{entry['reason']} {bound:g}"
            by_source = ", ".join(f"{source} {number:,}" for source, number in entry["by_source"].items())
            size = ""
            if entry["tokens"]:
                size = f", {_format_bytes(entry['bytes'])}, {format_number(entry['tokens'])} tokens"
            samples = "".join(map(_render_sample, entry["samples"]))
            body += collapsed(f"{name}: {_format_documents(entry)}{size} ({by_source})", samples)
    note = "Click on a reason to see up to five samples, selected by a hash. Personal data in them are replaced."
    return section(title, body, note=note)


def _render_stages(report: dict[str, Any]) -> str:
    body = _stage_table((stage["stage"], stage) for stage in report["stages"])
    for name, source in report["sources"].items() if len(report["sources"]) > 1 else ():
        by_stage = _stage_table((stage["stage"], stage["by_source"][name]) for stage in report["stages"])
        num_kept, num_records = (format_count(source[field]["documents"]) for field in ("kept", "records"))
        body += collapsed(f"{name}: {num_kept} of {num_records} documents are kept", by_stage)
    if report["repairs"]:
        rows = [
            (_REPAIR_LABELS.get(name, _label(name)), entry["documents"], entry["occurrences"])
            for name, entry in report["repairs"].items()
        ]
        body += f"<h3 class='part'>Repairs</h3>{table(('Repair', 'documents', 'occurrences'), rows)}"
    note = "Tokens are word pieces and punctuation marks: about the tokens of a vocabulary of 32,000 in English."
    return section("Stages", body, note=note)


def _stage_table(stages: Iterable[tuple[str, dict[str, Any]]]) -> str:
    rows = []
    for name, amounts in stages:
        before, after = amounts["in"], amounts["out"]
        num_dropped = before["documents"] - after["documents"]
        rows.append(
            (
                _label(name),
                before["documents"],
                num_dropped,
                after["documents"],
                _format_percent(num_dropped, before["documents"]),
                before["bytes"],
                after["bytes"],
                before["tokens"],
                after["tokens"],
            )
        )
    head = ("Stage", "documents in", "dropped", "out", "share dropped", "bytes in", "out", "tokens in", "out")
    return table(head, rows)


def _render_sample(sample: dict[str, Any]) -> str:
    text = sample["text"] if len(sample["text"]) < 600 else sample["text"] + " …"
    return excerpt(escape(text) if text.strip() else "(no text)", sample["id"])


def _render_sources(report: dict[str, Any]) -> str:
    sources, splits = report["sources"], report["splits"]
    total_records, total_kept = report["records"]["tokens"], report["kept"]["tokens"]
    rows = []
    for name, source in sources.items():
        records, kept = source["records"], source["kept"]
        rows.append(
            (
                name,
                records["documents"],
                kept["documents"],
                _format_share(kept, records) if records["documents"] else "",
                records["tokens"],
                kept["tokens"],
                _format_percent(records["tokens"], total_records),
                _format_percent(kept["tokens"], total_kept),
            )
        )
    largest = sorted(sources.items(), key=lambda item: -item[1]["kept"]["tokens"])[:_MAX_BARS]
    by_source = [_part_bar(name, source["kept"]["tokens"], source["records"]["tokens"]) for name, source in largest]
    by_split = [Bar(name, amount["tokens"], highlight=True) for name, amount in splits.items()]
    body = _charts([("Kept tokens, of those read", by_source), ("Tokens by split", by_split)])
    head = (
        "Source",
        "documents read",
        "kept",
        "share",
        "tokens read",
        "kept",
        "share of all read",
        "share of all kept",
    )
    body += f"<div class='part'>{table(head, rows)}</div>"
    if splits:
        rows = [(name, one["documents"], one["tokens"]) for name, one in splits.items()]
        body += f"<h3 class='part'>Splits</h3>{table(('Split', 'documents', 'tokens'), rows)}"
    for field, title in (("licences", "Licence"), ("origins", "Origin")):
        if counts := report[field]:
            rows = [(name, n) for name, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
            body += f"<h3 class='part'>{title}s</h3>{table((title, 'documents kept'), rows)}"
    note = "Each document has the licence and origin of its record, or of its input."
    return section("Sources, splits, licences", body, note=note)


def _part_bar(label: str, part: int, total: int) -> Bar:
    """Extraction and repair can increase the number of tokens; the total is then the part."""
    return Bar(label, part, highlight=True, total=max(total, part))


def _charts(plots: Iterable[tuple[str, list[Bar]]]) -> str:
    return chart_grid(
        (title, draw_bars(rows, label=title, unit="number", format_value=format_number))
        for title, rows in plots
        if rows
    )


def _render_lengths_and_languages(report: dict[str, Any]) -> str:
    lengths = report["lengths"]
    bins = list(zip(lengths["min_tokens"], lengths["records"], lengths["kept"], strict=True))
    used = [index for index, (_, num_records, num_kept) in enumerate(bins) if num_records or num_kept]
    if not used:
        return ""
    by_length = []
    for index in range(used[0], used[-1] + 1):
        minimum, num_records, num_kept = bins[index]
        label = f"{minimum:,} to {bins[index + 1][0] - 1:,}" if index + 1 < len(bins) else f"{minimum:,} and more"
        by_length.append(_part_bar(label, num_kept, num_records))
    languages = sorted(report["languages"].items(), key=lambda item: (-item[1]["kept"], -item[1]["documents"], item[0]))
    by_language = [_part_bar(code, entry["kept"], entry["documents"]) for code, entry in languages[:_MAX_BARS]]
    body = _charts([("By tokens", by_length), ("By language", by_language)])
    if len(languages) > _MAX_BARS:
        rows = [(code, entry["documents"], entry["kept"]) for code, entry in languages]
        body += collapsed(f"All {len(languages)} languages", table(("Language", "documents", "kept"), rows))
    note = "Kept documents, of those read. Lengths are measured before the first stage and after the last."
    return section("Lengths and languages", body, note=note)


def _render_duplicates(report: dict[str, Any]) -> str:
    duplicates = report["duplicates"]
    if not duplicates:
        return ""
    sizes = sorted((int(size), number) for size, number in duplicates["clusters"].items())
    body = definition_list(
        [
            ("exact copies", duplicates["exact"]),
            ("near copies", duplicates["near"]),
            ("clusters", format_count(sum(number for _, number in sizes))),
            ("largest cluster", sizes[-1][0] if sizes else 0),
        ]
    )
    if sizes:
        rows = [(f"{size:,}", format_count(number), format_count((size - 1) * number)) for size, number in sizes]
        if len(rows) > _MAX_BARS:
            rows = [*rows[: _MAX_BARS // 2], ("…", "", ""), *rows[-_MAX_BARS // 2 :]]
        body += f"<div class='part'>{table(('Documents in a cluster', 'clusters', 'dropped copies'), rows)}</div>"
    examples = [cluster for cluster in duplicates["examples"] if cluster]
    if examples:
        body += "<h3 class='part'>The largest clusters</h3>"
    for cluster in examples:
        title = f"{cluster[0]['id']} is kept: below it, dropped copies"
        body += collapsed(title, "".join(map(_render_sample, cluster)))
    similarity = report["config"]["duplicates"]["similarity"]
    note = f"Near copies have a Jaccard similarity of at least {similarity:g} (5-word shingles, estimated by MinHash)."
    return section("Duplicates", body, note=note)


def _render_contamination(report: dict[str, Any]) -> str:
    if "decontaminate" not in report["config"]["stages"]:
        return ""
    sets, settings = report["contamination"], report["config"]["decontaminate"]
    if not sets:
        hint = "No evaluation set was given: set curate.decontaminate.against."
        return section("Contamination", f'<p class="missing">{hint}</p>')
    rows = [(name, entry["documents"], entry["dropped"], entry["occurrences"]) for name, entry in sets.items()]
    note = (
        f"Documents that share {settings['ngram_words']}-word n-grams with an evaluation set, or a complete example of "
        f"at least {settings['min_words']} words. Samples are above, in the stage decontaminate."
    )
    return section("Contamination", table(("Set", "documents", "dropped", "n-grams"), rows), note=note)


def _render_personal_data(report: dict[str, Any]) -> str:
    if not report["personal_data"]:
        return ""
    kinds = sorted(report["personal_data"]["kinds"].items())
    rows = [(kind, entry["documents"], entry["occurrences"]) for kind, entry in kinds]
    body = table(("Kind", "documents", "occurrences"), rows) if rows else '<p class="missing">None was found.</p>'
    for kind, entry in kinds:
        if entry["contexts"]:
            contexts = "".join(excerpt(escape(context)) for context in entry["contexts"])
            body += collapsed(f"{kind}: contexts, with the values replaced", contexts)
    action = _ACTION_LABELS[report["personal_data"]["action"]]
    return section("Personal data and secrets", body, note=f"Each occurrence is {action}.")


def _render_terms(report: dict[str, Any]) -> str:
    parts = []
    for topic, groups in sorted(report["terms"].items()):
        if not any(group["occurrences"] for group in groups.values()):
            continue
        ordered = sorted(groups.items(), key=lambda item: (-item[1]["occurrences"], item[0]))
        rows = [(name, group["documents"], group["occurrences"], f"{group['share']:.1%}") for name, group in ordered]
        head = (topic.capitalize(), "documents", "occurrences", "share of topic")
        parts.append(f"<div class='part'>{table(head, rows)}</div>")
    if not parts:
        return ""
    note = "How often the words of each list (curate.sample.terms) occur in kept documents. Nothing is dropped for it."
    return section("Terms", "".join(parts), note=note)


def _render_files(report: dict[str, Any]) -> str:
    inputs = [
        (name, one["files"], one["parts"], one["bytes"], one["fingerprint"][:16])
        for name, one in report["inputs"].items()
    ]
    outputs = [(name, one["documents"], one["bytes"], one["sha256"][:16]) for name, one in report["outputs"].items()]
    config = escape(json.dumps(report["config"], indent=1, ensure_ascii=False))
    body = definition_list([("corpus", report["fingerprint"][:16]), ("config", report["config_sha256"][:16])])
    head = ("Input", "files", "parts", "bytes", "hash of names, sizes, times")
    body += f"<div class='part'>{table(head, inputs)}</div>"
    body += collapsed(f"{len(outputs)} output files", table(("File", "documents", "bytes", "sha256"), outputs))
    body += collapsed("Config", f"<pre>{config}</pre>")
    note = "The first 16 digits of each hash; report.json has the complete ones."
    return section("Inputs, outputs, config", body, note=note)
