"""Languages are told apart, cheaply, and always alike."""

# ruff: noqa: RUF001  (letters of other scripts are meant)

import gzip
import json
import time

import pytest

from llmjax.curate.config import LanguageConfig
from llmjax.curate.filters.language import detect, excerpt
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
def test_languages(text, code):
    found, confidence = detect(text)
    assert found == code and 0.5 < confidence <= 1
    assert detect(text) == (found, confidence)


@pytest.mark.parametrize("text", ["", "\n", "123 + 456 = 579", "😀 ... !?", "___"])
def test_no_letters_no_language(text):
    assert detect(text) == ("und", 0.0)


@pytest.mark.parametrize("text", ["\ud800 half a character", "x" * 1_000_000, "漢" * 1_000_000, "a\0b"])
def test_odd_texts_have_a_probability(text):
    started = time.process_time()
    assert 0 <= detect(text)[1] <= 1
    assert time.process_time() - started < 3  # of which 0.6 s load the model


def test_a_long_text_is_read_in_places():
    text = "".join(chr(0x4E00 + i % 1000) for i in range(10_000))
    assert excerpt(text, 40, 4) == "\n".join([text[:10], text[3330:3340], text[6660:6670], text[-10:]])
    assert excerpt(text, 40, 1) == text[:40]
    assert excerpt(text[:40], 40, 4) == text[:40]


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(UserError, match=r"curate\.language\.places=0"):
        LanguageConfig(places=0)
    with pytest.raises(UserError, match=r"curate\.language\.min_confidence=50"):
        LanguageConfig(min_confidence=50)


def test_twelve_languages(shared_data):
    with gzip.open(shared_data / "tldr/tldr-12-langs.jsonl.gz", "rt", encoding="utf-8") as lines:
        pages = [json.loads(line) for line in list(lines)[::5]]
    right = [detect(page["text"])[0] == page["lang"] for page in pages]
    assert sum(right) / len(right) >= 0.98  # 0.994 of all pages
