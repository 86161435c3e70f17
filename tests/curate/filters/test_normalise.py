"""Damaged text is repaired; unusual but correct text stays unchanged."""

# ruff: noqa: RUF001  (letters and marks of other scripts are intended)

import time

import pytest

from llmjax.curate.config import NormaliseConfig
from llmjax.curate.filters.normalise import normalise


@pytest.mark.parametrize(
    "damaged, repaired, counts",
    [
        ("cafÃ© and â€œteaâ€\x9d", "café and “tea”", {"mojibake": 1}),
        ("schÃ¶n", "schön", {"mojibake": 1}),
        ("Ð¿Ñ€Ð¸Ð²ÐµÑ‚", "привет", {"mojibake": 1}),
        ("ok\ncafÃ©\nschön", "ok\ncafé\nschön", {"mojibake": 1}),
        ("a &amp;lt; b &eacute;&#233;&#xE9;", "a < b ééé", {"entities": 4}),
        ("&amp;amp;hearts; &amp;nosuch; &copyrighted;", "♥ &nosuch; &copyrighted;", {"entities": 2}),
        ("a\r\nb\rc\fd\u2028e", "a\nb\nc\nd\ne", {"newlines": 4}),
        ("a\xa0b\u2009c", "a b c", {"spaces": 2}),
        ("a\0b\0", "ab", {"nul": 2}),
        ("a\x07b\x7f\x1b", "ab", {"control": 3}),
        ("co\xadop\u200b\ufeff", "coop", {"zero_width": 3}),
        ("a\u200db\u200c", "ab", {"zero_width": 2}),
        ("e\u0301", "é", {"nfc": 1}),
        ("\ud83d\ude00 and \ud800", "😀 and \ufffd", {"surrogates": 3}),
        ("\n\n  a b \n\n", "  a b", {"surrounding_space": 5}),
        ("a" + 40 * "\u0301", "á" + 29 * "\u0301", {"stacked_marks": 10, "nfc": 1}),
        ("", "", {}),
        ("\n\n\n", "", {"surrounding_space": 3}),
    ],
)
def test_damaged_text_is_repaired_and_counted(damaged, repaired, counts):
    assert normalise(damaged) == (repaired, counts)


@pytest.mark.parametrize(
    "text",
    [
        "Plain words, and a tab\there.",
        "naïve café, “quoted” — fine…",
        "Ça va? ÀÉÎÕÜ; Größe, Ærøskøbing",
        "吾輩は猫である。名前はまだ無い。　",
        "Привет, мир! Γειά σου Κόσμε",
        "می\u200cخواهم",
        "👩\u200d👩\u200d👧 family",
        "x = a & b; AT&T, &nosuch; &",
        "<p>&eacute;</p> shows an entity",
        "├── src\n└── tests  √2 ≈ 1.4",
        "한국어 텍스트",
    ],
)
def test_correct_text_is_unchanged(text):
    text = text.rstrip()
    assert normalise(text) == (text, {})


def test_repairs_can_be_disabled():
    text = "cafÃ© &amp; 5\xa0km"
    assert normalise(text, NormaliseConfig(mojibake=False))[0] == "cafÃ© & 5 km"
    assert normalise(text, NormaliseConfig(entities=False))[0] == "café &amp; 5 km"
    assert normalise(text, NormaliseConfig(spaces=False))[0] == "café & 5\xa0km"


def test_repaired_text_needs_no_further_repair():
    damaged = "cafÃ©\r\n&amp;amp;lt;\0\x07e\u0301\xa0\u200b\ud800"
    once, _ = normalise(damaged)
    assert normalise(once) == (once, {})
    once.encode()


@pytest.mark.parametrize(
    "unit",
    [
        "x",
        "漢",
        "é",
        "Ã©",
        "&amp;",
        "&",
        "amp;",
        "\0",
        "\ud800",
        "\u0301\u0323",
        "\u200d",
        "\xad",
        " ",
        "\n",
        "<&",
        "😀",
    ],
)
def test_normalisation_takes_linear_time(unit):
    text = "&" + unit * (1_000_000 // len(unit))
    started = time.process_time()
    normalise(text)
    assert time.process_time() - started < 5  # takes at most 0.5 s; quadratic time would take minutes
