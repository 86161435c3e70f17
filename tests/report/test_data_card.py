"""The data card has the content of report.json, shows no personal data, escapes text, and loads no resources."""

import json
import pathlib
import re

import pytest

from llmjax.cli import main
from llmjax.errors import UserError
from llmjax.report import data_card
from tests.curate import corpora
from tests.report.runs import HOSTILE, PageParser

RAW = {"mail": "maria.lopez@example.org", "card": "4111 1111 1111 1111", "ip": "83.145.20.31"}


def curate(workdir: pathlib.Path, inputs: dict, **settings) -> dict:
    settings = {"workers": 1, "max_bad_fraction": 1, "quality__rules": "('gopher',)", **settings}
    assert main.run(corpora.curate_arguments(workdir, inputs, **settings)) == 0
    return json.loads((workdir / "report.json").read_text())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Texts that are kept or dropped for several reasons, with personal data and hostile text in all fields."""
    folder, texts = tmp_path_factory.mktemp("raw"), corpora.documents()
    clean = {f"c{number}": text for number, text in enumerate(texts[:40])}
    messy = {f"near{number}": corpora.replace_words(texts[number], 1, number) for number in range(8)}
    messy |= {f"exact{number}": texts[number].upper() for number in range(8)}
    personal = " ".join(f"Write to {value} about it." for value in RAW.values())
    messy["kept"] = f"{texts[50]}\n\n{personal} {HOSTILE.encode('utf-8', 'replace').decode()}"
    messy["short"] = f"Too short. {personal}"
    # The excerpt of a dropped document ends in the middle of an address.
    messy["cut"] = "#" * 190 + f" {RAW['mail']}"
    messy[f"page-of-{RAW['mail']}"] = "Too short as well."
    messy[f"<script>{HOSTILE[:20]}"] = "Hostile in its id, and short."
    messy["evil"] = f"</pre></section>{HOSTILE.encode('utf-8', 'replace').decode()} "
    path = corpora.write_jsonl(folder / "messy.jsonl", messy, licence="<b>odd</b>", origin=f"mailto:{RAW['mail']}")
    with open(path, "a") as file:
        file.write(f'{{"id": "torn", "text": "{RAW["mail"]}\n')
        file.write(json.dumps({"id": "number", "text": 7, "note": RAW["mail"]}) + "\n")
    evil = folder / "questions" / "test.jsonl"
    corpora.write_jsonl(evil, {"q": " ".join(texts[30].split()[:20])})
    return {"clean": corpora.write_jsonl(folder / "clean.jsonl", clean), "messy": path, "set": evil}


def make_card(inputs: dict[str, pathlib.Path], workdir: pathlib.Path, **settings) -> tuple[dict, str]:
    """(report.json, report.html)."""
    sources = {name: path for name, path in inputs.items() if name != "set"}
    report = curate(workdir, sources, decontaminate__against=repr((str(inputs["set"]),)), **settings)
    return report, (workdir / "report.html").read_text()


@pytest.mark.parametrize("action", ["replace", "count", "drop"])
def test_no_personal_value_is_in_the_report_or_on_the_page(inputs, tmp_path, action):
    report, page = make_card(inputs, tmp_path, personal_data__action=action)
    for text in (page, (tmp_path / "report.json").read_text()):
        for value in (*RAW.values(), "maria.lopez", "maria.lo"):
            assert value not in text
    assert report["personal_data"]["kinds"]["email"]["contexts"]


def test_samples_are_masked_without_the_stage_personal_data(inputs, tmp_path):
    _, page = make_card(inputs, tmp_path, stages="('read','quality','duplicates','decontaminate','split')")
    assert not [value for value in RAW.values() if value in page]


def test_the_page_has_the_numbers_of_the_report(inputs, tmp_path):
    report, page = make_card(inputs, tmp_path)
    text = PageParser(page).text
    for stage in report["stages"]:
        assert stage["stage"].replace("_", " ") in text
        for entry in stage["dropped"]:
            assert entry["reason"] in text and len(entry["samples"]) == min(5, entry["documents"])
    for name in (*report["sources"], *report["splits"], *report["languages"], *report["contamination"]):
        assert name in text
    assert set(report["contamination"]) == {"questions/test"} and "in questions/test" in text
    for digest in (
        report["fingerprint"],
        report["config_sha256"],
        *(file["sha256"] for file in report["outputs"].values()),
    ):
        assert digest[:16] in text
    assert report["duplicates"]["exact"] == 8 and len(report["duplicates"]["examples"]) == 5
    assert report["origins"].keys() == {"not stated", "mailto:<EMAIL>"} and "<b>odd</b>" in text
    assert page.count("<svg") >= 5
    assert "curate.inputs.NAME.licence" in text, "suggestions are shown"


def test_hostile_text_is_escaped_and_the_page_loads_no_resources(inputs, tmp_path):
    _, page = make_card(inputs, tmp_path)
    reader = PageParser(page)
    assert "script" not in reader.tags and reader.tags.count("b") == page.count("<summary><b>")
    assert not {name for name, _ in reader.attributes} & {"src", "href", "srcset", "onclick", "onload"}
    assert not re.search(r"url\(|@import", page.partition("</style>")[0])
    assert "alert('x')" in reader.text


def test_the_card_of_an_empty_input(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    report = curate(tmp_path / "w", {"none": tmp_path / "empty.jsonl"})
    assert report["records"]["documents"] == 0
    assert "no document is kept: the inputs are empty" in list(data_card.format_summary(report))
    assert "No document was kept." in PageParser((tmp_path / "w" / "report.html").read_text()).text


def test_a_corpus_without_documents_suggests_no_next_command(tmp_path, capsys):
    path = corpora.write_jsonl(tmp_path / "in.jsonl", {"a": "Short.", "b": "Shorter."})
    curate(tmp_path / "w", {"in": path})
    output = capsys.readouterr().out
    assert "no document is kept of 2" in output and "next:" not in output
    assert "Of in, 0 of 2 documents are kept" in PageParser((tmp_path / "w" / "report.html").read_text()).text


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"records": {"documents": 1}}'])
def test_an_invalid_report_is_refused(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError, match="not a report of this version"):
        main.run(["curate", "report", f"--workdir={tmp_path}"])


def test_the_card_is_rendered_again_from_the_report(inputs, tmp_path, capsys):
    _, page = make_card(inputs, tmp_path)
    (tmp_path / "report.html").unlink()
    assert main.run(["curate", "report", f"--workdir={tmp_path}"]) == 0
    assert (tmp_path / "report.html").read_text() == page
