"""Suggestions on the data card name the setting to change, and appear only if numbers give cause."""

import pytest

from llmjax.report import curation_advice


def report(**changes) -> dict:
    """A report on a hundred documents from two inputs that gives no cause for advice."""
    amount = {"documents": 100, "tokens": 1000}
    half = {"records": {"documents": 50}, "kept": {"documents": 50, "tokens": 500}}
    default = {
        "records": amount,
        "kept": amount,
        "stages": [],
        "sources": {"a": half, "b": half},
        "config": {"stages": ["read", "decontaminate"], "decontaminate": {"against": ["set.jsonl"]}},
        "personal_data": {},
        "licences": {"MIT": 100},
    }
    return default | changes


def dropped(stage: str, reason: str, documents: int, **by_source: int) -> list[dict]:
    return [{"stage": stage, "dropped": [{"reason": reason, "documents": documents, "by_source": by_source}]}]


def test_good_numbers_give_no_advice():
    assert curation_advice.suggest(report()) == []
    assert curation_advice.suggest(report(stages=dropped("quality", "gopher_min_words", 5))) == []
    assert curation_advice.suggest(report(stages=dropped("duplicates", "near duplicate", 60))) == [], (
        "duplicates are not mistakes"
    )
    assert curation_advice.suggest(report(stages=dropped("read", "content type image/png", 60))) == [], (
        "nor are the pictures of a crawl"
    )


@pytest.mark.parametrize(
    ("stage", "reason", "field"),
    [
        ("read", "no field 'text'", "curate.inputs.NAME"),
        ("extract", "no main text", "curate.inputs.NAME.content"),
        ("language", "language de", "curate.language.keep"),
        ("language", "language uncertain", "curate.language.min_confidence"),
        ("quality", "gopher_min_words", "curate.quality.gopher_min_words"),
        ("quality", "all lines removed", "curate.quality.c4_remove_policy"),
    ],
)
def test_advice_on_a_frequent_reason_names_its_setting(stage, reason, field):
    (advice,) = curation_advice.suggest(report(stages=dropped(stage, reason, 6)))
    assert advice.startswith("6% of all documents") and reason in advice and advice.endswith(f"change {field}.")


def test_advice_on_an_input_with_few_kept_or_most_of_the_tokens():
    few = {"records": {"documents": 50}, "kept": {"documents": 5, "tokens": 50}}
    most = {"records": {"documents": 50}, "kept": {"documents": 50, "tokens": 950}}
    stages = dropped("duplicates", "near duplicate", 45, a=45)
    on_few, on_most = curation_advice.suggest(report(stages=stages, sources={"a": few, "b": most}))
    assert on_few.startswith("Of a, 5 of 50 documents are kept; most were dropped in duplicates for “near duplicate”")
    assert on_most.startswith("95.0% of all tokens are from b")


def test_advice_on_missing_settings():
    config = {"stages": ["read", "decontaminate"], "decontaminate": {"against": []}}
    personal = {"action": "count", "kinds": {"email": {}}}
    advice = curation_advice.suggest(report(config=config, personal_data=personal, licences={"not stated": 100}))
    assert [line.split(":")[0] for line in advice] == [
        "No evaluation set was given",
        "Personal data are still in the text",
        "All documents have no licence",
    ]
    nothing = curation_advice.suggest(report(kept={"documents": 0, "tokens": 0}, sources={}, licences={}))
    assert nothing == ["No document was kept."]
