"""Every rule on texts small enough to count by hand, and what is not to be tripped over."""

# ruff: noqa: RUF001  (letters and marks of other scripts are meant)

import dataclasses
import gzip
import json
import math
import os
import pathlib
import subprocess
import sys
import time
import zipfile

import pytest

from llmjax.curate.filters.normalise import normalise
from llmjax.curate.filters.quality import RULES, clean_lines, failures, scores, split_words
from llmjax.curate.filters.quality_config import RULE_SETS, QualityConfig
from llmjax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[3]
PUBLISHED = QualityConfig(**{rule.name: rule.published for rule in RULES})
PROSE = """\
The sun was low when they came to the river, and the ferry had gone. Anna put down the basket with the bread.
"We have to wait," she said. Her brother did not answer; he looked at the water and thought of the winter.

On the other bank a light went on. Somebody was calling, but the wind carried the words away. They sat down in the
grass that grew along the path, and the dog lay beside them. Was it going to be a long night? Nobody could tell."""


def one(text: str, name: str) -> float:
    return scores(text)[name]


@pytest.mark.parametrize(
    "text, words",
    [
        ("one two,  three\n\tfour", ["one", "two,", "three", "four"]),
        ("吾輩は猫 cat", ["吾", "輩", "は", "猫", "cat"]),
        ("abc漢def", ["abc", "漢", "def"]),
        ("naïve café", ["naïve", "café"]),
        ("한국어 텍스트", ["한국어", "텍스트"]),
        ("", []),
    ],
)
def test_words(text, words):
    assert split_words(text) == words


def test_words_of_gopher():
    text = "The cat -- 12 # lies: the..."  # "--" and "#" are no words; The cat 12 lies: the...
    found = scores(text)
    assert found["words"] == 5
    assert found["mean_word"] == (3 + 3 + 2 + 5 + 6) / 5
    assert found["longest_word"] == 6
    assert found["alphabetic"] == 4 / 6  # The cat lies: the... of those and 12 and #; marks as -- are not asked
    assert found["hashes"] == 1 / 7
    assert found["ellipses"] == 1 / 7
    assert found["stop_words"] == 1
    assert found["newlines"] == 0
    assert found["spaceless"] == 0


def test_stop_words_are_counted_once_each():
    assert one("The the THE and And with", "stop_words") == 3
    assert one("thee band without", "stop_words") == 0


def test_lines_of_gopher():
    text = "- one\n  • two\nthree...\nfour…  \n\nfive - six\n"  # six lines, one of them empty
    assert one(text, "bullet_lines") == 2 / 6
    assert one(text, "ellipsis_lines") == 2 / 6


def test_copies_of_lines_and_paragraphs():
    text = "aa\nbbb\n\naa\nbbb\n\nc"  # characters: 17 with six newlines
    found = scores(text)
    assert len(text) == 17
    assert found["duplicate_lines"] == 2 / 5
    assert found["duplicate_line_chars"] == (2 + 3) / 17
    assert found["duplicate_paragraphs"] == 1 / 3
    assert found["duplicate_paragraph_chars"] == 6 / 17
    assert found["duplicate_text_line_chars"] == 5 / 11


def test_the_most_frequent_run():
    text = "a bb a bb c a bb a d"  # "a bb" three times, "a bb a" and "bb a" twice
    found = scores(text)
    assert len(text) == 20
    assert found["top_2"] == 3 * len("a bb") / 20
    assert found["top_3"] == 2 * len("a bb a") / 20
    assert found["top_4"] == 0
    assert one("a b c d e f", "top_2") == 0  # once is no repetition


def test_runs_that_occurred_before():
    run = "a b c d e f"
    text = f"{run} x {run} y {run} z"
    found = scores(text)
    assert len(text) == 41
    assert found["repeated_5"] == 2 * 5 / 41  # a b c d e: the second and the third time, without white space
    assert found["repeated_6"] == 2 * 6 / 41
    assert found["repeated_7"] == 0
    assert one("a " * 20, "repeated_5") == 15 / 40  # the first five letters are new; after each copy it goes on behind
    assert one("a " * 20, "repeated_10") == 10 / 40


def slow_runs(words: list[str], chars: int) -> dict[str, float]:
    """Gopher's repetition, word by word."""
    found = {}
    for n in (2, 3, 4):
        runs = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
        most = max(runs, key=runs.count, default="")
        found[f"top_{n}"] = len(most) * runs.count(most) / chars if runs.count(most) > 1 else 0.0
    for n in range(5, 11):
        seen, total, place = set(), 0, 0
        while place + n <= len(words):
            run = tuple(words[place : place + n])
            if run in seen:
                total += sum(map(len, run))
                place += n
            else:
                seen.add(run)
                place += 1
        found[f"repeated_{n}"] = total / chars
    return found


@pytest.mark.parametrize("alphabet", [2, 3, 5, 20])
def test_runs_equal_the_plain_search(alphabet):
    state, words = 1, []
    for _ in range(400):
        state = state * 1103515245 + 12345 & 0x7FFFFFFF
        words.append("w" * (1 + (state >> 16) % alphabet))
    text = " ".join(words)
    found = scores(text)
    for name, value in slow_runs(words, len(text)).items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


def test_sentences():
    assert one("One. Two! Three? Four", "sentences") == 4
    assert one('He said "No." Then he left.\nA heading\n\nEnd.', "sentences") == 4
    assert one("Version 3.5 of U.S.A is out.", "sentences") == 1
    assert one("吾輩は猫である。名前はまだ無い。どこで生れたか。", "sentences") == 3


def test_documents_of_c4():
    found = scores("Lorem Ipsum dolor, lorem ipsum; f() { return {}; }")
    assert found["lorem_ipsum"] == 2
    assert found["curly_brackets"] == 2


def test_lines_of_fineweb():
    text = "A short one\nThis line is a good deal longer than that.\n\nAnd so is this line, which has no end"
    found = scores(text)
    assert found["short_lines"] == 1 / 3
    assert found["punctuated_lines"] == found["punctuated_joined_lines"] == 1 / 3
    assert found["newlines"] == 3 / 21
    assert one("a. \nb！\nc۔\nd", "punctuated_lines") == 3 / 4


def test_a_sentence_over_several_lines_is_one_line():
    text = "It was a long sentence that went\non and on over several lines\nuntil it came to its end."
    assert one(text, "punctuated_lines") == 1 / 3
    assert one(text, "punctuated_joined_lines") == 1


def test_lines_that_c4_removes():
    text = "Keep this line [3] here.\n\nHome\nWe use cookies to improve.\nPlease enable JavaScript.\n" + "x" * 1001
    cleaned, counts = clean_lines(text)
    assert cleaned == "Keep this line [3] here.\n\nHome\nPlease enable JavaScript."
    assert counts == {"policy": 1, "long_word": 1}
    cleaned, counts = clean_lines(text, QualityConfig(c4_citations=True, c4_javascript=True, c4_min_line_words=3))
    assert cleaned == "Keep this line  here."
    assert counts == {"citations": 1, "policy": 1, "long_word": 1, "javascript": 1, "few_words": 1}
    cleaned, counts = clean_lines("A dot.\nA comma,\n“Quoted.”\nTo be...", QualityConfig(c4_terminal_punctuation=True))
    assert (cleaned, counts) == ("A dot.\n“Quoted.”", {"terminal_punctuation": 2})
    assert clean_lines(text, QualityConfig(rules=("gopher",))) == (text, {})
    assert clean_lines("漢" * 5000) == ("漢" * 5000, {})  # each letter is a word


def test_prose_passes_every_rule_as_published():
    assert failures(scores(PROSE), PUBLISHED) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_rule_holds_at_its_bound_and_breaks_beyond(rule):
    good, step = scores(PROSE), -1e-9 if rule.least else 1e-9
    assert failures(good | {rule.score: rule.published}, PUBLISHED) == []
    assert rule.name in failures(good | {rule.score: rule.published + step}, PUBLISHED)
    off = dataclasses.replace(PUBLISHED, **{rule.name: None})
    assert rule.name not in failures(good | {rule.score: rule.published + step}, off)
    others = tuple(name for name in RULE_SETS if name != rule.rule_set)
    assert rule.name not in failures(
        good | {rule.score: rule.published + step}, dataclasses.replace(PUBLISHED, rules=others)
    )


def test_a_changed_threshold_needs_only_scores():
    kept = json.loads(json.dumps(scores(PROSE)))
    assert failures(kept) == []
    assert failures(kept, QualityConfig(gopher_min_words=200)) == ["gopher_min_words"]
    assert failures(kept, QualityConfig(gopher_min_words=200, rules=("c4", "fineweb"))) == []


def test_rules_and_config_name_the_same():
    fields = {field.name: field.default for field in dataclasses.fields(QualityConfig)}
    bounds = {name for name in fields if "_min_" in name or "_max_" in name} - {"c4_min_line_words", "c4_max_word"}
    assert bounds == {rule.name for rule in RULES}
    starred = {rule.name for rule in RULES if fields[rule.name] != rule.published}
    assert starred == {"gopher_max_words", "c4_max_curly_brackets", "fineweb_max_line_chars"}
    assert {rule.rule_set for rule in RULES} == set(RULE_SETS)
    assert all(rule.score in scores("") for rule in RULES)


def test_a_classifier_has_its_say():
    config = QualityConfig(classifier="model.npz", min_classifier=0.5)
    assert failures(scores(PROSE) | {"classifier": 0.4}, config) == ["min_classifier"]
    assert failures(scores(PROSE) | {"classifier": 0.6}, config) == []
    with pytest.raises(UserError, match="no model given"):
        QualityConfig(min_classifier=0.5)


def test_unknown_rules_are_refused():
    with pytest.raises(UserError, match=r"'gofer' \(did you mean 'gopher'\?\)"):
        QualityConfig(rules=("gofer",))


def test_english_rules_are_for_english():
    german = scores("Der Fluss war breit, als sie kamen. Die Fähre lag am anderen Ufer im Nebel. " * 4)
    assert "gopher_min_stop_words" in failures(german, language="en")
    assert "gopher_min_stop_words" not in failures(german, language="de")


def test_japanese_is_not_judged_by_the_length_of_its_words():
    text = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所で泣いていた。"
    found = scores(text + "しかもあとで聞くとそれは書生という人間中で一番獰悪な種族であったそうだ。")
    assert found["spaceless"] == 1 and found["mean_word"] == 1
    assert failures(found, PUBLISHED, "ja") == []


@pytest.mark.parametrize(
    "text", ["", "word", "\n", "\n\n\n\n", "   ", "😀", "😀😀 😀", "#", "...", "漢", "\0", "\ud800"]
)
def test_scores_of_next_to_nothing_are_finite(text):
    found = scores(text)
    assert all(math.isfinite(value) for value in found.values())
    assert json.loads(json.dumps(found)) == found
    assert "gopher_min_words" in failures(found)
    clean_lines(text)


@pytest.mark.parametrize("unit", ["x", "漢", "é", "a ", "\n", "a\n", "#", ". ", "-", "\n\n", "a. ", "😀", "[", "0"])
def test_a_megabyte_of_one_thing_is_fast(unit):
    text = unit * (1_000_000 // len(unit))
    started = time.process_time()
    assert all(math.isfinite(value) for value in scores(text).values())
    clean_lines(text)
    assert time.process_time() - started < 10  # at most 2 s; what grows with the square takes minutes


def test_scores_do_not_depend_on_the_process():
    program = (
        "import sys; from llmjax.curate.filters.quality import scores; print(repr(scores(sys.stdin.read())), end='')"
    )
    for seed in ("1", "2"):  # of Python's own hashes
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", program], input=PROSE, capture_output=True, text=True, env=environment, check=True
        )
        assert done.stdout == repr(scores(PROSE))
    assert list(scores(PROSE)) == list(scores(""))


def test_the_defaults_keep_books_and_documentation(shared_data):
    for file, least in (("peps/peps.jsonl.gz", 0.85), ("rust-book/rust-book.jsonl.gz", 0.9)):
        with gzip.open(shared_data / file, "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in list(lines)[:60]]
        kept = [not failures(scores(clean_lines(text)[0])) for text in texts]
        assert sum(kept) / len(kept) >= least, file
    for file in sorted((shared_data / "gutenberg").glob("*.gz")):
        with gzip.open(file, "rt", encoding="utf-8", newline=None) as lines:
            assert not failures(scores(clean_lines(lines.read())[0])), file


def test_declarations_in_almost_four_hundred_languages_pass(shared_data):
    broken, count = [], 0
    with zipfile.ZipFile(shared_data / "udhr2" / "udhr2.zip") as file:
        for name in file.namelist():
            if name.endswith(".txt"):
                count += 1
                text = normalise(file.read(name).decode("utf-8", "replace"))[0]
                broken += [name] if failures(scores(clean_lines(text)[0]), language="xx") else []
    assert count > 300 and len(broken) / count < 0.08  # some are short, or in scripts whose full stops are not known
