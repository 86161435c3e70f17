"""Quality scores and rules, on texts small enough to count by hand."""

# ruff: noqa: RUF001  (letters and marks of other scripts are intended)

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
from llmjax.curate.filters.quality import RULES, compute_scores, list_violations, remove_c4_lines, split_words
from llmjax.curate.filters.quality_config import RULE_SETS, QualityConfig
from llmjax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[3]
PUBLISHED = QualityConfig(**{rule.name: rule.published for rule in RULES})
PROSE = """\
The sun was low when they came to the river, and the ferry had gone. Anna put down the basket with the bread.
"We have to wait," she said. Her brother did not answer; he looked at the water and thought of the winter.

On the other bank a light went on. Somebody was calling, but the wind carried the words away. They sat down in the
grass that grew along the path, and the dog lay beside them. Was it going to be a long night? Nobody could tell."""


def score(text: str, name: str) -> float:
    return compute_scores(text)[name]


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
def test_text_is_split_into_words(text, words):
    assert split_words(text) == words


def test_word_scores():
    text = "The cat -- 12 # lies: the..."  # "--" and "#" are no words; The cat 12 lies: the...
    scores = compute_scores(text)
    assert scores["words"] == 5
    assert scores["mean_word_length"] == (3 + 3 + 2 + 5 + 6) / 5
    assert scores["alphabetic"] == 4 / 6  # The cat lies: the... of those and 12 and #; marks as -- are not asked
    assert scores["hashes"] == 1 / 7
    assert scores["ellipses"] == 1 / 7
    assert scores["stop_words"] == 1
    assert scores["newlines"] == 0
    assert scores["spaceless"] == 0


def test_stop_words_are_counted_once_each():
    assert score("The the THE and And with", "stop_words") == 3
    assert score("thee band without", "stop_words") == 0


def test_bullet_and_ellipsis_lines():
    text = "- one\n  • two\nthree...\nfour…  \n\nfive - six\n"  # six lines, one of them empty
    assert score(text, "bullet_lines") == 2 / 6
    assert score(text, "ellipsis_lines") == 2 / 6


def test_duplicate_lines_and_paragraphs():
    text = "aa\nbbb\n\naa\nbbb\n\nc"  # characters: 17 with six newlines
    scores = compute_scores(text)
    assert len(text) == 17
    assert scores["duplicate_lines"] == 2 / 5
    assert scores["duplicate_line_chars"] == (2 + 3) / 17
    assert scores["duplicate_paragraphs"] == 1 / 3
    assert scores["duplicate_paragraph_chars"] == 6 / 17
    assert scores["duplicate_text_chars"] == 5 / 11


def test_top_ngrams():
    text = "a bb a bb c a bb a d"  # "a bb" three times, "a bb a" and "bb a" twice
    scores = compute_scores(text)
    assert len(text) == 20
    assert scores["top_2gram"] == 3 * len("a bb") / 20
    assert scores["top_3gram"] == 2 * len("a bb a") / 20
    assert scores["top_4gram"] == 0
    assert score("a b c d e f", "top_2gram") == 0  # one occurrence is no repetition


def test_duplicate_ngrams():
    run = "a b c d e f"
    text = f"{run} x {run} y {run} z"
    scores = compute_scores(text)
    assert len(text) == 41
    assert scores["duplicate_5gram"] == 2 * 5 / 41  # "a b c d e" the second and third time, without spaces
    assert scores["duplicate_6gram"] == 2 * 6 / 41
    assert scores["duplicate_7gram"] == 0
    assert (
        score("a " * 20, "duplicate_5gram") == 15 / 40
    )  # the first five letters are new; after a repeat the search resumes behind it
    assert score("a " * 20, "duplicate_10gram") == 10 / 40


def slow_ngram_scores(words: list[str], num_chars: int) -> dict[str, float]:
    """Gopher's repetition scores, by a direct search."""
    scores = {}
    for n in (2, 3, 4):
        ngrams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
        top = max(ngrams, key=ngrams.count, default="")
        scores[f"top_{n}gram"] = len(top) * ngrams.count(top) / num_chars if ngrams.count(top) > 1 else 0.0
    for n in range(5, 11):
        occurred, total, position = set(), 0, 0
        while position + n <= len(words):
            ngram = tuple(words[position : position + n])
            if ngram in occurred:
                total += sum(map(len, ngram))
                position += n
            else:
                occurred.add(ngram)
                position += 1
        scores[f"duplicate_{n}gram"] = total / num_chars
    return scores


@pytest.mark.parametrize("alphabet", [2, 3, 5, 20])
def test_ngram_scores_equal_a_direct_search(alphabet):
    state, words = 1, []
    for _ in range(400):
        state = state * 1103515245 + 12345 & 0x7FFFFFFF
        words.append("w" * (1 + (state >> 16) % alphabet))
    text = " ".join(words)
    scores = compute_scores(text)
    for name, value in slow_ngram_scores(words, len(text)).items():
        assert scores[name] == pytest.approx(value, abs=1e-12), name


def test_sentences():
    assert score("One. Two! Three? Four", "sentences") == 4
    assert score('He said "No." Then he left.\nA heading\n\nEnd.', "sentences") == 4
    assert score("Version 3.5 of U.S.A is out.", "sentences") == 1
    assert score("吾輩は猫である。名前はまだ無い。どこで生れたか。", "sentences") == 3


def test_lorem_ipsum_and_curly_brackets():
    scores = compute_scores("Lorem Ipsum dolor, lorem ipsum; f() { return {}; }")
    assert scores["lorem_ipsum"] == 2
    assert scores["curly_brackets"] == 2


def test_short_and_punctuated_lines():
    text = "A short one\nThis line is a good deal longer than that.\n\nAnd so is this line, which has no end"
    scores = compute_scores(text)
    assert scores["short_lines"] == 1 / 3
    assert scores["punctuated_lines"] == 1 / 3
    assert scores["newlines"] == 3 / 21
    assert score("a. \nb！\nc۔\nd", "punctuated_lines") == 3 / 4


def test_a_sentence_over_several_lines_counts_as_one_line():
    text = "It was a long sentence that went\non and on over several lines\nuntil it came to its end."
    assert score(text, "punctuated_lines") == 1


def test_c4_removes_lines():
    text = "Keep this line [3] here.\n\nHome\nWe use cookies to improve.\nPlease enable JavaScript.\n" + "x" * 1001
    cleaned, counts = remove_c4_lines(text)
    assert cleaned == "Keep this line [3] here.\n\nHome\nPlease enable JavaScript."
    assert counts == {"policy": 1, "long_word": 1}
    cleaned, counts = remove_c4_lines(
        text, QualityConfig(c4_remove_citations=True, c4_remove_javascript=True, c4_min_line_words=3)
    )
    assert cleaned == "Keep this line  here."
    assert counts == {"citations": 1, "policy": 1, "long_word": 1, "javascript": 1, "few_words": 1}
    cleaned, counts = remove_c4_lines(
        "A dot.\nA comma,\n“Quoted.”\nTo be...", QualityConfig(c4_require_terminal_punctuation=True)
    )
    assert (cleaned, counts) == ("A dot.\n“Quoted.”", {"terminal_punctuation": 2})
    assert remove_c4_lines(text, QualityConfig(rules=("gopher",))) == (text, {})
    assert remove_c4_lines("漢" * 5000) == ("漢" * 5000, {})  # each letter is a word


def test_prose_passes_all_rules_at_published_bounds():
    assert list_violations(compute_scores(PROSE), PUBLISHED) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_each_rule_is_violated_beyond_its_bound(rule):
    good, step = compute_scores(PROSE), -1e-9 if rule.is_minimum else 1e-9
    assert list_violations(good | {rule.score: rule.published}, PUBLISHED) == []
    assert rule.name in list_violations(good | {rule.score: rule.published + step}, PUBLISHED)
    off = dataclasses.replace(PUBLISHED, **{rule.name: None})
    assert rule.name not in list_violations(good | {rule.score: rule.published + step}, off)
    others = tuple(name for name in RULE_SETS if name != rule.rule_set)
    assert rule.name not in list_violations(
        good | {rule.score: rule.published + step}, dataclasses.replace(PUBLISHED, rules=others)
    )


def test_thresholds_apply_to_stored_scores():
    kept = json.loads(json.dumps(compute_scores(PROSE)))
    assert list_violations(kept) == []
    assert list_violations(kept, QualityConfig(gopher_min_words=200)) == ["gopher_min_words"]
    assert list_violations(kept, QualityConfig(gopher_min_words=200, rules=("c4", "fineweb"))) == []


def test_rules_and_config_have_the_same_names():
    fields = {field.name: field.default for field in dataclasses.fields(QualityConfig)}
    bounds = {name for name in fields if "_min_" in name or "_max_" in name} - {
        "c4_min_line_words",
        "c4_max_word_length",
    }
    assert bounds == {rule.name for rule in RULES}
    starred = {rule.name for rule in RULES if fields[rule.name] != rule.published}
    assert starred == {"gopher_max_words", "c4_max_curly_brackets", "fineweb_max_duplicate_text_chars"}
    assert {rule.rule_set for rule in RULES} == set(RULE_SETS)
    assert all(rule.score in compute_scores("") for rule in RULES)


def test_the_classifier_acts_as_a_rule():
    config = QualityConfig(classifier="model.npz", min_classifier_score=0.5)
    assert list_violations(compute_scores(PROSE) | {"classifier": 0.4}, config) == ["min_classifier_score"]
    assert list_violations(compute_scores(PROSE) | {"classifier": 0.6}, config) == []
    with pytest.raises(UserError, match="there is no model"):
        QualityConfig(min_classifier_score=0.5)


def test_unknown_rules_are_refused():
    with pytest.raises(UserError, match=r"'gofer' \(did you mean 'gopher'\?\)"):
        QualityConfig(rules=("gofer",))


def test_english_rules_apply_to_english_only():
    german = compute_scores("Der Fluss war breit, als sie kamen. Die Fähre lag am anderen Ufer im Nebel. " * 4)
    assert "gopher_min_stop_words" in list_violations(german, language="en")
    assert "gopher_min_stop_words" not in list_violations(german, language="de")


def test_word_length_rules_skip_japanese():
    text = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所で泣いていた。"
    scores = compute_scores(text + "しかもあとで聞くとそれは書生という人間中で一番獰悪な種族であったそうだ。")
    assert scores["spaceless"] == 1 and scores["mean_word_length"] == 1
    assert list_violations(scores, PUBLISHED, "ja") == []


@pytest.mark.parametrize(
    "text", ["", "word", "\n", "\n\n\n\n", "   ", "😀", "😀😀 😀", "#", "...", "漢", "\0", "\ud800"]
)
def test_scores_of_tiny_texts_are_finite(text):
    scores = compute_scores(text)
    assert all(math.isfinite(value) for value in scores.values())
    assert json.loads(json.dumps(scores)) == scores
    assert "gopher_min_words" in list_violations(scores)
    remove_c4_lines(text)


@pytest.mark.parametrize("unit", ["x", "漢", "é", "a ", "\n", "a\n", "#", ". ", "-", "\n\n", "a. ", "😀", "[", "0"])
def test_scoring_takes_linear_time(unit):
    text = unit * (1_000_000 // len(unit))
    started = time.process_time()
    assert all(math.isfinite(value) for value in compute_scores(text).values())
    remove_c4_lines(text)
    assert time.process_time() - started < 10  # takes at most 2 s; quadratic time would take minutes


def test_scores_do_not_depend_on_the_process():
    program = "import sys; from llmjax.curate.filters import quality; "
    program += "print(repr(quality.compute_scores(sys.stdin.read())), end='')"
    for seed in ("1", "2"):  # of Python's own hashes
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        process = subprocess.run(
            [sys.executable, "-c", program], input=PROSE, capture_output=True, text=True, env=environment, check=True
        )
        assert process.stdout == repr(compute_scores(PROSE))
    assert list(compute_scores(PROSE)) == list(compute_scores(""))


def test_defaults_keep_books_and_documentation(shared_data):
    for file, least in (("peps/peps.jsonl.gz", 0.85), ("rust-book/rust-book.jsonl.gz", 0.9)):
        with gzip.open(shared_data / file, "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in list(lines)[:60]]
        kept = [not list_violations(compute_scores(remove_c4_lines(text)[0])) for text in texts]
        assert sum(kept) / len(kept) >= least, file
    for file in sorted((shared_data / "gutenberg").glob("*.gz")):
        with gzip.open(file, "rt", encoding="utf-8", newline=None) as lines:
            assert not list_violations(compute_scores(remove_c4_lines(lines.read())[0])), file


def test_most_languages_pass_the_rules(shared_data):
    violating, count = [], 0
    with zipfile.ZipFile(shared_data / "udhr2" / "udhr2.zip") as file:
        for name in file.namelist():
            if name.endswith(".txt"):
                count += 1
                text = normalise(file.read(name).decode("utf-8", "replace"))[0]
                violating += [name] if list_violations(compute_scores(remove_c4_lines(text)[0]), language="xx") else []
    assert count > 300 and len(violating) / count < 0.08  # some are short, or their full stops are not in the list
