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


def choose_samples(table: Table, made: Decisions, config: CurateConfig) -> np.ndarray:
    """int64 [rows], sorted: records whose text the card shows. A hash chooses, so they are no stretch of one file."""
    rows = [row for chosen in _dropped(table, made, config).values() for row in chosen]
    rows += [row for cluster in _clusters(made, table) for row in cluster]
    for _, counts in table.scores("personal."):
        rows += _first(np.flatnonzero(_reach(made, config, "personal_data") & (counts > 0)), table, _CONTEXTS)
    return np.unique(np.array(rows, np.int64))


def _reach(made: Decisions, config: CurateConfig, stage: str) -> np.ndarray:
    """bool [rows]: records that come as far as a stage."""
    return made.kept | (made.stage >= config.stages.index(stage))


def _first(rows: np.ndarray, table: Table, count: int) -> list[int]:
    return rows[np.argsort(table["id_hash"][rows], kind="stable")[:count]].tolist()


def _dropped(table: Table, made: Decisions, config: CurateConfig) -> dict[tuple[int, int], list[int]]:
    """(stage, reason) -> sampled rows."""
    found = {}
    for stage in range(len(config.stages)):
        here = made.stage == stage
        for reason in np.unique(made.reason[here]).tolist():
            found[stage, reason] = _first(np.flatnonzero(here & (made.reason == reason)), table, SAMPLES)
    return found


def _clusters(made: Decisions, table: Table) -> list[list[int]]:
    """Of the largest clusters of copies, the document that stays and some that go."""
    if made.copies is None:
        return []
    firsts, counts = np.unique(made.copies.kept_as, return_counts=True)
    largest = np.lexsort((table["id_hash"][firsts], -counts))[:_CLUSTERS]
    found = []
    for first, count in zip(firsts[largest].tolist(), counts[largest].tolist(), strict=True):
        if count > 1:
            others = np.flatnonzero(made.copies.kept_as == first)
            found.append([first, *_first(others[others != first], table, _MEMBERS - 1)])
    return found


def summarise(table: Table, made: Decisions, results: list[dict[str, Any]], config: CurateConfig) -> dict[str, Any]:
    """All that report.json says of the documents. `results` are those of write.write, by unit."""
    samples = {}
    for begin, result in zip(table.edges.tolist(), results, strict=False):
        samples |= {begin + int(row): sample for row, sample in result["samples"].items()}
    kept, last = made.kept, table["sizes"][:, -1]
    stated: dict[str, Counter[str]] = {"licences": Counter(), "origins": Counter()}
    for result in results:
        for field, counts in stated.items():
            counts.update(result[field])
    return {
        "records": _amount(np.ones(len(table), bool), table["sizes"][:, 0]),
        "kept": _amount(kept, last),
        "stages": _stages(table, made, samples, config),
        "mended": _mended(table),
        "lengths": _lengths(table, kept),
        "languages": _languages(table, kept),
        "duplicates": _duplicates(table, made, samples),
        "contamination": _contamination(table, made, config),
        "personal_data": _personal(table, made, samples, config),
        "sources": {
            name: _amount(kept & (table.source == index), last)
            | {"given": _amount(table.source == index, table["sizes"][:, 0])}
            for index, name in enumerate(table.names)
        },
        "terms": _terms(table, kept),
        "splits": {
            name: _amount(kept & (made.split == index), last)
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


def _stages(table: Table, made: Decisions, samples: dict[int, dict], config: CurateConfig) -> list[dict[str, Any]]:
    shown, stages = _dropped(table, made, config), []
    there = np.ones(len(table), bool)
    for place, name in enumerate(config.stages):
        before, after = table["sizes"][:, place], table["sizes"][:, place + 1]
        gone = made.stage == place
        dropped = []
        for reason in np.unique(made.reason[gone]).tolist():
            which = gone & (made.reason == reason)
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
                "in": _amount(there, before),
                "out": _amount(there & ~gone, after),
                "by_source": {
                    source: {
                        "in": _amount(there & (table.source == index), before),
                        "out": _amount(there & ~gone & (table.source == index), after),
                    }
                    for index, source in enumerate(table.names)
                },
                "dropped": sorted(dropped, key=lambda one: (-one["documents"], one["reason"])),
            }
        )
        there &= ~gone
    return stages


def _mended(table: Table) -> dict[str, dict[str, int]]:
    """What reading, normalising and C4's line rules changed: documents and places."""
    made = {}
    for prefix, label in (("lines.", "removed lines: "), ("mended.", "")):
        for name, counts in table.scores(prefix):
            found = np.nan_to_num(counts)
            made[label + name] = {"documents": int((found > 0).sum()), "places": int(found.sum(dtype=np.float64))}
    return dict(sorted(made.items(), key=lambda item: -item[1]["documents"]))


def _lengths(table: Table, kept: np.ndarray) -> dict[str, list[int]]:
    """Documents by tokens: those that were given (as the stage after reading saw them), and those that stay."""
    edges = [*_LENGTHS, np.iinfo(np.int64).max]
    given = table["sizes"][:, 0, 1]
    return {
        "tokens_from": list(_LENGTHS),
        "given": np.histogram(given[given > 0], edges)[0].tolist(),
        "kept": np.histogram(table["sizes"][kept, -1, 1], edges)[0].tolist(),
    }


def _languages(table: Table, kept: np.ndarray) -> dict[str, dict[str, int]]:
    codes, given = np.unique(table["language"], return_counts=True)
    made = {}
    for code, count in sorted(zip(codes.tolist(), given.tolist(), strict=True), key=lambda item: -item[1]):
        if code:
            made[code.decode()] = {"documents": count, "kept": int((kept & (table["language"] == code)).sum())}
    return made


def _duplicates(table: Table, made: Decisions, samples: dict[int, dict]) -> dict[str, Any]:
    if made.copies is None:
        return {}
    _, counts = np.unique(made.copies.kept_as, return_counts=True)
    sizes, clusters = np.unique(counts[counts > 1], return_counts=True)
    gone = made.copies.kept_as != np.arange(len(table))
    return {
        "exact": int((gone & made.copies.exact).sum()),
        "near": int((gone & ~made.copies.exact).sum()),
        "clusters": {str(size): count for size, count in zip(sizes.tolist(), clusters.tolist(), strict=True)},
        "examples": [[samples[row] for row in cluster if row in samples] for cluster in _clusters(made, table)],
    }


def _contamination(table: Table, made: Decisions, config: CurateConfig) -> dict[str, dict[str, int]]:
    if "decontaminate" not in config.stages:
        return {}
    there = _reach(made, config, "decontaminate")
    found = {}
    for name in decontaminate.set_names(config.decontaminate.against).values():
        hits = table.score(f"contaminated.{name}")
        with_hits = there & (hits > 0)
        found[name] = {
            "documents": int(with_hits.sum()),
            "dropped": int((with_hits & (hits >= config.decontaminate.min_hits)).sum()),
            "runs": int(hits[with_hits].sum(dtype=np.float64)),
        }
    return found


def _personal(table: Table, made: Decisions, samples: dict[int, dict], config: CurateConfig) -> dict[str, Any]:
    if "personal_data" not in config.stages:
        return {}
    there = _reach(made, config, "personal_data")
    kinds: dict[str, Any] = {}
    for kind, counts in table.scores("personal."):
        having = there & (counts > 0)
        if not having.any():
            continue
        contexts = []
        for row in _first(np.flatnonzero(having), table, _CONTEXTS):
            notes = samples.get(row, {}).get("notes", {}).get("personal", [])
            contexts += [context for found, context in notes if found == kind][:1]
        places = int(counts[having].sum(dtype=np.float64))
        kinds[kind] = {"documents": int(having.sum()), "places": places, "contexts": contexts}
    return {"action": config.personal_data.action, "kinds": kinds}


def _terms(table: Table, kept: np.ndarray) -> dict[str, dict[str, Any]]:
    """Topic -> group -> documents and occurrences in what stays, and the share of the topic's occurrences."""
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
