"""Rows of tools/bench_curate.py on recall and precision: near-duplicates, personal data, main text of pages."""

from collections import Counter, defaultdict
from collections.abc import Iterator
import functools
import gzip
import json
from pathlib import Path
import random
import re
import tempfile

from curate_rows import NOT_MEASURED, Bench, Row, read_jsonl
import numpy as np

from llmjax.curate.config import DuplicatesConfig
from llmjax.curate.dedup import duplicates
from llmjax.curate.document import hash_content
from llmjax.curate.engine.measurements import Measurement
from llmjax.curate.engine.runners import LocalRunner
from llmjax.curate.filters import personal_data
from llmjax.curate.readers import html
from llmjax.data.store import minhash

_PEER_RECALL = {0.91: "97%", 0.85: "99%", 0.68: "48%"}  # Jaccard similarity -> recall of datatrove in an earlier run
_COPIES = 250  # per similarity
_DIFFERENT = 1300  # passages without copies
_KINDS = {
    "EMAIL_ADDRESS": "email",
    "IP_ADDRESS": "ip",
    "US_SSN": "ssn",
    "IBAN_CODE": "iban",
    "CREDIT_CARD": "card",
    "PHONE_NUMBER": "phone",
}
# Kind -> (recall of datatrove, which finds only e-mail and IP addresses, target recall, target precision).
_PERSONAL_DATA = {
    "email": ("1.00", 0.99, 0.95),
    "ip": (".93", 0.99, 0.95),
    "ssn": ("0", 0.95, 0.95),
    "iban": ("0", 0.95, 0.95),
    "card": ("0", 0.92, 0.95),
    "phone": ("0", 0.75, 0.6),
}


def duplicate_rows(bench: Bench) -> Iterator[Row]:
    """Edited copies of real passages, among different passages. Their similarity is computed exactly."""
    texts, copies, different = make_duplicates(bench.texts)
    kept = _find_representatives(texts)
    peer = bench.peer("signatures", texts)
    for similarity, target in _PEER_RECALL.items():
        pairs = [(copy, original) for copy, original, copy_similarity in copies if copy_similarity == similarity]
        if not pairs:
            continue
        peer_recall = target
        if peer:
            hits = sum(peer["first"][copy] == peer["first"][original] for copy, original in pairs)
            peer_recall = f"{hits / len(pairs):.0%}"
        recall = sum(kept[copy] == kept[original] for copy, original in pairs) / len(pairs)
        yield Row(f"copies found at Jaccard {similarity}, of {len(pairs)}", f"{recall:.0%}", peer_recall, target)
    num_removed = sum(kept[index] != index for index in different)
    peer_removed = str(sum(peer["first"][index] != index for index in different)) if peer else NOT_MEASURED
    yield Row(f"  removed of {len(different):,} different ones", str(num_removed), peer_removed, "0")


def make_duplicates(texts: list[str]) -> tuple[list[str], list[tuple[int, int, float]], list[int]]:
    """(documents, (copy, original, similarity) of each pair, documents without copies)."""
    rng = random.Random(0)
    num_passages = _COPIES * len(_PEER_RECALL) + _DIFFERENT
    passages = _select_different(_cut_passages(texts, rng), num_passages)
    num_originals = len(passages) * _COPIES // num_passages  # per similarity
    documents, copies = [*passages], []
    for index, target in enumerate(_PEER_RECALL):
        for original in range(index * num_originals, (index + 1) * num_originals):
            if copy := edit(passages[original], target, rng):
                copies.append((len(documents), original, target))
                documents.append(copy)
    return documents, copies, list(range(num_originals * len(_PEER_RECALL), len(passages)))


def _cut_passages(texts: list[str], rng: random.Random) -> list[str]:
    """Passages of 100 to 450 words."""
    passages = []
    for text in texts:
        words = text.split()
        while len(words) >= 100:
            count = rng.randrange(100, 450)
            passages.append(" ".join(words[:count]))
            words = words[count:]
    rng.shuffle(passages)
    return [passage for passage in passages if len(_shingles(passage)) >= 80]


def _select_different(passages: list[str], count: int) -> list[str]:
    """Up to `count` passages with pairwise similarities below 0.2."""
    owners, selected, sizes = defaultdict(list), [], []
    for passage in passages:
        shingles = _shingles(passage)
        num_common = Counter(owner for shingle in shingles for owner in owners[shingle])
        if all(common < 0.2 * (len(shingles) + sizes[owner] - common) for owner, common in num_common.items()):
            for shingle in shingles:
                owners[shingle].append(len(selected))
            selected.append(passage)
            sizes.append(len(shingles))
        if len(selected) == count:
            break
    return selected


def edit(text: str, target: float, rng: random.Random) -> str | None:
    """The text with words replaced, inserted and deleted, to within .01 of a similarity; None if that fails."""
    shingles = _shingles(text)
    for _ in range(20):
        words = text.split(" ")
        similarity = 1.0
        while similarity > target + 0.01:
            position, kind = rng.randrange(len(words)), rng.randrange(8)
            if kind == 0 and similarity > target + 0.15:
                length = rng.randrange(4, 12)
                words[position : position + length] = [f"rewritten{rng.randrange(10_000)}" for _ in range(length)]
            elif kind < 6:
                words[position] = f"other{rng.randrange(10_000)}"
            elif kind == 6:
                words.insert(position, f"new{rng.randrange(10_000)}")
            else:
                del words[position]
            similarity = jaccard(shingles, _shingles(" ".join(words)))
        if similarity > target - 0.01:
            return " ".join(words)
    return None


def jaccard(one: set, other: set) -> float:
    return len(one & other) / len(one | other)


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text)
    return set(zip(*(words[offset:] for offset in range(minhash.SHINGLE_WORDS)), strict=False))


def _find_representatives(texts: list[str]) -> list[int]:
    """For each text the one that is kept instead, as in `llmjax curate` with two parts."""
    offsets = np.array([0, len(texts) // 2, len(texts)])
    content_hash = np.frombuffer(b"".join(map(hash_content, texts)), ">u8").reshape(-1, 2).astype(np.uint64)
    with tempfile.TemporaryDirectory() as folder, LocalRunner(2) as runner:
        units = [Measurement(Path(folder), str(index)) for index in range(2)]
        for unit, begin, end in zip(units, offsets[:-1], offsets[1:], strict=True):
            signatures = [minhash.compute_signature(text.encode("utf-8", "replace")) for text in texts[begin:end]]
            unit.signatures.write_bytes(np.stack(signatures).tobytes())
        documents = duplicates.Candidates(
            content_hash, np.arange(len(texts)), np.ones(len(texts), bool), np.zeros(len(texts), bool)
        )
        exchange = functools.partial(runner.exchange, folder=Path(folder) / "exchange")
        copies = duplicates.find_copies(documents, units, offsets, DuplicatesConfig(), exchange)
    return copies.representative.tolist()


def score_personal_data(sentences: list[dict]) -> tuple[Counter, Counter, Counter, Counter]:
    """Numbers by kind: labels, labels that a span covers, spans, and spans that touch a label of their kind."""
    num_labels, num_hits, num_found, num_correct = Counter(), Counter(), Counter(), Counter()
    for sentence in sentences:
        spans = personal_data.find_spans(sentence["full_text"])
        labels = [
            personal_data.Span(_KINDS[span["entity_type"]], span["start_position"], span["end_position"])
            for span in sentence["spans"]
            if span["entity_type"] in _KINDS
        ]
        for label in labels:
            num_labels[label.kind] += 1
            num_hits[label.kind] += any(
                s.kind == label.kind and s.begin <= label.begin and s.end >= label.end for s in spans
            )
        for span in spans:
            num_found[span.kind] += 1
            num_correct[span.kind] += any(
                s.kind == span.kind and s.begin < span.end and span.begin < s.end for s in labels
            )
    return num_labels, num_hits, num_found, num_correct


def personal_rows(bench: Bench) -> Iterator[Row]:
    """Synthetic sentences with labelled spans (Microsoft Presidio's). A label is a hit if a span covers it."""
    if not bench.shared:
        return
    sentences = json.loads(gzip.decompress((bench.shared / "pii" / "synth_dataset_v2.json.gz").read_bytes()))
    num_labels, num_hits, num_found, num_correct = score_personal_data(sentences)
    for kind, (peer, recall, precision) in _PERSONAL_DATA.items():
        yield Row(
            f"{kind} found, of {num_labels[kind]:,}", f"{num_hits[kind] / num_labels[kind]:.3f}", peer, str(recall)
        )
        if num_found[kind]:
            share = f"{num_correct[kind] / num_found[kind]:.3f}"
            yield Row(f"  correct, of {num_found[kind]:,} found", share, "", str(precision))
    yield Row("personal data, MB/s", bench.rate(personal_data.find_spans), "", "2")


def extraction_rows(bench: Bench) -> Iterator[Row]:
    """Words of the main text compared with annotations of the same pages, mean over the pages."""
    if not bench.shared:
        return
    pages = read_jsonl(bench.shared / "web-articles" / "articles.jsonl.gz")
    scores = [word_f1(html.extract_main_text(page["html"], page["url"])[0], page["text"]) for page in pages]
    yield Row(f"main text, word F1 of {len(pages)} pages", f"{sum(scores) / len(scores):.3f}", ".963", "0.95")


def word_f1(text: str, true: str) -> float:
    """F1 score of the two bags of words."""
    words, true_words = (Counter(re.findall(r"\w+", side.lower())) for side in (text, true))
    return 2 * (words & true_words).total() / max(words.total() + true_words.total(), 1)
