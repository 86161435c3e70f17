"""Compute report.json, the numbers of the data card, from the columns and the decisions."""

from collections import Counter
from typing import Any

import numpy as np

from llmjax.curate.config import CurateConfig
from llmjax.curate.dedup import decontaminate
from llmjax.curate.engine.decide import Decisions, Table
from llmjax.data.store.split import SPLITS

_SAMPLES = 5  # dropped documents per reason
_CLUSTERS, _MEMBERS = 5, 3  # the largest clusters of copies, and documents of each
_CONTEXTS = 3  # documents with each kind of personal data
_MIN_TOKENS = (0, *(1 << n for n in range(5, 18)))  # bins of the histogram of lengths: 0, 32, 64, ..., 131072


def choose_samples(table: Table, decisions: Decisions, config: CurateConfig) -> np.ndarray:
    """int64 [rows], sorted: records whose text the card shows. A hash selects them, so they come from all files."""
    rows = [row for samples in _sample_dropped(table, decisions, config).values() for row in samples]
    rows += [row for cluster in _find_largest_clusters(decisions, table) for row in cluster]
    for _, counts in table.scores("personal."):
        reaches_stage = _reaches_stage(decisions, config, "personal_data")
        rows += _select_by_hash(np.flatnonzero(reaches_stage & (counts > 0)), table, _CONTEXTS)
    return np.unique(np.array(rows, np.int64))


def _reaches_stage(decisions: Decisions, config: CurateConfig, stage: str) -> np.ndarray:
    """bool [rows]: records that no earlier stage dropped."""
    return decisions.kept | (decisions.stage >= config.stages.index(stage))


def _select_by_hash(rows: np.ndarray, table: Table, count: int) -> list[int]:
    return rows[np.argsort(table["id_hash"][rows], kind="stable")[:count]].tolist()


def _sample_dropped(table: Table, decisions: Decisions, config: CurateConfig) -> dict[tuple[int, int], list[int]]:
    """(stage, reason) -> sampled rows."""
    samples = {}
    for stage in range(len(config.stages)):
        is_dropped = decisions.stage == stage
        for reason in np.unique(decisions.reason[is_dropped]).tolist():
            rows = np.flatnonzero(is_dropped & (decisions.reason == reason))
            samples[stage, reason] = _select_by_hash(rows, table, _SAMPLES)
    return samples


def _find_largest_clusters(decisions: Decisions, table: Table) -> list[list[int]]:
    """Rows of the largest clusters of copies: the kept document, then some of its copies."""
    if decisions.copies is None:
        return []
    kept, counts = np.unique(decisions.copies.representative, return_counts=True)
    largest = np.lexsort((table["id_hash"][kept], -counts))[:_CLUSTERS]
    clusters = []
    for row, count in zip(kept[largest].tolist(), counts[largest].tolist(), strict=True):
        if count > 1:
            members = np.flatnonzero(decisions.copies.representative == row)
            clusters.append([row, *_select_by_hash(members[members != row], table, _MEMBERS - 1)])
    return clusters


def summarise(
    table: Table, decisions: Decisions, results: list[dict[str, Any]], config: CurateConfig
) -> dict[str, Any]:
    """What report.json says about the documents. `results`: the results of write.write, by unit."""
    samples = {}
    for begin, result in zip(table.offsets.tolist(), results, strict=False):
        samples |= {begin + int(row): sample for row, sample in result["samples"].items()}
    kept, last = decisions.kept, table["sizes"][:, -1]
    stated: dict[str, Counter[str]] = {"licences": Counter(), "origins": Counter()}
    for result in results:
        for field, counts in stated.items():
            counts.update(result[field])
    return {
        "records": _sum_amounts(np.ones(len(table), bool), table["sizes"][:, 0]),
        "kept": _sum_amounts(kept, last),
        "stages": _summarise_stages(table, decisions, samples, config),
        "repairs": _summarise_repairs(table),
        "lengths": _summarise_lengths(table, kept),
        "languages": _summarise_languages(table, kept),
        "duplicates": _summarise_duplicates(table, decisions, samples),
        "contamination": _summarise_contamination(table, decisions, config),
        "personal_data": _summarise_personal_data(table, decisions, samples, config),
        "sources": {
            name: {
                "records": _sum_amounts(table.source == index, table["sizes"][:, 0]),
                "kept": _sum_amounts(kept & (table.source == index), last),
            }
            for index, name in enumerate(table.names)
        },
        "terms": _summarise_terms(table, kept),
        "splits": {
            name: _sum_amounts(kept & (decisions.split == index), last)
            for index, name in enumerate(SPLITS)
            if "split" in config.stages
        },
        **{field: dict(counts.most_common(50)) for field, counts in stated.items()},
        "outputs": {name: file for result in results for name, file in result["files"].items()},
    }


def _sum_amounts(mask: np.ndarray, sizes: np.ndarray) -> dict[str, int]:
    """Number of documents, bytes of UTF-8, and tokens (document.count_tokens)."""
    num_bytes, num_tokens = sizes[mask].sum(axis=0, dtype=np.int64).tolist()
    return {"documents": int(mask.sum()), "bytes": num_bytes, "tokens": num_tokens}


def _summarise_stages(
    table: Table, decisions: Decisions, samples: dict[int, dict], config: CurateConfig
) -> list[dict[str, Any]]:
    sampled_rows, stages = _sample_dropped(table, decisions, config), []
    in_source = {name: table.source == index for index, name in enumerate(table.names)}
    is_input = np.ones(len(table), bool)
    for index, name in enumerate(config.stages):
        before, after = table["sizes"][:, index], table["sizes"][:, index + 1]
        is_dropped = decisions.stage == index
        is_output = is_input & ~is_dropped
        dropped = []
        for reason in np.unique(decisions.reason[is_dropped]).tolist():
            has_reason = is_dropped & (decisions.reason == reason)
            by_source = {source: int((has_reason & mask).sum()) for source, mask in in_source.items()}
            dropped.append(
                {
                    "reason": table.reasons[reason],
                    **_sum_amounts(has_reason, before),
                    "by_source": {source: count for source, count in by_source.items() if count},
                    "samples": [samples[row] for row in sampled_rows[index, reason] if row in samples],
                }
            )
        stages.append(
            {
                "stage": name,
                "in": _sum_amounts(is_input, before),
                "out": _sum_amounts(is_output, after),
                "by_source": {
                    source: {"in": _sum_amounts(is_input & mask, before), "out": _sum_amounts(is_output & mask, after)}
                    for source, mask in in_source.items()
                },
                "dropped": sorted(dropped, key=lambda entry: (-entry["documents"], entry["reason"])),
            }
        )
        is_input = is_output
    return stages


def _count_occurrences(counts: np.ndarray) -> dict[str, int]:
    """Number of documents with a count above 0, and the sum of the counts; NaN counts as 0."""
    counts = np.nan_to_num(counts)
    return {"documents": int((counts > 0).sum()), "occurrences": int(counts.sum(dtype=np.float64))}


def _summarise_repairs(table: Table) -> dict[str, dict[str, int]]:
    """What reading, normalisation and C4's line rules changed."""
    repairs = {f"removed lines: {name}": _count_occurrences(counts) for name, counts in table.scores("lines.")}
    repairs |= {name: _count_occurrences(counts) for name, counts in table.scores("repair.")}
    return dict(sorted(repairs.items(), key=lambda item: -item[1]["documents"]))


def _summarise_lengths(table: Table, kept: np.ndarray) -> dict[str, list[int]]:
    """Histograms of documents by tokens: all documents after reading, and kept documents."""
    bins = [*_MIN_TOKENS, np.iinfo(np.int64).max]
    num_tokens = table["sizes"][:, 0, 1]
    return {
        "min_tokens": list(_MIN_TOKENS),
        "records": np.histogram(num_tokens[num_tokens > 0], bins)[0].tolist(),
        "kept": np.histogram(table["sizes"][kept, -1, 1], bins)[0].tolist(),
    }


def _summarise_languages(table: Table, kept: np.ndarray) -> dict[str, dict[str, int]]:
    codes, counts = np.unique(table["language"], return_counts=True)
    languages = {}
    for code, count in sorted(zip(codes.tolist(), counts.tolist(), strict=True), key=lambda item: -item[1]):
        if code:
            languages[code.decode()] = {"documents": count, "kept": int((kept & (table["language"] == code)).sum())}
    return languages


def _summarise_duplicates(table: Table, decisions: Decisions, samples: dict[int, dict]) -> dict[str, Any]:
    if decisions.copies is None:
        return {}
    copies, clusters = decisions.copies, _find_largest_clusters(decisions, table)
    _, counts = np.unique(copies.representative, return_counts=True)
    sizes, num_clusters = np.unique(counts[counts > 1], return_counts=True)
    is_dropped = copies.representative != np.arange(len(table))
    return {
        "exact": int((is_dropped & copies.is_exact).sum()),
        "near": int((is_dropped & ~copies.is_exact).sum()),
        "clusters": {str(size): count for size, count in zip(sizes.tolist(), num_clusters.tolist(), strict=True)},
        "examples": [[samples[row] for row in cluster if row in samples] for cluster in clusters],
    }


def _summarise_contamination(table: Table, decisions: Decisions, config: CurateConfig) -> dict[str, dict[str, int]]:
    if "decontaminate" not in config.stages:
        return {}
    reaches_stage = _reaches_stage(decisions, config, "decontaminate")
    sets = {}
    for name in decontaminate.name_sets(config.decontaminate.against).values():
        num_shared = np.where(reaches_stage, table.score(f"shared_ngrams.{name}"), np.nan)
        is_dropped = num_shared >= config.decontaminate.min_shared_ngrams
        sets[name] = {**_count_occurrences(num_shared), "dropped": int(is_dropped.sum())}
    return sets


def _summarise_personal_data(
    table: Table, decisions: Decisions, samples: dict[int, dict], config: CurateConfig
) -> dict[str, Any]:
    if "personal_data" not in config.stages:
        return {}
    reaches_stage = _reaches_stage(decisions, config, "personal_data")
    kinds: dict[str, Any] = {}
    for kind, counts in table.scores("personal."):
        has_kind = reaches_stage & (counts > 0)
        if not has_kind.any():
            continue
        contexts = []
        for row in _select_by_hash(np.flatnonzero(has_kind), table, _CONTEXTS):
            notes = samples.get(row, {}).get("notes", {}).get("personal", [])
            contexts += [context for note_kind, context in notes if note_kind == kind][:1]
        kinds[kind] = {**_count_occurrences(counts[has_kind]), "contexts": contexts}
    return {"action": config.personal_data.action, "kinds": kinds}


def _summarise_terms(table: Table, kept: np.ndarray) -> dict[str, dict[str, Any]]:
    """Topic -> group -> kept documents, occurrences in them, and the share of the topic's occurrences."""
    topics: dict[str, dict[str, Any]] = {}
    for name, counts in table.scores("term."):
        topic, _, group = name.partition("/")
        topics.setdefault(topic, {})[group or topic] = _count_occurrences(counts[kept])
    for groups in topics.values():
        total = sum(group["occurrences"] for group in groups.values())
        for group in groups.values():
            group["share"] = round(group["occurrences"] / total, 4) if total else 0.0
    return topics
