"""Rows of tools/bench_curate.py: how much of what is there the data room finds, and how much of what is not."""

from collections import Counter, defaultdict
from collections.abc import Iterator
import gzip
import json
from pathlib import Path
import random
import re
import tempfile

from curate_rows import NOT_GIVEN, Bench, Row, read_jsonl
import numpy as np

from llmjax.curate.config import DuplicatesConfig
from llmjax.curate.dedup import duplicates
from llmjax.curate.document import content_hash
from llmjax.curate.engine.measurements import Measurement
from llmjax.curate.engine.runners import LocalRunner
from llmjax.curate.filters import personal_data
from llmjax.curate.readers import html
from llmjax.data.store import minhash

_SIMILARITIES = {0.91: "97%", 0.85: "99%", 0.68: "48%"}  # and what the peer finds on the copies it was first run on
_COPIES = 250  # of each similarity
_UNLIKE = 1300
_KINDS = {
    "EMAIL_ADDRESS": "email",
    "IP_ADDRESS": "ip",
    "US_SSN": "ssn",
    "IBAN_CODE": "iban",
    "CREDIT_CARD": "card",
    "PHONE_NUMBER": "phone",
}
# Of the peer on the same sentences: it looks for addresses of e-mail and of machines alone.
_PERSONAL = {  # kind -> (recall of the peer, recall and precision to reach)
    "email": ("1.00", 0.99, 0.95),
    "ip": (".93", 0.99, 0.95),
    "ssn": ("0", 0.95, 0.95),
    "iban": ("0", 0.95, 0.95),
    "card": ("0", 0.92, 0.95),
    "phone": ("0", 0.75, 0.6),
}


def duplicate_rows(bench: Bench) -> Iterator[Row]:
    """Edited copies of real passages, among passages that are unlike; the true similarity is counted, not drawn."""
    texts, copies, unlike = planted(bench.texts)
    ours = _first_of_each(texts)
    peer = bench.peer("signatures", texts)
    for target, known in _SIMILARITIES.items():
        pairs = [(copy, original) for copy, original, near in copies if near == target]
        if not pairs:
            continue
        told = known
        if peer:
            told = f"{sum(peer['first'][copy] == peer['first'][original] for copy, original in pairs) / len(pairs):.0%}"
        found = sum(ours[copy] == ours[original] for copy, original in pairs) / len(pairs)
        yield Row(f"copies found at Jaccard {target}, of {len(pairs)}", f"{found:.0%}", told, known)
    false = sum(ours[index] != index for index in unlike)
    theirs = str(sum(peer["first"][index] != index for index in unlike)) if peer else NOT_GIVEN
    yield Row(f"  removed of {len(unlike):,} unlike ones", str(false), theirs, "0")


def planted(texts: list[str]) -> tuple[list[str], list[tuple[int, int, float]], list[int]]:
    """(documents, (copy, original, similarity) of each planted pair, documents that are unlike all others)."""
    draw = random.Random(0)
    passages = _unlike(_passages(texts, draw), _COPIES * len(_SIMILARITIES) + _UNLIKE)
    share = len(passages) * _COPIES // (_COPIES * len(_SIMILARITIES) + _UNLIKE)
    made, copies = [*passages], []
    for place, target in enumerate(_SIMILARITIES):
        for original in range(place * share, (place + 1) * share):
            if copy := edited(passages[original], target, draw):
                copies.append((len(made), original, target))
                made.append(copy)
    return made, copies, list(range(share * len(_SIMILARITIES), len(passages)))


def _passages(texts: list[str], draw: random.Random) -> list[str]:
    """Stretches of 100 to 450 words."""
    found = []
    for text in texts:
        words = text.split()
        while len(words) >= 100:
            count = draw.randrange(100, 450)
            found.append(" ".join(words[:count]))
            words = words[count:]
    draw.shuffle(found)
    return [passage for passage in found if len(_shingles(passage)) >= 80]


def _unlike(passages: list[str], count: int) -> list[str]:
    """So many of them, of which no two have a similarity of 0.2 or more."""
    owners, chosen, sizes = defaultdict(list), [], []
    for passage in passages:
        shingles = _shingles(passage)
        common = Counter(owner for shingle in shingles for owner in owners[shingle])
        if all(both < 0.2 * (len(shingles) + sizes[owner] - both) for owner, both in common.items()):
            for shingle in shingles:
                owners[shingle].append(len(chosen))
            chosen.append(passage)
            sizes.append(len(shingles))
        if len(chosen) == count:
            break
    return chosen


def edited(text: str, target: float, draw: random.Random) -> str | None:
    """The text with words replaced, put in and left out, and sentences rewritten, down to a similarity; within .01."""
    whole = _shingles(text)
    for _ in range(20):
        words = text.split(" ")
        near = 1.0
        while near > target + 0.01:
            place, kind = draw.randrange(len(words)), draw.randrange(8)
            if kind == 0 and near > target + 0.15:
                length = draw.randrange(4, 12)
                words[place : place + length] = [f"rewritten{draw.randrange(10_000)}" for _ in range(length)]
            elif kind < 6:
                words[place] = f"other{draw.randrange(10_000)}"
            elif kind == 6:
                words.insert(place, f"new{draw.randrange(10_000)}")
            else:
                del words[place]
            near = similarity(whole, _shingles(" ".join(words)))
        if near > target - 0.01:
            return " ".join(words)
    return None


def similarity(one: set, other: set) -> float:
    """Of Jaccard: what both have, of what either has."""
    return len(one & other) / len(one | other)


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text)
    return set(zip(*(words[offset:] for offset in range(minhash.SHINGLE_WORDS)), strict=False))


def _first_of_each(texts: list[str]) -> list[int]:
    """Of each text the one that stays in its place, as `llmjax curate` decides it, in two parts."""
    edges = np.array([0, len(texts) // 2, len(texts)])
    content = np.frombuffer(b"".join(map(content_hash, texts)), ">u8").reshape(-1, 2).astype(np.uint64)
    with tempfile.TemporaryDirectory() as folder, LocalRunner(2) as runner:
        units = [Measurement(Path(folder), str(index)) for index in range(2)]
        for unit, begin, end in zip(units, edges[:-1], edges[1:], strict=True):
            signatures = [minhash.compute_signature(text.encode("utf-8", "replace")) for text in texts[begin:end]]
            unit.signatures.write_bytes(np.stack(signatures).tobytes())
        rank, alive, stays = np.arange(len(texts)), np.ones(len(texts), bool), np.zeros(len(texts), bool)
        exchange = Path(folder) / "exchange"
        copies = duplicates.find(content, rank, alive, stays, units, edges, DuplicatesConfig(), runner, exchange)
    return copies.kept_as.tolist()


def personal_rows(bench: Bench) -> Iterator[Row]:
    """On synthetic sentences with labelled spans (Microsoft Presidio's). A span counts as found where it is covered."""
    if not bench.shared:
        return
    sentences = json.loads(gzip.decompress((bench.shared / "pii" / "synth_dataset_v2.json.gz").read_bytes()))
    there, hit, given, right = Counter(), Counter(), Counter(), Counter()
    for sentence in sentences:
        found = personal_data.find(sentence["full_text"])
        true = [
            (_KINDS[span["entity_type"]], span["start_position"], span["end_position"])
            for span in sentence["spans"]
            if span["entity_type"] in _KINDS
        ]
        for kind, begin, end in true:
            there[kind] += 1
            hit[kind] += any(one.kind == kind and one.begin <= begin and one.end >= end for one in found)
        for one in found:
            given[one.kind] += 1
            right[one.kind] += any(
                one.kind == kind and one.begin < end and begin < one.end for kind, begin, end in true
            )
    for kind, (peer, recall, precision) in _PERSONAL.items():
        yield Row(f"{kind} found, of {there[kind]:,}", f"{hit[kind] / there[kind]:.3f}", peer, str(recall))
        if given[kind]:
            yield Row(f"  right, of {given[kind]:,} given", f"{right[kind] / given[kind]:.3f}", "", str(precision))
    yield Row("personal data, MB/s", bench.rate(personal_data.find), "", "2")


def extraction_rows(bench: Bench) -> Iterator[Row]:
    """Words of the main text against what people marked on the same pages, mean of the pages."""
    if not bench.shared:
        return
    pages = read_jsonl(bench.shared / "web-articles" / "articles.jsonl.gz")
    each = [word_f1(html.main_text(page["html"], page["url"]).text, page["text"]) for page in pages]
    yield Row(f"main text, word F1 of {len(pages)} pages", f"{sum(each) / len(each):.3f}", ".963", "0.95")


def word_f1(text: str, true: str) -> float:
    """Of the two bags of words."""
    ours, theirs = (Counter(re.findall(r"\w+", side.lower())) for side in (text, true))
    return 2 * (ours & theirs).total() / max(ours.total() + theirs.total(), 1)
