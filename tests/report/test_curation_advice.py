"""Advice on the data card: given where numbers ask for it, and names the setting to change."""

import pytest

from llmjax.report import curation_advice


def report(**changes) -> dict:
    """Of a hundred documents from two inputs of which nothing is to be said."""
    amount = {"documents": 100, "tokens": 1000}
    half = {"documents": 50, "tokens": 500, "given": {"documents": 50}}
    plain = {
        "records": amount,
        "kept": amount,
        "stages": [],
        "sources": {"a": half, "b": half},
        "config": {"stages": ["read", "decontaminate"], "decontaminate": {"against": ["set.jsonl"]}},
        "personal_data": {},
        "licences": {"MIT": 100},
    }
    return plain | changes


def dropped(stage: str, reason: str, documents: int, **by_source: int) -> list[dict]:
    return [{"stage": stage, "dropped": [{"reason": reason, "documents": documents, "by_source": by_source}]}]


def test_good_numbers_give_no_advice():
    assert curation_advice.of(report()) == []
    assert curation_advice.of(report(stages=dropped("quality", "gopher_min_words", 5))) == []
    assert curation_advice.of(report(stages=dropped("duplicates", "near duplicate", 60))) == [], "copies are no mistake"
    assert curation_advice.of(report(stages=dropped("read", "content type image/png", 60))) == [], (
        "nor are a crawl's pictures"
    )


@pytest.mark.parametrize(
    ("stage", "reason", "field"),
    [
        ("read", "no field 'text'", "curate.inputs.NAME"),
        ("extract", "no main text", "curate.inputs.NAME.content"),
        ("language", "language de", "curate.language.keep"),
        ("language", "language uncertain", "curate.language.min_confidence"),
        ("quality", "gopher_min_words", "curate.quality.gopher_min_words"),
        ("quality", "no line left", "curate.quality.c4_policy"),
    ],
)
def test_a_frequent_reason_names_its_setting(stage, reason, field):
    (advice,) = curation_advice.of(report(stages=dropped(stage, reason, 6)))
    assert advice.startswith("6% of all documents") and reason in advice and advice.endswith(f"change {field}.")


def test_an_input_that_is_nearly_lost_or_outweighs_the_others():
    few = {"documents": 5, "tokens": 50, "given": {"documents": 50}}
    most = {"documents": 50, "tokens": 950, "given": {"documents": 50}}
    stages = dropped("duplicates", "near duplicate", 45, a=45)
    few_kept, outweighs = curation_advice.of(report(stages=stages, sources={"a": few, "b": most}))
    assert few_kept.startswith("Of a, 5 of 50 documents are kept; most were dropped in duplicates for “near duplicate”")
    assert outweighs.startswith("95.0% of all tokens are from b")


def test_missing_settings():
    config = {"stages": ["read", "decontaminate"], "decontaminate": {"against": []}}
    personal = {"action": "count", "kinds": {"email": {}}}
    advice = curation_advice.of(report(config=config, personal_data=personal, licences={"not given": 100}))
    assert [line.split(":")[0] for line in advice] == [
        "No evaluation set was looked for",
        "Personal data are still in the text",
        "All documents have no licence",
    ]
    nothing = curation_advice.of(report(kept={"documents": 0, "tokens": 0}, sources={}, licences={}))
    assert nothing == ["No document was kept."]
