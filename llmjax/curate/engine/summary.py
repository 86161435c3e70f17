"""The numbers of the data card: inputs, effect of each stage, result. Columns in, report.json out."""

from collections import Counter
from typing import Any

import numpy as np

from llmjax.curate.config import CurateConfig
from llmjax.curate.dedup import decontaminate
from llmjax.curate.engine.decide import Decisions, Table
from llmjax.data.store.split import SPLITS

SAMPLES = 5  # dropped documents of each reason that are shown
_CLUSTERS, _MEMBERS = 5, 3  # the largest clusters of copies, and documents of each, that are shown
_CONTEXTS = 3  # documents with each kind of personal data that are shown, masked
_LENGTHS = (0, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)  # tokens


def choose_samples(table: Table, decisions: Decisions, config: CurateConfig) -> np.ndarray:
    """int64 [rows], sorted: records whose text the card shows. A hash chooses them, so they come from all files."""
    rows = [row for chosen in _dropped(table, decisions, config).values() for row in chosen]
    rows += [row for cluster in _clusters(decisions, table) for row in cluster]
    for _, counts in table.scores("personal."):
        rows += _first(
            np.flatnonzero(_reaches_stage(decisions, config, "personal_data") & (counts > 0)), table, _CONTEXTS
        )
    return np.unique(np.array(rows, np.int64))


def _reaches_stage(decisions: Decisions, config: CurateConfig, stage: str) -> np.ndarray:
    """bool [rows]: records that no stage before this one drops."""
    return decisions.kept | (decisions.stage >= config.stages.index(stage))


def _first(rows: np.ndarray, table: Table, count: int) -> list[int]:
    return rows[np.argsort(table["id_hash"][rows], kind="stable")[:count]].tolist()


def _dropped(table: Table, decisions: Decisions, config: CurateConfig) -> dict[tuple[int, int], list[int]]:
    """(stage, reason) -> sampled rows."""
    found = {}
    for stage in range(len(config.stages)):
        here = decisions.stage == stage
        for reason in np.unique(decisions.reason[here]).tolist():
            found[stage, reason] = _first(np.flatnonzero(here & (decisions.reason == reason)), table, SAMPLES)
    return found


def _clusters(decisions: Decisions, table: Table) -> list[list[int]]:
    """Rows of the largest clusters of copies: the kept document first, and some of its copies."""
    if decisions.copies is None:
        return []
    firsts, counts = np.unique(decisions.copies.kept_as, return_counts=True)
    largest = np.lexsort((table["id_hash"][firsts], -counts))[:_CLUSTERS]
    found = []
    for first, count in zip(firsts[largest].tolist(), counts[largest].tolist(), strict=True):
        if count > 1:
            others = np.flatnonzero(decisions.copies.kept_as == first)
            found.append([first, *_first(others[others != first], table, _MEMBERS - 1)])
    return found


def summarise(
    table: Table, decisions: Decisions, results: list[dict[str, Any]], config: CurateConfig
) -> dict[str, Any]:
    """All that report.json says of the documents. `results` are those of write.write, by unit."""
    samples = {}
    for begin, result in zip(table.edges.tolist(), results, strict=False):
        samples |= {begin + int(row): sample for row, sample in result["samples"].items()}
    kept, last = decisions.kept, table["sizes"][:, -1]
    stated: dict[str, Counter[str]] = {"licences": Counter(), "origins": Counter()}
    for result in results:
        for field, counts in stated.items():
            counts.update(result[field])
    return {
        "records": _amount(np.ones(len(table), bool), table["sizes"][:, 0]),
        "kept": _amount(kept, last),
        "stages": _stages(table, decisions, samples, config),
        "repaired": _repaired(table),
        "lengths": _lengths(table, kept),
        "languages": _languages(table, kept),
        "duplicates": _duplicates(table, decisions, samples),
        "contamination": _contamination(table, decisions, config),
        "personal_data": _personal(table, decisions, samples, config),
        "sources": {
            name: _amount(kept & (table.source == index), last)
            | {"given": _amount(table.source == index, table["sizes"][:, 0])}
            for index, name in enumerate(table.names)
        },
        "terms": _terms(table, kept),
        "splits": {
            name: _amount(kept & (decisions.split == index), last)
            for index, name in enumerate(SPLITS)
            if "split" in config.stages
        },
        **{field: dict(counts.most_common(50)) for field, counts in stated.items()},
        "outputs": {name: file for result in results for name, file in result["files"].items()},
    }


def _amount(which: np.ndarray, sizes: np.ndarray) -> dict[str, int]:
    """Documents, bytes of UTF-8, and tokens (document.count_tokens)."""
    held = sizes[which].sum(axis=0, dtype=np.int64)
    return {"documents": int(which.sum()), "bytes": int(held[0]), "tokens": int(held[1])}


def _stages(table: Table, decisions: Decisions, samples: dict[int, dict], config: CurateConfig) -> list[dict[str, Any]]:
    shown, stages = _dropped(table, decisions, config), []
    is_left = np.ones(len(table), bool)
    for place, name in enumerate(config.stages):
        before, after = table["sizes"][:, place], table["sizes"][:, place + 1]
        is_dropped = decisions.stage == place
        dropped = []
        for reason in np.unique(decisions.reason[is_dropped]).tolist():
            which = is_dropped & (decisions.reason == reason)
            dropped.append(
                {
                    "reason": table.reasons[reason],
                    **_amount(which, before),
                    "by_source": {
                        source: int((which & (table.source == index)).sum())
                        for index, source in enumerate(table.names)
                        if (which & (table.source == index)).any()
                    },
                    "samples": [samples[row] for row in shown[place, reason] if row in samples],
                }
            )
        stages.append(
            {
                "stage": name,
                "in": _amount(is_left, before),
                "out": _amount(is_left & ~is_dropped, after),
                "by_source": {
                    source: {
                        "in": _amount(is_left & (table.source == index), before),
                        "out": _amount(is_left & ~is_dropped & (table.source == index), after),
                    }
                    for index, source in enumerate(table.names)
                },
                "dropped": sorted(dropped, key=lambda one: (-one["documents"], one["reason"])),
            }
        )
        is_left &= ~is_dropped
    return stages


def _repaired(table: Table) -> dict[str, dict[str, int]]:
    """Documents and places that reading, normalising and C4's line rules changed."""
    repairs = {}
    for prefix, label in (("lines.", "removed lines: "), ("repaired.", "")):
        for name, counts in table.scores(prefix):
            found = np.nan_to_num(counts)
            repairs[label + name] = {"documents": int((found > 0).sum()), "places": int(found.sum(dtype=np.float64))}
    return dict(sorted(repairs.items(), key=lambda item: -item[1]["documents"]))


def _lengths(table: Table, kept: np.ndarray) -> dict[str, list[int]]:
    """Histograms of documents by tokens: all documents after reading, and kept documents."""
    edges = [*_LENGTHS, np.iinfo(np.int64).max]
    given = table["sizes"][:, 0, 1]
    return {
        "tokens_from": list(_LENGTHS),
        "given": np.histogram(given[given > 0], edges)[0].tolist(),
        "kept": np.histogram(table["sizes"][kept, -1, 1], edges)[0].tolist(),
    }


def _languages(table: Table, kept: np.ndarray) -> dict[str, dict[str, int]]:
    codes, given = np.unique(table["language"], return_counts=True)
    languages = {}
    for code, count in sorted(zip(codes.tolist(), given.tolist(), strict=True), key=lambda item: -item[1]):
        if code:
            languages[code.decode()] = {"documents": count, "kept": int((kept & (table["language"] == code)).sum())}
    return languages


def _duplicates(table: Table, decisions: Decisions, samples: dict[int, dict]) -> dict[str, Any]:
    if decisions.copies is None:
        return {}
    _, counts = np.unique(decisions.copies.kept_as, return_counts=True)
    sizes, clusters = np.unique(counts[counts > 1], return_counts=True)
    is_dropped = decisions.copies.kept_as != np.arange(len(table))
    return {
        "exact": int((is_dropped & decisions.copies.exact).sum()),
        "near": int((is_dropped & ~decisions.copies.exact).sum()),
        "clusters": {str(size): count for size, count in zip(sizes.tolist(), clusters.tolist(), strict=True)},
        "examples": [[samples[row] for row in cluster if row in samples] for cluster in _clusters(decisions, table)],
    }


def _contamination(table: Table, decisions: Decisions, config: CurateConfig) -> dict[str, dict[str, int]]:
    if "decontaminate" not in config.stages:
        return {}
    reaches = _reaches_stage(decisions, config, "decontaminate")
    found = {}
    for name in decontaminate.set_names(config.decontaminate.against).values():
        hits = table.score(f"contaminated.{name}")
        with_hits = reaches & (hits > 0)
        found[name] = {
            "documents": int(with_hits.sum()),
            "dropped": int((with_hits & (hits >= config.decontaminate.min_hits)).sum()),
            "runs": int(hits[with_hits].sum(dtype=np.float64)),
        }
    return found


def _personal(table: Table, decisions: Decisions, samples: dict[int, dict], config: CurateConfig) -> dict[str, Any]:
    if "personal_data" not in config.stages:
        return {}
    reaches = _reaches_stage(decisions, config, "personal_data")
    kinds: dict[str, Any] = {}
    for kind, counts in table.scores("personal."):
        has_kind = reaches & (counts > 0)
        if not has_kind.any():
            continue
        contexts = []
        for row in _first(np.flatnonzero(has_kind), table, _CONTEXTS):
            notes = samples.get(row, {}).get("notes", {}).get("personal", [])
            contexts += [context for found, context in notes if found == kind][:1]
        places = int(counts[has_kind].sum(dtype=np.float64))
        kinds[kind] = {"documents": int(has_kind.sum()), "places": places, "contexts": contexts}
    return {"action": config.personal_data.action, "kinds": kinds}


def _terms(table: Table, kept: np.ndarray) -> dict[str, dict[str, Any]]:
    """Topic -> group -> kept documents, occurrences in them, and the share of the topic's occurrences."""
    topics: dict[str, dict[str, Any]] = {}
    for name, counts in table.scores("term."):
        topic, _, group = name.partition("/")
        found = np.nan_to_num(counts[kept])
        amount = {"documents": int((found > 0).sum()), "occurrences": int(found.sum(dtype=np.float64))}
        topics.setdefault(topic, {})[group or topic] = amount
    for groups in topics.values():
        total = sum(group["occurrences"] for group in groups.values())
        for group in groups.values():
            group["share"] = round(group["occurrences"] / total, 4) if total else 0.0
    return topics
