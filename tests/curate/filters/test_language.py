"""Language detection on short, long and odd texts."""

# ruff: noqa: RUF001  (letters of other scripts are intended)

import gzip
import json
import time

import pytest

from llmjax.curate.config import LanguageConfig
from llmjax.curate.filters.language import detect, select_excerpts
from llmjax.errors import UserError


@pytest.mark.parametrize(
    "text, code",
    [
        ("The river was wide, and the ferry had already left when they came to the bank.", "en"),
        ("Der Fluss war breit, und die Fähre hatte schon abgelegt, als sie ans Ufer kamen.", "de"),
        ("La rivière était large, et le bac était déjà parti quand ils arrivèrent.", "fr"),
        ("Река была широка, и паром уже ушёл, когда они пришли на берег.", "ru"),
        ("吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。", "ja"),
        ("강은 넓었고 그들이 강가에 왔을 때 나룻배는 이미 떠난 뒤였다.", "ko"),
    ],
)
def test_languages_are_detected(text, code):
    detected, confidence = detect(text)
    assert detected == code and 0.5 < confidence <= 1
    assert detect(text) == (detected, confidence)


@pytest.mark.parametrize("text", ["", "\n", "123 + 456 = 579", "😀 ... !?", "___"])
def test_text_without_letters_has_no_language(text):
    assert detect(text) == ("und", 0.0)


@pytest.mark.parametrize("text", ["\ud800 half a character", "x" * 1_000_000, "漢" * 1_000_000, "a\0b"])
def test_odd_texts_have_a_probability_in_linear_time(text):
    started = time.process_time()
    assert 0 <= detect(text)[1] <= 1
    assert time.process_time() - started < 3  # loading the model takes 0.6 s


def test_excerpts_of_a_long_text_are_evenly_spaced():
    text = "".join(chr(0x4E00 + i % 1000) for i in range(10_000))
    assert select_excerpts(text, 40, 4) == "\n".join([text[:10], text[3330:3340], text[6660:6670], text[-10:]])
    assert select_excerpts(text, 40, 1) == text[:40]
    assert select_excerpts(text[:40], 40, 4) == text[:40]


def test_invalid_settings_are_refused():
    with pytest.raises(UserError, match=r"curate\.language\.num_excerpts=0"):
        LanguageConfig(num_excerpts=0)
    with pytest.raises(UserError, match=r"curate\.language\.min_confidence=50"):
        LanguageConfig(min_confidence=50)


def test_accuracy_on_twelve_languages(shared_data):
    with gzip.open(shared_data / "tldr/tldr-12-langs.jsonl.gz", "rt", encoding="utf-8") as lines:
        pages = [json.loads(line) for line in list(lines)[::5]]
    right = [detect(page["text"])[0] == page["lang"] for page in pages]
    assert sum(right) / len(right) >= 0.98  # 0.994 of all pages
