"""The data card of `llmjax curate`, rendered from report.json."""

from collections.abc import Iterable, Iterator
import json
from typing import Any

from llmjax.report import curation_advice
from llmjax.report.markup import clean, count, figure, page, pairs, section, table
from llmjax.report.plot import Bar, bars

_BARS = 14
_REPAIRED = {
    "edges": "blanks at begin and end",
    "nfc": "forms of letters (NFC)",
    "control": "control characters",
    "zero_width": "zero-width characters",
    "spaces": "widths of space",
    "cut off": "records cut off, read up to there",
}
_REASONS = 12  # of all stages, in the picture


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The card in short, for a terminal."""
    given, kept = report["records"], report["kept"]
    yield ""
    yield f"{'stage':<15}{'documents in':>14}{'dropped':>10}{'out':>12}{'MB out':>10}   most of it"
    for stage in report["stages"]:
        before, after = stage["in"]["documents"], stage["out"]["documents"]
        named = [f"{one['reason']} {one['documents']:,}" for one in stage["dropped"]]
        rest = len(named) - 3
        most = ", ".join(named[:3]) + (f", and {rest} more reason{'s' if rest > 1 else ''}" if rest > 0 else "")
        line = (
            f"{stage['stage']:<15}{before:>14,}{before - after:>10,}{after:>12,}{stage['out']['bytes'] / 1e6:>10,.1f}"
        )
        yield f"{line}   {most}".rstrip()
    if kinds := report["personal_data"].get("kinds"):
        found = ", ".join(f"{one['places']:,} {kind}" for kind, one in sorted(kinds.items()))
        yield f"personal data: {found} ({_ACTIONS[report['personal_data']['action']]})"
    for name, one in report["contamination"].items():
        if one["documents"]:
            yield f"contamination: {_documents(one)} with {one['runs']:,} runs of words of {name}"
    if not kept["documents"]:
        yield (
            f"no document stays: none of {given['documents']:,}; report.html shows samples with the reasons"
            if given["documents"]
            else "no document stays: the inputs hold none"
        )
        return
    splits = ", ".join(f"{name} {one['documents']:,}" for name, one in report["splits"].items())
    yield (
        f"{kept['documents']:,} of {given['documents']:,} documents stay ({_share(kept, given)}), "
        f"{kept['bytes'] / 1e6:,.1f} MB, about {kept['tokens']:,} tokens{f': {splits}' if splits else ''}"
    )


def page_of(report: dict[str, Any]) -> str:
    """The card as one HTML page that loads nothing."""
    parts = (
        _header,
        _headline,
        _advice,
        _reasons,
        _stages,
        _sources,
        _shape,
        _copies,
        _contamination,
        _personal,
        _terms,
        _files,
    )
    return page("Data card", "\n".join(filter(None, (part(report) for part in parts))))


_ACTIONS = {"replace": "replaced by placeholders", "drop": "a reason to drop a document", "count": "counted only"}


def _documents(one: dict[str, Any]) -> str:
    return f"{one['documents']:,} document{'' if one['documents'] == 1 else 's'}"


def _share(part: dict, whole: dict, field: str = "documents") -> str:
    return _percent(part[field], whole[field]) or "none"


def _percent(part: float, whole: float) -> str:
    """A part of a whole; '' of nothing. No rounding makes some none, or most all."""
    if not whole:
        return ""
    share = part / whole
    if 0 < share < 0.001:
        return "<0.1%"
    return ">99.9%" if 0.999 < share < 1 else f"{share:.1%}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _bytes(size: float) -> str:
    """In the unit that suits it: 312 bytes, 4.2 kB, 12.7 MB, 3.1 GB."""
    for least, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= least:
            return f"{size / least:,.1f} {unit}"
    return f"{size:,.0f} bytes"


def _folded(summary: str, body: str) -> str:
    """A part that is folded away; the first words of its summary, up to a colon, stand out."""
    first, colon, rest = summary.partition(": ")
    return f"<details><summary><b>{clean(first)}</b>{colon}{clean(rest)}</summary>{body}</details>"


def _header(report: dict[str, Any]) -> str:
    names = list(report["sources"])
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    told = f"{len(names)} input{'' if len(names) == 1 else 's'}: {shown} · llmjax {report['version']}"
    return f"<header><h1>Data card</h1><p>{clean(told)}</p></header>"


def _headline(report: dict[str, Any]) -> str:
    given, kept = report["records"], report["kept"]
    facts = [
        (_share(kept, given), f"of documents stay: {count(kept['documents'])} of {count(given['documents'])}"),
        (figure(kept["tokens"]), f"tokens, {_share(kept, given, 'tokens')} of those read, markup included"),
        (_bytes(kept["bytes"]), "of text"),
    ]
    shown = "".join(
        f'<div class="fact"><div class="big">{clean(big)}</div><div class="what">{clean(what)}</div></div>'
        for big, what in facts
    )
    rows = [Bar("given", given["documents"])]
    rows += [
        Bar(f"after {_words(stage['stage'])}", stage["out"]["documents"])
        for stage in report["stages"]
        if stage["dropped"]
    ]
    rows[-1] = Bar(rows[-1].label, rows[-1].value, highlight=True)
    plot = bars(rows, label="documents", unit="number", show=figure)
    hero = f'<div class="hero"><div class="facts">{shown}</div><div><h3>Documents</h3>{plot}</div></div>'
    return f"<section>{hero}</section>"


def _advice(report: dict[str, Any]) -> str:
    said = curation_advice.of(report)
    if not said:
        return ""
    items = "".join(f"<li>{clean(line)}</li>" for line in said)
    note = "What may be changed, with --config.FIELD=VALUE. `llmjax fields curate` explains every field."
    return section("Worth a look", f'<ul class="advice">{items}</ul>', note=note)


def _reasons(report: dict[str, Any]) -> str:
    """Why documents went: the picture, and for each reason its samples."""
    found = [(stage, one) for stage in report["stages"] for one in stage["dropped"]]
    if not found:
        return section("Why documents went", '<p class="missing">None went.</p>')
    ordered = sorted(found, key=lambda item: -item[1]["documents"])
    rows = [Bar(one["reason"], one["documents"]) for _, one in ordered[:_REASONS]]
    drawn = bars(rows, label="documents by reason", unit="number", show=figure, names=215)
    head = f"The {_REASONS} most frequent of {len(ordered)} reasons" if len(ordered) > _REASONS else "All reasons"
    body = f'<div class="narrow"><h3>{head}, documents</h3>{drawn}</div>'
    for stage in report["stages"]:
        if not stage["dropped"]:
            continue
        gone = sum(one["documents"] for one in stage["dropped"])
        body += f"<h3 class='part'>{clean(_words(stage['stage']))}, {count(gone)} documents</h3>"
        for one in stage["dropped"]:
            bound = report["config"]["quality"].get(one["reason"]) if stage["stage"] == "quality" else None
            title = one["reason"] if bound is None else f"{one['reason']} {bound:g}"
            by = ", ".join(f"{name} {number:,}" for name, number in one["by_source"].items())
            size = f", {_bytes(one['bytes'])}, {figure(one['tokens'])} tokens" if one["tokens"] else ""
            shown = "".join(map(_sample, one["samples"]))
            body += _folded(f"{title}: {_documents(one)}{size} ({by})", shown)
    note = "Click on a reason for up to five samples, chosen by a hash. Personal data in them are replaced."
    return section("Why documents went", body, note=note)


def _stages(report: dict[str, Any]) -> str:
    body = _flow((stage["stage"], stage) for stage in report["stages"])
    for name in report["sources"] if len(report["sources"]) > 1 else ():
        alone = report["sources"][name]
        inner = _flow((stage["stage"], stage["by_source"][name]) for stage in report["stages"])
        stay = f"{count(alone['documents'])} of {count(alone['given']['documents'])} documents stay"
        body += _folded(f"{name}: {stay}", inner)
    if report["repaired"]:
        rows = [
            (_REPAIRED.get(what, _words(what)), count(one["documents"]), count(one["places"]))
            for what, one in report["repaired"].items()
        ]
        body += f"<h3 class='part'>Repaired</h3>{table(('What', 'documents', 'places'), rows)}"
    note = "Tokens are pieces of words and marks, about as many as a tokenizer of 32,000 makes of English."
    return section("Stage by stage", body, note=note)


def _flow(stages: Iterable[tuple[str, dict[str, Any]]]) -> str:
    rows = []
    for name, amounts in stages:
        before, after = amounts["in"], amounts["out"]
        gone = before["documents"] - after["documents"]
        rows.append(
            (
                _words(name),
                *map(count, (before["documents"], gone, after["documents"])),
                _percent(gone, before["documents"]),
                *map(count, (before["bytes"], after["bytes"], before["tokens"], after["tokens"])),
            )
        )
    head = ("Stage", "documents in", "dropped", "out", "share dropped", "bytes in", "out", "tokens in", "out")
    return table(head, rows)


def _sample(sample: dict[str, Any]) -> str:
    text = sample["text"] if len(sample["text"]) < 600 else sample["text"] + " …"
    shown = f"<pre>{clean(text)}</pre>" if text.strip() else '<p class="missing">No text.</p>'
    return f"<figure>{shown}<figcaption>{clean(sample['id'])}</figcaption></figure>"


def _sources(report: dict[str, Any]) -> str:
    kept, given = report["kept"], report["records"]
    rows = [
        (
            name,
            *map(count, (one["given"]["documents"], one["documents"])),
            _share(one, one["given"]) if one["given"]["documents"] else "",
            *map(count, (one["given"]["tokens"], one["tokens"])),
            _percent(one["given"]["tokens"], given["tokens"]),
            _percent(one["tokens"], kept["tokens"]),
        )
        for name, one in report["sources"].items()
    ]
    drawn = sorted(report["sources"].items(), key=lambda item: -item[1]["tokens"])[:_BARS]
    pictures = [("Tokens that stay, of those read", [_of(name, one, one["given"]) for name, one in drawn])]
    if report["splits"]:
        pictures.append(
            ("Tokens by split", [Bar(name, one["tokens"], highlight=True) for name, one in report["splits"].items()])
        )
    body = _pictures(pictures)
    head = ("Source", "documents given", "kept", "share", "tokens given", "kept", "share of given", "share of kept")
    body += f"<div class='part'>{table(head, rows)}</div>"
    if report["splits"]:
        lines = [(name, *map(count, (one["documents"], one["tokens"]))) for name, one in report["splits"].items()]
        body += f"<h3 class='part'>Splits</h3>{table(('Split', 'documents', 'tokens'), lines)}"
    for field, title in (("licences", "Licence"), ("origins", "Origin")):
        if stated := report[field]:
            lines = [(name, count(n)) for name, n in sorted(stated.items(), key=lambda item: (-item[1], item[0]))]
            body += f"<h3 class='part'>{title}s</h3>{table((title, 'documents kept'), lines)}"
    return section("Sources, splits, licences", body, note="Each document carries its input's licence and origin.")


def _of(label: str, part: dict[str, int], whole: dict[str, int]) -> Bar:
    """Extraction and repair can make more tokens than they found: then the part is the whole."""
    return Bar(label, part["tokens"], highlight=True, of=max(whole["tokens"], part["tokens"]))


def _pictures(plots: Iterable[tuple[str, list[Bar]]]) -> str:
    drawn = "".join(
        f"<div><h3>{clean(title)}</h3>{bars(rows, label=title, unit='number', show=figure)}</div>"
        for title, rows in plots
        if rows
    )
    return f'<div class="plots">{drawn}</div>'


def _shape(report: dict[str, Any]) -> str:
    lengths = report["lengths"]
    edges, given, kept = lengths["tokens_from"], lengths["given"], lengths["kept"]
    used = [i for i, pair in enumerate(zip(given, kept, strict=True)) if any(pair)]
    if not used:
        return ""
    by_length = [
        Bar(
            f"{edges[i]:,} to {edges[i + 1] - 1:,}" if i + 1 < len(edges) else f"{edges[i]:,} and more",
            kept[i],
            highlight=True,
            of=max(given[i], kept[i]),
        )
        for i in range(used[0], used[-1] + 1)
    ]
    found = sorted(report["languages"].items(), key=lambda item: (-item[1]["kept"], -item[1]["documents"], item[0]))
    by_language = [Bar(code, one["kept"], highlight=True, of=one["documents"]) for code, one in found[:_BARS]]
    body = _pictures([("By tokens", by_length), ("By language", by_language)])
    if len(found) > _BARS:
        lines = [(code, count(one["documents"]), count(one["kept"])) for code, one in found]
        body += _folded(f"All {len(found)} languages", table(("Language", "documents", "kept"), lines))
    note = "Documents that stay, of those that were read. Lengths are before the first stage, and of what stays."
    return section("Lengths and languages", body, note=note)


def _copies(report: dict[str, Any]) -> str:
    found = report["duplicates"]
    if not found:
        return ""
    sizes = [(int(size), number) for size, number in found["clusters"].items()]
    body = pairs(
        [
            ("exact copies", count(found["exact"])),
            ("near copies", count(found["near"])),
            ("clusters", count(sum(number for _, number in sizes))),
            ("largest cluster", count(max((size for size, _ in sizes), default=0))),
        ]
    )
    if sizes:
        rows = [(f"{size:,}", count(number), count((size - 1) * number)) for size, number in sorted(sizes)]
        if len(rows) > _BARS:
            rows = [*rows[: _BARS // 2], ("…", "", ""), *rows[-_BARS // 2 :]]
        body += f"<div class='part'>{table(('Documents in a cluster', 'clusters', 'copies that went'), rows)}</div>"
    examples = [cluster for cluster in found["examples"] if cluster]
    if examples:
        body += "<h3 class='part'>The largest clusters</h3>"
    for cluster in examples:
        body += _folded(f"{cluster[0]['id']} stays: below it, copies that went", "".join(map(_sample, cluster)))
    alike = report["config"]["duplicates"]["similarity"]
    return section("Duplicates", body, note=f"Near copies share at least {alike:.0%} of their runs of five words.")


def _contamination(report: dict[str, Any]) -> str:
    if "decontaminate" not in {stage["stage"] for stage in report["stages"]}:
        return ""
    found = report["contamination"]
    if not found:
        return section(
            "Contamination", '<p class="missing">No evaluation set was given: curate.decontaminate.against.</p>'
        )
    rows = [(name, *map(count, (one["documents"], one["dropped"], one["runs"]))) for name, one in found.items()]
    told = report["config"]["decontaminate"]
    note = (
        f"Documents that share runs of {told['words']} words with an evaluation set, or a whole example of at least "
        f"{told['min_words']}. Samples are above, under decontaminate."
    )
    return section("Contamination", table(("Set", "documents", "dropped", "runs of words"), rows), note=note)


def _personal(report: dict[str, Any]) -> str:
    found = report["personal_data"]
    if not found:
        return ""
    rows = [(kind, count(one["documents"]), count(one["places"])) for kind, one in sorted(found["kinds"].items())]
    body = table(("Kind", "documents", "places"), rows) if rows else '<p class="missing">None was found.</p>'
    for kind, one in sorted(found["kinds"].items()):
        if one["contexts"]:
            shown = "".join(f"<figure><pre>{clean(context)}</pre></figure>" for context in one["contexts"])
            body += _folded(f"{kind}: where it stood, masked", shown)
    return section("Personal data and secrets", body, note=f"What was found is {_ACTIONS[found['action']]}.")


def _terms(report: dict[str, Any]) -> str:
    parts = []
    for topic, groups in sorted(report["terms"].items()):
        ordered = sorted(groups.items(), key=lambda item: (-item[1]["occurrences"], item[0]))
        rows = [
            (name, count(one["documents"]), count(one["occurrences"]), f"{one['share']:.1%}") for name, one in ordered
        ]
        if any(one["occurrences"] for one in groups.values()):
            head = (topic.capitalize(), "documents", "occurrences", "share of topic")
            parts.append(f"<div class='part'>{table(head, rows)}</div>")
    if not parts:
        return ""
    note = "How often what stays uses the words of each list (curate.sample.terms). Nothing is dropped for it."
    return section("Who and what it speaks of", "".join(parts), note=note)


def _files(report: dict[str, Any]) -> str:
    inputs = [
        (name, *map(count, (one["files"], one["parts"], one["bytes"])), one["state"][:16])
        for name, one in report["inputs"].items()
    ]
    outputs = [
        (name, count(one["documents"]), count(one["bytes"]), one["sha256"][:16])
        for name, one in report["outputs"].items()
    ]
    body = pairs([("this corpus", report["key"][:16]), ("configuration", report["config_sha256"][:16])])
    head = ("Input", "files", "parts", "bytes", "hash of names, sizes, times")
    body += f"<div class='part'>{table(head, inputs)}</div>"
    body += _folded(f"{len(outputs)} output files", table(("File", "documents", "bytes", "sha256"), outputs))
    body += _folded("Configuration", f"<pre>{clean(json.dumps(report['config'], indent=1, ensure_ascii=False))}</pre>")
    note = "The first 16 digits of each hash; report.json has them whole."
    return section("Inputs, outputs, configuration", body, note=note)
