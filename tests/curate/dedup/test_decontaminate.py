"""n-grams shared with evaluation sets, in all file formats of sets."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmjax.curate.config import DecontaminateConfig
from llmjax.curate.dedup import decontaminate
from llmjax.errors import UserError

LONG = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron"  # fifteen words: three 13-grams
)


FILES = ("set.jsonl", "set.jsonl.gz", "set.json", "set.csv", "set.csv.gz", "set.tsv", "set.parquet", "set.txt")


def write(folder, name: str) -> str:
    path = folder / name
    record = {"id": 7, "question": LONG, "choices": ["yes", "no"]}
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"q": [LONG], "n": [1]}), path)
    elif name.endswith(".csv"):
        two_lines = LONG.replace("kappa ", "kappa\n")  # a quoted field may contain a line end
        path.write_text(f'id,q\n1,"{two_lines}"\n')
    elif name.endswith(".csv.gz"):
        path.write_bytes(gzip.compress(f'id,q\n1,"Alpha, {LONG}"\n'.encode()))
    elif name.endswith(".tsv"):
        path.write_text(f"id\tq\n1\t{LONG}\n")
    elif name.endswith(".json"):
        path.write_text(json.dumps([record], indent=1))
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress((json.dumps(record) + "\n").encode()))
    else:
        record["choices"] += ["a line separator\u2028in a text"]
        path.write_text(
            json.dumps(record, ensure_ascii=False) + "\n" if name.endswith(".jsonl") else f"Other.\n\n{LONG}\n"
        )
    return str(path)


@pytest.mark.parametrize("name", FILES)
def test_all_formats_of_sets_are_read(tmp_path, name):
    config = DecontaminateConfig(against=(write(tmp_path, name),))
    assert decontaminate.count_shared_ngrams(f"Before it. {LONG.title()}, and after.", config) == {"set": 3}
    assert decontaminate.count_shared_ngrams(" ".join(LONG.split()[:12]), config) == {}


def test_punctuation_case_and_spacing_do_not_matter(tmp_path):
    config = DecontaminateConfig(against=(write(tmp_path, "set.txt"),))
    assert decontaminate.count_shared_ngrams("“" + LONG.upper().replace(" ", " — ") + "”", config) == {"set": 3}


def test_short_examples_match_as_a_whole_and_very_short_ones_do_not(tmp_path):
    (tmp_path / "short.txt").write_text("one two three four five six seven eight\n\nnine ten eleven\n")
    config = DecontaminateConfig(against=(str(tmp_path / "short.txt"),))
    assert decontaminate.count_shared_ngrams(
        "zero one two three four five six seven eight nine ten eleven", config
    ) == {"short": 1}
    assert decontaminate.count_shared_ngrams("one two three four five six seven. nine ten eleven", config) == {}


@pytest.mark.parametrize(
    ("name", "content"), [("bad.jsonl", "{"), ("bad.json", "{"), ("bad.parquet", "x"), ("bad.pdf", "%PDF-1.4")]
)
def test_the_error_names_an_unreadable_set(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}.*cannot be read"):
        list(decontaminate.read_examples(str(tmp_path / name)))
