"""Public sets of tools/finetune_recipes.py, as records by split, from the files of docs/testdata.md."""

import csv
import gzip
import io
import itertools
import json
from pathlib import Path
import re
from typing import Any
import xml.etree.ElementTree as ElementTree
import zipfile

Record = dict[str, Any]
Splits = dict[str, list[Record]]

SPLITS = ("train", "validation", "test")
TOPICS = ("World", "Sports", "Business", "Sci/Tech")
SHARED_LETTERS = 30  # two sentences that share so many letters in a row are copies
# Of preferences: characters of a prompt and of an answer, and how many records a split has.
MAX_PROMPT, MAX_ANSWER = 160, 220
NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 160, 16, 100


def read_sst2(data: Path) -> Splits:
    """Sentences of film reviews, 0 (negative) or 1 (positive), in their published splits."""
    records = {}
    for split, name in zip(SPLITS, ("train", "dev", "test"), strict=True):
        lines = (data / "sst2" / f"{name}.tsv").read_text().splitlines()
        pairs = [line.rsplit("\t", 1) for line in lines]
        records[split] = [{"text": text, "label": ("negative", "positive")[int(label)]} for text, label in pairs]
    return records


def read_agnews(data: Path) -> Splits:
    """Title and description of news of four topics: of the published test set, every tenth is for validation, and every
    tenth for test."""
    rows = csv.reader(io.StringIO(gzip.decompress((data / "agnews" / "test.csv.gz").read_bytes()).decode()))
    return _split(
        [{"text": f"{title}. {description}", "label": TOPICS[int(topic) - 1]} for topic, title, description in rows]
    )


def read_rte(data: Path) -> Splits:
    """PASCAL RTE 1 to 3: their development sets for training and, every tenth pair, validation; their test sets."""
    records: Splits = {split: [] for split in SPLITS}
    with zipfile.ZipFile(data / "rte" / "rte.zip") as archive:
        for name in sorted(name for name in archive.namelist() if name.endswith(".xml")):
            text = re.sub(r"<!DOCTYPE[^>]*>", "", archive.read(name).decode())
            for number, pair in enumerate(ElementTree.fromstring(text.encode())):
                label = "yes" if pair.get("value", pair.get("entailment")) in ("TRUE", "YES") else "no"
                split = "test" if name.endswith("_test.xml") else "train" if number % 10 else "validation"
                first, second = (" ".join((pair.findtext(tag) or "").split()) for tag in ("t", "h"))
                records[split].append({"text": first, "pair": second, "label": label})
    return records


def read_stsb(data: Path) -> Splits:
    """Pairs of sentences with a similarity from 0 to 5, in their published splits."""
    records = {}
    for split, name in zip(SPLITS, ("train", "dev", "test"), strict=True):
        with open(data / "stsb" / f"stsb-en-{name}.csv", newline="") as file:
            rows = list(csv.reader(file))
        records[split] = [{"text": first, "pair": second, "label": float(score)} for first, second, score in rows]
    return records


def read_instructions(data: Path) -> Splits:
    """Instructions with an input, which may be empty, and an answer; every tenth is for validation, and every tenth for
    test."""
    records = json.loads(gzip.decompress((data / "gpteacher" / "roleplay-instruct.json.gz").read_bytes()))
    lines = gzip.decompress((data / "self-instruct" / "seed_tasks.jsonl.gz").read_bytes()).splitlines()
    for task in map(json.loads, lines):
        records += [{"instruction": task["instruction"], **instance} for instance in task["instances"]]
    answer = lambda record: record.get("response", record.get("output", ""))
    return _split(
        [
            {"instruction": record["instruction"], "input": record["input"], "output": answer(record)}
            for record in records
            if answer(record).strip()
        ]
    )


def read_preferences(data: Path) -> Splits:
    """Pairs of answers to the short instructions of `read_instructions`. Its own answer, cut to its first sentences, is
    chosen; rejected is in turn

    - the answer to another instruction, the next longer or the next shorter one;
    - the chosen answer with its sentences in reverse order;
    - the chosen answer with every second sentence replaced by the one before it.

    So lengths are alike: that a longer answer is better would be right of about half of the pairs. Every third of the
    first pairs is for test.
    """
    pairs = []
    for record in itertools.chain.from_iterable(read_instructions(data).values()):
        prompt = "\n\n".join(filter(None, (record["instruction"].strip(), record["input"].strip())))
        answer = _first_sentences(record["output"], MAX_ANSWER)
        if len(prompt) <= MAX_PROMPT and len(_sentences(answer)) > 1:
            pairs.append((prompt, answer))
    tests, others = pairs[: 3 * NUM_TEST : 3], [pair for at, pair in enumerate(pairs) if at % 3 or at >= 3 * NUM_TEST]
    splits = others[NUM_VALIDATION:][:NUM_TRAIN], others[:NUM_VALIDATION], tests
    return {split: _reject_answers(part) for split, part in zip(SPLITS, splits, strict=True)}


def read_review_text(data: Path) -> list[str]:
    """Sentences about films, without labels: those of the train split of SST-2, of the subjectivity and of the sentence
    polarity sets.

    The last two have reviews of which SST-2 was made: a sentence that is a copy of one of the validation or the test
    split, or of a part of one, is left out.
    """
    records, texts = read_sst2(data), []
    for archive_name in ("subjectivity", "sentence-polarity"):
        with zipfile.ZipFile(data / archive_name / f"{archive_name.replace('-', '_')}.zip") as archive:
            for name in sorted(archive.namelist()):
                if not name.endswith(("/", ".txt")):
                    texts += archive.read(name).decode("latin-1").splitlines()
    held_out = [record["text"] for split in ("validation", "test") for record in records[split]]
    train = [record["text"] for record in records["train"]]
    return drop_copies(train, held_out) + drop_copies(texts, held_out + train)


def drop_copies(texts: list[str], held_out: list[str]) -> list[str]:
    """The texts that share no SHARED_LETTERS letters in a row with a text of `held_out`, spaces and marks left out, and
    contain none of its texts; shorter ones of less than half as many letters may occur by chance."""
    shared: set[str] = set()
    whole: set[str] = set()
    for letters in map(_letters, held_out):
        shared |= {letters[at : at + SHARED_LETTERS] for at in range(len(letters) - SHARED_LETTERS + 1)}
        if SHARED_LETTERS // 2 <= len(letters) < SHARED_LETTERS:
            whole.add(letters)
    kept = []
    for text in texts:
        letters = _letters(text)
        pieces = (letters[at : at + SHARED_LETTERS] for at in range(max(1, len(letters) - SHARED_LETTERS + 1)))
        if not any(piece in shared for piece in pieces) and not any(short in letters for short in whole):
            kept.append(text)
    return kept


def write_splits(records: Splits, folder: Path, name: str) -> dict[str, Path]:
    """Write the records of each split as JSON lines; returns the files by split."""
    paths = {}
    for split, lines in records.items():
        paths[split] = folder / f"{name}-{split}.jsonl"
        paths[split].write_text("".join(json.dumps(record) + "\n" for record in lines))
    return paths


def _split(records: list[Record]) -> Splits:
    """Every tenth record is for test, and the next one for validation."""
    by_split: Splits = {split: [] for split in SPLITS}
    for number, record in enumerate(records):
        by_split[{0: "test", 1: "validation"}.get(number % 10, "train")].append(record)
    return by_split


def _reject_answers(pairs: list[tuple[str, str]]) -> list[Record]:
    """Prompts with the chosen and a rejected answer, in turn of the three kinds of `read_preferences`."""
    by_length = sorted(range(len(pairs)), key=lambda number: len(pairs[number][1]))
    place = {number: place for place, number in enumerate(by_length)}
    records = []
    for number, (prompt, chosen) in enumerate(pairs):
        neighbour = by_length[(place[number] + (1 if number % 2 else -1)) % len(pairs)]
        sentences = _sentences(chosen)
        rejected = (
            pairs[neighbour][1],
            " ".join(reversed(sentences)),
            " ".join(sentences[at - at % 2] for at in range(len(sentences))),
        )[number % 3]
        messages = [{"role": "user", "content": prompt}]
        records.append({"prompt": messages, "chosen": chosen, "rejected": rejected})
    return records


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", re.sub(r"-[lr]rb-", "", text.lower()))


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", text.strip())


def _first_sentences(text: str, most: int) -> str:
    """The first sentences that have together at most so many characters; "" if the first one has more."""
    end, sentences = 0, _sentences(text)
    while end < len(sentences) and len(" ".join(sentences[: end + 1])) <= most:
        end += 1
    return " ".join(sentences[:end])
