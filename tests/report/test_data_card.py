"""The data card tells what report.json holds, shows no personal data, survives hostile text, and loads nothing."""

import json
import pathlib
import re

import pytest

from llmjax.cli import main
from llmjax.errors import UserError
from llmjax.report import data_card
from tests.curate import corpora
from tests.report.runs import HOSTILE, Reader

RAW = {"mail": "maria.lopez@example.org", "card": "4111 1111 1111 1111", "ip": "83.145.20.31"}


def curate(workdir: pathlib.Path, inputs: dict, **settings) -> dict:
    settings = {"workers": 1, "max_bad_fraction": 1, "quality__rules": "('gopher',)", **settings}
    assert main.run(corpora.arguments(workdir, inputs, **settings)) == 0
    return json.loads((workdir / "report.json").read_text())


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Texts that stay and that go for several reasons, with personal data and hostile text in all places."""
    folder, texts = tmp_path_factory.mktemp("raw"), corpora.documents()
    clean = {f"c{number}": text for number, text in enumerate(texts[:40])}
    messy = {f"near{number}": corpora.changed(texts[number], 1, number) for number in range(8)}
    messy |= {f"exact{number}": texts[number].upper() for number in range(8)}
    told = " ".join(f"Write to {value} about it." for value in RAW.values())
    messy["stays"] = f"{texts[50]}\n\n{told} {HOSTILE.encode('utf-8', 'replace').decode()}"
    messy["short"] = f"Too short. {told}"
    # The excerpt of a dropped document ends in the middle of an address.
    messy["cut"] = "#" * 190 + f" {RAW['mail']}"
    messy[f"page-of-{RAW['mail']}"] = "Too short as well."
    messy[f"<script>{HOSTILE[:20]}"] = "Hostile in its id, and short."
    messy["evil"] = f"</pre></section>{HOSTILE.encode('utf-8', 'replace').decode()} "
    path = corpora.write(folder / "messy.jsonl", messy, licence="<b>odd</b>", origin=f"mailto:{RAW['mail']}")
    with open(path, "a") as file:
        file.write(f'{{"id": "torn", "text": "{RAW["mail"]}\n')
        file.write(json.dumps({"id": "number", "text": 7, "note": RAW["mail"]}) + "\n")
    evil = folder / "questions" / "test.jsonl"
    corpora.write(evil, {"q": " ".join(texts[30].split()[:20])})
    return {"clean": corpora.write(folder / "clean.jsonl", clean), "messy": path, "set": evil}


def made(given: dict[str, pathlib.Path], workdir: pathlib.Path, **settings) -> tuple[dict, str]:
    inputs = {name: path for name, path in given.items() if name != "set"}
    report = curate(workdir, inputs, decontaminate__against=repr((str(given["set"]),)), **settings)
    return report, (workdir / "report.html").read_text()


@pytest.mark.parametrize("action", ["replace", "count", "drop"])
def test_no_personal_value_is_in_the_report_or_on_the_page(given, tmp_path, action):
    report, page = made(given, tmp_path, personal_data__action=action)
    for text in (page, (tmp_path / "report.json").read_text()):
        for value in (*RAW.values(), "maria.lopez", "maria.lo"):
            assert value not in text
    assert report["personal_data"]["kinds"]["email"]["contexts"]


def test_without_the_stage_samples_are_masked_too(given, tmp_path):
    _, page = made(given, tmp_path, stages="('read','quality','duplicates','decontaminate','split')")
    assert not [value for value in RAW.values() if value in page]


def test_everything_that_was_done_is_on_the_page(given, tmp_path):
    report, page = made(given, tmp_path)
    read = Reader(page).text
    for stage in report["stages"]:
        assert stage["stage"].replace("_", " ") in read
        for one in stage["dropped"]:
            assert one["reason"] in read and len(one["samples"]) == min(5, one["documents"])
    for name in (*report["sources"], *report["splits"], *report["languages"], *report["contamination"]):
        assert name in read
    assert set(report["contamination"]) == {"questions/test"} and "in questions/test" in read
    for digest in (report["key"], report["config_sha256"], *(one["sha256"] for one in report["outputs"].values())):
        assert digest[:16] in read
    assert report["duplicates"]["exact"] == 8 and len(report["duplicates"]["examples"]) == 5
    assert report["origins"].keys() == {"not given", "mailto:<EMAIL>"} and "<b>odd</b>" in read
    assert page.count("<svg") >= 5
    assert "curate.inputs.NAME.licence" in read, "what may be changed is said"


def test_hostile_text_stays_text_and_the_page_loads_nothing(given, tmp_path):
    _, page = made(given, tmp_path)
    reader = Reader(page)
    assert "script" not in reader.tags and reader.tags.count("b") == page.count("<summary><b>")
    assert not {name for name, _ in reader.attributes} & {"src", "href", "srcset", "onclick", "onload"}
    assert not re.search(r"url\(|@import", page.partition("</style>")[0])
    assert "alert('x')" in reader.text


def test_a_card_of_nothing(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    report = curate(tmp_path / "w", {"none": tmp_path / "empty.jsonl"})
    assert report["records"]["documents"] == 0
    assert "no document stays: the inputs hold none" in list(data_card.lines(report))
    assert "No document was kept." in Reader((tmp_path / "w" / "report.html").read_text()).text


def test_all_dropped_is_said_and_nothing_is_proposed(tmp_path, capsys):
    path = corpora.write(tmp_path / "in.jsonl", {"a": "Short.", "b": "Shorter."})
    curate(tmp_path / "w", {"in": path})
    told = capsys.readouterr().out
    assert "no document stays: none of 2" in told and "next:" not in told
    assert "Of in, 0 of 2 documents are kept" in Reader((tmp_path / "w" / "report.html").read_text()).text


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"records": {"documents": 1}}'])
def test_a_report_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError, match="not a report of this version"):
        main.run(["curate", "report", f"--workdir={tmp_path}"])


def test_the_card_is_written_again_from_the_report(given, tmp_path, capsys):
    _, page = made(given, tmp_path)
    (tmp_path / "report.html").unlink()
    assert main.run(["curate", "report", f"--workdir={tmp_path}"]) == 0
    assert (tmp_path / "report.html").read_text() == page
