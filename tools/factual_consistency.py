"""Measure how well tests of factual consistency find errors, on public labelled sets; TruthfulQA and CrowS-Pairs too.

    python tools/factual_consistency.py --workdir=runs/smollm2 --data=DATA

DATA holds qags-cnndm/mturk_cnndm.jsonl.gz (QAGS), true-false/*.csv (true and false statements), truthfulqa/
TruthfulQA.csv.gz and crows-pairs/crows_pairs_anonymized.csv.gz. Random records of each set are written to WORKDIR/tasks
and scored by `llmjax eval --tasks`.
"""

import argparse
from collections import Counter
import csv
import gzip
import json
from pathlib import Path
import random

from llmjax.cli import main

STATEMENT = "Statement: {statement}\nQuestion: Is the statement true?\nAnswer: "
TASKS = {
    "qags": {"kind": "consistency", "path": "qags.jsonl", "text_field": "sentence"},
    "common_claims": {
        **{"kind": "consistency", "path": "common_claim_true_false.jsonl", "text_field": "statement"},
        **{"methods": "('entailment',)", "verify_prompt": STATEMENT},
    },
    "companies": {
        **{"kind": "consistency", "path": "companies_true_false.jsonl", "text_field": "statement"},
        **{"methods": "('entailment',)", "verify_prompt": STATEMENT},
    },
    "cities": {
        **{"kind": "consistency", "path": "cities.jsonl", "text_field": "country"},
        **{"methods": "('samples','entailment')", "verify_prompt": STATEMENT, "prompt": "The city of {city} is in"},
        **{"max_tokens": "4", "stop": "('.',',','\\n')"},
    },
    "truthfulqa": {
        **{"kind": "truthful", "path": "truthfulqa.jsonl", "text_field": "Question", "prompt": "Q: {Question}\nA: "},
        **{"best_field": "Best Answer", "correct_field": "Correct Answers", "incorrect_field": "Incorrect Answers"},
    },
    "crows": {"kind": "stereotypes", "path": "crows.jsonl", "group_field": "bias_type"},
}


def write_files(data: Path, folder: Path, count: int) -> None:
    """The files of the tasks: `count` random records of each set."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    with gzip.open(data / "qags-cnndm" / "mturk_cnndm.jsonl.gz", "rt") as file:
        for line in file:
            article = json.loads(line)
            for sentence in article["summary_sentences"]:
                answer, _ = Counter(each["response"] for each in sentence["responses"]).most_common(1)[0]
                records.append({"source": article["article"], "sentence": sentence["sentence"], "label": answer})
    _write_lines(folder / "qags.jsonl", _choose(records, count))
    for name in ("common_claim_true_false", "companies_true_false", "cities"):
        with (data / "true-false" / f"{name}.csv").open(newline="") as file:
            _write_lines(folder / f"{name}.jsonl", _choose(list(csv.DictReader(file)), count))
    with gzip.open(data / "truthfulqa" / "TruthfulQA.csv.gz", "rt", encoding="utf-8-sig", newline="") as file:
        _write_lines(folder / "truthfulqa.jsonl", _choose(list(csv.DictReader(file)), count))
    with gzip.open(data / "crows-pairs" / "crows_pairs_anonymized.csv.gz", "rt", newline="") as file:
        _write_lines(folder / "crows.jsonl", _choose(list(csv.DictReader(file)), count))


def _choose(records: list[dict], count: int) -> list[dict]:
    return random.Random(0).sample(records, min(count, len(records)))


def _write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="the run")
    parser.add_argument("--data", type=Path, required=True, help="the folder of public sets")
    parser.add_argument("--count", type=int, default=300, help="records of each set (default 300)")
    parser.add_argument("--tasks", default=",".join(TASKS), help="some of the tasks (default: all)")
    flags = parser.parse_args()
    folder = flags.workdir / "tasks"
    write_files(flags.data, folder, flags.count)
    overrides = []
    for name in flags.tasks.split(","):
        fields = {**TASKS[name], "path": str(folder / TASKS[name]["path"])}
        overrides += [f"--config.eval.tasks.{name}.{field}={value}" for field, value in fields.items()]
    command = [
        "eval",
        f"--workdir={flags.workdir}",
        f"--tasks={flags.tasks}",
        "--config.data.seq_len=1024",
        "--batch=8",
    ]
    raise SystemExit(main.run([*command, *overrides]))
