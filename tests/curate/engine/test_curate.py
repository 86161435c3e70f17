"""From raw text to a corpus, by the command line."""

import collections
import gzip
import json
import os
import pathlib
import signal
import subprocess
import time

import numpy as np
import pytest

from llmjax.cli import main
from llmjax.errors import UserError
from tests import jobs
from tests.curate import corpora

PLAIN = "('read','normalise','duplicates','decontaminate','personal_data','sample','split')"


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Two inputs: passages, and others with exact copies, near copies, personal data, noise and damage."""
    folder, texts = tmp_path_factory.mktemp("raw"), corpora.documents()
    clean = {f"c{number}": text for number, text in enumerate(texts[:150])}
    messy = {f"m{number}": text for number, text in enumerate(texts[150:220])}
    messy |= {f"exact{number}": texts[number].upper() for number in range(10)}
    messy |= {f"near{number}": corpora.replace_words(texts[number], 1, number) for number in range(20, 30)}
    messy["mail"] = texts[230] + "\n\nWrite to maria.lopez@example.org or call 10.20.30.41 for more."
    messy["noise"] = "### " * 80
    messy["short"] = "Too short."
    path = corpora.write_jsonl(folder / "messy.jsonl", messy, licence="CC0-1.0")
    with open(path, "ab") as file:
        file.write(b'{"id": "torn", "text": "no end\n{"id": "number", "text": 7}\n')
    return {"clean": corpora.write_jsonl(folder / "clean.jsonl", clean), "messy": path}


def curate(workdir: pathlib.Path, inputs: dict, **settings) -> dict:
    """Run in this process and return the report. Its quality rules keep short passages of prose."""
    settings = {"max_bad_fraction": 0.1, "quality__rules": "('gopher',)", **settings}
    assert main.run(corpora.curate_arguments(workdir, inputs, **settings)) == 0
    return json.loads((workdir / "report.json").read_text())


@pytest.fixture(scope="module")
def corpus(raw, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("corpus")
    curate(workdir, raw)
    return workdir


def test_every_record_is_kept_or_dropped_with_a_reason(raw, corpus):
    kept, dropped = corpora.read_records(corpus), corpora.read_records(corpus, "dropped")
    lines = [line for path in raw.values() for line in path.read_text().splitlines()]
    assert len(kept) + len(dropped) == len(lines)
    assert all(record["id"] and record["text"].strip() for record in kept)
    assert all(record["stage"] and record["reason"] for record in dropped)
    reasons = {record["id"]: (record["stage"], record["reason"]) for record in dropped}
    assert reasons["short"] == ("quality", "gopher_min_words")
    assert reasons["noise"][0] == "quality"
    assert {reasons[f"exact{n}"] for n in range(10)} == {("duplicates", "exact duplicate")}
    assert {reasons[f"near{n}"] for n in range(20, 30)} == {("duplicates", "near duplicate")}
    assert sum(stage == "read" for stage, _ in reasons.values()) == 2


def test_personal_data_are_replaced_and_fields_copied(corpus):
    (mail,) = (record for record in corpora.read_records(corpus) if record["id"] == "mail")
    assert "maria.lopez" not in mail["text"] and "<EMAIL>" in mail["text"] and "10.20.30.41" not in mail["text"]
    assert mail["meta"]["licence"] == "CC0-1.0" and mail["source"] == "messy"


def test_the_report_adds_up(raw, corpus):
    report = json.loads((corpus / "report.json").read_text())
    documents = report["records"]["documents"]
    for stage in report["stages"]:
        assert stage["in"]["documents"] == documents
        documents -= sum(entry["documents"] for entry in stage["dropped"])
        assert stage["out"]["documents"] == documents
        for side in ("in", "out"):
            by_source = [amounts[side] for amounts in stage["by_source"].values()]
            assert {f: sum(amount[f] for amount in by_source) for f in ("documents", "bytes", "tokens")} == stage[side]
    kept = corpora.read_records(corpus)
    assert report["kept"]["documents"] == len(kept) == documents
    assert report["kept"]["bytes"] == sum(len(record["text"].encode()) for record in kept)
    assert report["licences"] == {
        "CC0-1.0": sum(r["source"] == "messy" for r in kept),
        "not stated": sum(r["source"] == "clean" for r in kept),
    }
    for name, file in report["outputs"].items():
        assert (corpus / name).stat().st_size == file["bytes"]
    assert report["duplicates"]["exact"] == 10 and report["duplicates"]["near"] >= 10
    page = (corpus / "report.html").read_text()
    assert "maria.lopez" not in page and "exact duplicate" in page
    assert "http://" not in page.replace("http://www.w3.org", "") or "src=" not in page


def test_near_copies_share_a_split(raw, tmp_path):
    """Near copies that are not dropped still share the split of their cluster."""
    texts = corpora.documents()[:60]
    documents = {f"{n}": text for n, text in enumerate(texts)}
    documents |= {f"{n}b": corpora.replace_words(text, 2, n) for n, text in enumerate(texts)}
    path = corpora.write_jsonl(tmp_path / "in.jsonl", documents)
    stages = "('read','duplicates','split')"
    curate(tmp_path / "w", {"a": path}, stages=stages, split__validation=0.3, split__test=0.3)
    splits = {record["id"].rstrip("b"): record["split"] for record in corpora.read_records(tmp_path / "w")}
    assert len(splits) == 60 and set(splits.values()) == {"train", "validation", "test"}


def test_the_number_of_workers_does_not_change_the_files(raw, corpus, tmp_path):
    curate(tmp_path / "one", raw, workers=1)
    assert corpora.read_files(tmp_path / "one") == corpora.read_files(corpus)


def test_the_kept_copies_do_not_depend_on_files_or_their_order(tmp_path):
    """One file, and several files in another order."""
    texts = corpora.documents()[:80]
    documents = {f"a{n}": text for n, text in enumerate(texts)}
    documents |= {f"b{n}": corpora.replace_words(text, 2, n) for n, text in enumerate(texts)}
    documents |= {f"c{n}": corpora.replace_words(text, 2, n + 1000) for n, text in enumerate(texts)}
    corpora.write_jsonl(tmp_path / "one" / "all.jsonl", documents)
    names = sorted(documents, key=lambda name: (name[1:], name), reverse=True)
    for part in range(4):
        corpora.write_jsonl(tmp_path / "many" / f"{part}.jsonl", {name: documents[name] for name in names[part::4]})
    for name in ("one", "many"):
        curate(tmp_path / f"w-{name}", {"in": f"{tmp_path}/{name}/*.jsonl"}, stages=PLAIN)
    kept = [{record["id"] for record in corpora.read_records(tmp_path / f"w-{name}")} for name in ("one", "many")]
    assert kept[0] == kept[1]
    assert {name[1:] for name in kept[0]} == {str(n) for n in range(80)}, "at least one of each cluster is kept"


def test_a_changed_threshold_reuses_measurements(raw, tmp_path, capsys):
    first = curate(tmp_path, raw)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "measured").iterdir()}
    capsys.readouterr()
    second = curate(tmp_path, raw, quality__gopher_min_words=100, duplicates__similarity=0.9)
    assert "were already measured" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "measured").iterdir()} == before
    assert second["kept"]["documents"] < first["kept"]["documents"]
    assert all(len(record["text"].split()) >= 90 for record in corpora.read_records(tmp_path))


def test_changes_that_affect_measurements_measure_again(raw, tmp_path, capsys):
    """The order of stages, and the name and format of an evaluation set: the result is as in a new workdir."""
    stages = "('read','normalise','personal_data','quality','duplicates','decontaminate')"
    line = (raw["clean"].read_text().splitlines()[0] + "\n").encode()
    for name in ("quiz.jsonl", "other.jsonl", "other.txt"):
        (tmp_path / name).write_bytes(line)
    sets = {name: f"('{tmp_path / name}',)" for name in ("quiz.jsonl", "other.jsonl", "other.txt")}
    for number, settings in enumerate(
        [
            {"decontaminate__against": sets["quiz.jsonl"]},
            {"decontaminate__against": sets["quiz.jsonl"], "stages": stages},
            {"decontaminate__against": sets["other.jsonl"], "stages": stages},
            {"decontaminate__against": sets["other.txt"], "stages": stages},
        ]
    ):
        report = curate(tmp_path / "one", raw, **settings)
        (tmp_path / "one" / "splits.npz").unlink()
        assert report == curate(tmp_path / f"new{number}", raw, **settings)
        assert corpora.read_files(tmp_path / "one") == corpora.read_files(tmp_path / f"new{number}")
    capsys.readouterr()
    curate(tmp_path / "one", raw, **settings, inputs__clean__weight=1, inputs__messy__weight=1)
    assert "2 of 2 parts were already measured" in capsys.readouterr().out, "a weight does not affect measurements"


def test_rerunning_a_finished_command_does_nothing(raw, corpus, capsys):
    before = {path: path.stat().st_mtime_ns for path in (corpus / "curated").iterdir()}
    curate(corpus, raw)
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (corpus / "curated").iterdir()} == before


@pytest.mark.parametrize("cap", [0, 9000])
def test_additional_data_neither_drops_nor_moves_kept_documents(tmp_path, cap):
    texts = corpora.documents()[:200]
    corpora.write_jsonl(tmp_path / "in" / "a.jsonl", {f"a{n}": text for n, text in enumerate(texts[:120])})
    options = {"stages": PLAIN, "split__validation": 0.3, "split__test": 0.3, "inputs__in__max_tokens": cap}
    curate(tmp_path / "w", {"in": f"{tmp_path}/in/*.jsonl"}, **options)
    before = {record["id"]: record["split"] for record in corpora.read_records(tmp_path / "w")}
    assert len(before) == (74 if cap else 120)
    # New texts, and exact and changed copies of old ones, which may have smaller hashes.
    more = {f"b{n}": text for n, text in enumerate(texts[120:])}
    more |= {f"b-{n}": corpora.replace_words(text, 4, n) for n, text in enumerate(texts[:120])}
    more |= {f"c{n}": text for n, text in enumerate(texts[:120])}
    corpora.write_jsonl(tmp_path / "in" / "b.jsonl", more)
    curate(tmp_path / "w", {"in": f"{tmp_path}/in/*.jsonl"}, **options)
    after = {record["id"]: record["split"] for record in corpora.read_records(tmp_path / "w")}
    assert {name: after.get(name) for name in before} == before
    assert len(after) > len(before) or cap


def test_decontamination_drops_documents_with_shared_ngrams(tmp_path):
    texts = corpora.documents()[:30]
    question = "Which of the following seven ancient rivers did the travellers cross before they saw the mountains?"
    short = "Name the two green birds of Tasmania today"  # eight words: matched as a whole
    documents = {f"{n}": text for n, text in enumerate(texts)}
    documents["hit"] = texts[40 % 30] + " Well: " + question.upper().replace("?", " ...") + " Nobody knew."
    documents["short"] = f"{texts[1]} He said, “{short}”, and left."
    documents["part"] = texts[2] + " Which of the following seven ancient rivers did they cross?"
    inputs = {"in": corpora.write_jsonl(tmp_path / "in.jsonl", documents)}
    sets = [tmp_path / "trivia.jsonl", tmp_path / "birds.txt"]
    sets[0].write_text(json.dumps({"question": question, "answers": ["the Tigris"], "n": 3}) + "\n")
    sets[1].write_text(f"{short}\n\nToo short to say anything\n")
    stages = "('read','normalise','decontaminate')"
    report = curate(tmp_path / "w", inputs, stages=stages, decontaminate__against=repr(tuple(map(str, sets))))
    dropped = {record["id"]: record["reason"] for record in corpora.read_records(tmp_path / "w", "dropped")}
    assert dropped == {"hit": "in trivia", "short": "in birds"}
    assert report["contamination"]["trivia"]["documents"] == 1


def test_an_emptied_document_is_dropped_by_the_stage_that_emptied_it(tmp_path):
    """It has a language, and it is not a copy of other emptied documents, whatever the order of stages."""
    policies = {
        f"policy{n}": f"We have updated the privacy policy of our {what} for this year." * 3
        for n, what in enumerate(("bakery", "library", "observatory"))
    }
    texts = dict(enumerate(corpora.documents()[:10])) | policies
    inputs = {"in": corpora.write_jsonl(tmp_path / "in.jsonl", {str(name): text for name, text in texts.items()})}
    for order in ("'language','quality','duplicates'", "'duplicates','language','quality'"):
        stages = f"('read',{order})"
        report = curate(
            tmp_path / order,
            inputs,
            stages=stages,
            language__keep="('en',)",
            quality__rules="('c4',)",
            quality__c4_min_sentences=None,
        )
        dropped = {r["id"]: (r["stage"], r["reason"]) for r in corpora.read_records(tmp_path / order, "dropped")}
        assert {name: dropped[name] for name in policies} == dict.fromkeys(policies, ("quality", "all lines removed"))
        assert report["languages"]["en"]["documents"] == len(texts)


def test_caps_and_weights_are_in_tokens(tmp_path):
    texts = corpora.documents()[:120]
    inputs = {
        name: corpora.write_jsonl(
            tmp_path / f"{name}.jsonl", {f"{name}{n}": text for n, text in enumerate(texts[part::3])}
        )
        for part, name in enumerate("abc")
    }
    stages = "('read','sample')"
    capped = curate(tmp_path / "cap", inputs, stages=stages, inputs__a__max_tokens=1000)["sources"]
    assert 700 < capped["a"]["kept"]["tokens"] <= 1000
    assert capped["b"]["kept"] == capped["b"]["records"]
    weights = {"inputs__a__weight": 2, "inputs__b__weight": 1, "inputs__c__weight": 1}
    sources = curate(tmp_path / "weights", inputs, stages=stages, **weights)["sources"]
    tokens = {name: source["kept"]["tokens"] for name, source in sources.items()}
    assert tokens["a"] / tokens["b"] == pytest.approx(2, rel=0.1)
    assert tokens["b"] / tokens["c"] == pytest.approx(1, rel=0.15)
    # 0.3 / 0.7 has no exact binary fraction: the input that limits the shares is still kept completely.
    one = {"one": corpora.write_jsonl(tmp_path / "one.jsonl", {"one": texts[0]}), "b": inputs["b"]}
    shares = curate(tmp_path / "one", one, stages=stages, inputs__one__weight=0.7, inputs__b__weight=0.3)["sources"]
    assert shares["one"]["kept"]["documents"] == 1
    # A document that is larger than the share does not displace others.
    many = {"long": " ".join(texts), **{str(n): text for n, text in enumerate(texts)}}
    long = {"a": corpora.write_jsonl(tmp_path / "long.jsonl", many)}
    assert curate(tmp_path / "long", long, stages=stages, inputs__a__max_tokens=1000)["kept"]["tokens"] > 700
    with pytest.raises(UserError, match=r"inputs\.b\.weight is not set"):
        curate(tmp_path / "some", inputs, stages=stages, inputs__a__weight=2)


def test_only_training_documents_are_augmented(tmp_path):
    inputs = {
        "in": corpora.write_jsonl(tmp_path / "in.jsonl", {str(n): t for n, t in enumerate(corpora.documents()[:60])})
    }
    options = {"stages": "('read','split','augment')", "augment__copies": 2, "split__test": 0.3}
    curate(tmp_path / "w", inputs, **options)
    kept = corpora.read_records(tmp_path / "w")
    assert {r["split"] for r in kept if "~" in r["id"]} == {"train"}
    by_id = {record["id"]: record for record in kept}
    originals = [record for record in kept if "~" not in record["id"] and record["split"] == "train"]
    assert all(f"{r['id']}~{n}" in by_id for r in originals for n in (1, 2))
    assert any(by_id[f"{r['id']}~1"]["text"] != r["text"] for r in originals)


def test_a_killed_run_resumes_with_the_same_result(tmp_path):
    """kill -9 while measuring, deciding and writing: finished units are reused, partial files are not."""
    texts = corpora.documents()
    for part in range(3):
        many = {f"{part}-{n}": corpora.replace_words(texts[n % len(texts)], 30, n + 9999 * part) for n in range(1200)}
        corpora.write_jsonl(tmp_path / "in" / f"{part}.jsonl", many)
    inputs = {"in": f"{tmp_path}/in/*.jsonl"}
    curate(tmp_path / "uninterrupted", inputs)
    command = [
        str(jobs.LLMJAX),
        *corpora.curate_arguments(tmp_path / "killed", inputs, quality__rules="('gopher',)", workers=1),
    ]
    for pattern in ("measured/*.json", "unfinished/exchange/*/*", "unfinished/written-*/*/*"):
        process = subprocess.Popen(command, env=jobs.environment(), stdout=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 120
        while process.poll() is None and not list((tmp_path / "killed").glob(pattern)):
            assert time.monotonic() < deadline, "nothing was written"
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    measured = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "measured").glob("*.json")}
    assert measured, "the first unit was complete before the first kill"
    assert not (tmp_path / "killed" / "report.json").exists()
    subprocess.run(command, env=jobs.environment(), check=True, stdout=subprocess.DEVNULL)
    assert corpora.read_files(tmp_path / "killed") == corpora.read_files(tmp_path / "uninterrupted")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "measured").glob("*.json")}
    assert measured.items() <= after.items(), "finished units were measured again"
    assert not list((tmp_path / "killed").rglob("*.partial-*"))


@pytest.mark.parametrize("moved", ["curated", "dropped", "splits.npz", "report.json"])
def test_a_run_interrupted_while_publishing_resumes(raw, corpus, tmp_path, monkeypatch, moved):
    """It ends just before it moves a folder or file; the workdir has another corpus."""
    curate(tmp_path, raw, quality__rules="()")
    path_replace, os_replace = pathlib.Path.replace, os.replace

    def interrupted(function):
        def replace(source, target):
            if pathlib.Path(target) == tmp_path / moved:
                raise KeyboardInterrupt
            return function(source, target)

        return replace

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "replace", interrupted(path_replace))
        patch.setattr(os, "replace", interrupted(os_replace))
        with pytest.raises(KeyboardInterrupt):
            curate(tmp_path, raw)
    assert not (tmp_path / "report.json").exists()
    report = curate(tmp_path, raw)
    assert corpora.read_files(tmp_path) == corpora.read_files(corpus)
    assert set(report["outputs"]) == set(corpora.read_files(corpus))
    assert not (tmp_path / "unfinished").exists() and (tmp_path / "splits.npz").exists()


def test_a_full_disk_is_one_line_and_the_run_can_resume(raw, tmp_path):
    """A limit on the size of files simulates a full disk: it raises the same error."""
    settings = {"max_bad_fraction": 0.1, "quality__rules": "('gopher',)", "workers": 1}
    command = [str(jobs.LLMJAX), *corpora.curate_arguments(tmp_path, raw, **settings)]
    limited = ["bash", "-c", 'trap "" XFSZ; ulimit -f 16; exec "$@"', "bash", *command]
    result = subprocess.run(limited, env=jobs.environment(), capture_output=True, text=True)
    assert result.returncode == 78 and "no space left" in result.stderr and "Traceback" not in result.stderr
    assert not list((tmp_path / "curated").glob("*")) if (tmp_path / "curated").exists() else True
    subprocess.run(command, env=jobs.environment(), check=True, stdout=subprocess.DEVNULL)
    assert len(corpora.read_records(tmp_path)) > 150


def test_two_runs_in_one_workdir_are_refused(raw, tmp_path):
    from llmjax.run import workdir as workdirs

    with workdirs.Lock(tmp_path, primary=True), pytest.raises(UserError, match="in use"):
        curate(tmp_path, raw)


def test_resume_reads_the_config_of_the_workdir(raw, tmp_path):
    first = curate(tmp_path, raw)
    (tmp_path / "report.json").unlink()
    assert main.run(["curate", f"--workdir={tmp_path}", "--resume"]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["outputs"] == first["outputs"]
    with pytest.raises(UserError, match="there is no config file"):
        main.run(["curate", f"--workdir={tmp_path / 'none'}", "--resume"])


def test_a_deleted_output_is_written_again(raw, tmp_path):
    first = curate(tmp_path, raw)
    next((tmp_path / "curated").iterdir()).unlink()
    assert curate(tmp_path, raw)["outputs"] == first["outputs"]
    assert len(list((tmp_path / "curated").iterdir())) == sum(name.startswith("curated") for name in first["outputs"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": "('read','fold')"}, "curate.stages names 'fold'"),
        ({"stages": "('normalise',)"}, "begins with 'read'"),
        ({"stages": "('read','split','duplicates')"}, "duplicates must come before split"),
        ({"stages": "('read','augment')"}, "augment without split"),
        ({"split__validation": 0.6, "split__test": 0.5}, "leave nothing to train on"),
        ({"duplicates__similarity": 1.5}, "curate.duplicates.similarity=1.5"),
        ({"decontaminate__against": "('/no/such.jsonl',)"}, "/no/such.jsonl"),
        ({"sample__terms": "('/no/such.txt',)"}, "/no/such.txt"),
        ({"language__keep": "('english',)"}, "no language 'english'"),
        ({"inputs__messy__weight": -1}, "curate.inputs.messy.weight=-1.0: must not be negative"),
        ({"inputs__messy__max_tokens": -1}, "curate.inputs.messy.max_tokens=-1: must not be negative"),
        ({"sample__seed": -1}, "curate.sample.seed=-1"),
        ({"quality__classifier": "/no/such.npz"}, "curate.quality.classifier: '/no/such.npz' cannot be read"),
        ({"max_bad_fraction": 2}, "curate.max_bad_fraction=2.0"),
        ({"personal_data__action": "hide"}, "curate.personal_data.action='hide'"),
        ({"inputs__a/b__path": "stdlib:"}, "'a/b' cannot name files"),
        ({"decontaminate__against": "(1,)"}, "curate.decontaminate.against=(1,): expected a tuple of strings"),
        ({"language__keep": "en"}, "curate.language.keep='en': expected a tuple of strings such as ('a',)"),
        ({"quality__c4_max_word_length": 10**12}, "expected 1 up to 1,000,000"),
        ({"sample__seed": 2**64}, "must be below 2^63"),
        ({"max_bad_fraction": 0.001}, "more than curate.max_bad_fraction=0.001 allows"),
    ],
)
def test_invalid_settings_are_refused(raw, tmp_path, settings, message):
    with pytest.raises(UserError) as refused:
        main.run(corpora.curate_arguments(tmp_path, raw, **settings))
    assert message in str(refused.value)
    assert not (tmp_path / "curated").exists()


def test_evaluation_sets_have_different_names(raw, tmp_path):
    from llmjax.curate.dedup import decontaminate

    names = decontaminate.name_sets(("a/test.jsonl", "b/test.jsonl.gz", "b/HumanEval.jsonl", "c/b/test.csv"))
    assert list(names.values()) == ["a/test", "b/test.jsonl.gz", "HumanEval", "c/b/test.csv"]
    (tmp_path / "empty.txt").write_text("too short\n")
    with pytest.raises(UserError, match="it would match nothing"):
        curate(tmp_path / "w", raw, decontaminate__against=f"('{tmp_path}/empty.txt',)")


def test_an_incomplete_measurement_is_measured_again(raw, corpus, tmp_path):
    curate(tmp_path, raw)
    next((tmp_path / "measured").glob("*.signatures")).unlink()
    next((tmp_path / "measured").glob("*.npz")).unlink()
    (tmp_path / "report.json").unlink()
    curate(tmp_path, raw)
    assert corpora.read_files(tmp_path) == corpora.read_files(corpus)


def test_a_refused_command_does_not_change_the_config(raw, tmp_path):
    curate(tmp_path, raw)
    with pytest.raises(UserError, match="no such file"):
        main.run(["curate", f"--workdir={tmp_path}", "--resume", "--config.curate.inputs.typo.path=/no/such"])
    assert main.run(["curate", f"--workdir={tmp_path}", "--resume"]) == 0
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        main.run(["curate", f"--workdir={tmp_path}", "--resume"])


def test_a_corpus_and_a_training_run_cannot_share_a_workdir(raw, tmp_path):
    curate(tmp_path / "corpus", raw)
    quickstart = f"--config={jobs.ROOT / 'configs' / 'quickstart.py'}"
    for command in (["train", quickstart], ["eval"], ["inspect"], ["watch"]):
        with pytest.raises(UserError, match="contains a corpus, not a training run"):
            main.run([*command, f"--workdir={tmp_path / 'corpus'}"])
    with pytest.raises(UserError, match="--config=curate: a config of `llmjax curate`"):
        main.run(["train", "--config=curate", f"--workdir={tmp_path / 'run'}"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"model": {}}')
    with pytest.raises(UserError, match="contains a training run, not a corpus"):
        main.run(corpora.curate_arguments(tmp_path / "run", raw))


def test_other_configs_and_impossible_workdirs_are_refused(tmp_path):
    quickstart = f"--config={jobs.ROOT / 'configs' / 'quickstart.py'}"
    with pytest.raises(UserError, match="has no section `curate`"):
        main.run(["curate", quickstart, f"--workdir={tmp_path}"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be created"):
        main.run(corpora.curate_arguments(tmp_path / "file" / "w", {}))


def test_pictures_and_dead_links_do_not_count_as_unreadable(tmp_path):
    pages = b""
    responses = [("text/html", "200 OK")] * 5 + [("image/png", "200 OK")] * 5 + [("text/html", "404 Not Found")] * 4
    for number, (kind, status) in enumerate(responses):
        body = f"<p>{corpora.documents()[number]}</p>".encode()
        http = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:{number}>\r\n"
        head += f"WARC-Target-URI: http://a.example/{number}\r\nWARC-Date: 2020-01-01T00:00:00Z\r\n"
        head += f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(http)}\r\n\r\n"
        pages += head.encode() + http + b"\r\n\r\n"
    (tmp_path / "a.warc").write_bytes(pages)
    report = curate(tmp_path / "w", {"a": tmp_path / "a.warc"}, max_bad_fraction=0.01)
    reasons = [entry["reason"] for entry in report["stages"][0]["dropped"]]
    assert reasons == ["content type image/png", "HTTP status 404"]
    assert report["stages"][0]["out"]["documents"] == 5


def test_prepare_reads_the_corpus_with_its_splits(corpus, tmp_path):
    settings = {
        **jobs.TINY,
        "data.sources.main.path": f"{corpus}/curated/*.jsonl.zst",
        "data.sources.main.split_field": "split",
    }
    fields = [f"--config.{name}={value}" for name, value in settings.items() if name.startswith("data.")]
    config = f"--config={jobs.ROOT / 'configs' / 'quickstart.py'}"
    assert main.run(["prepare", config, f"--workdir={tmp_path}", *fields]) == 0
    source = json.loads((tmp_path / "store" / "manifest.json").read_text())["sources"]["main"]
    kept = collections.Counter(record["split"] for record in corpora.read_records(corpus))
    assert {split: source[split]["documents"] for split in ("train", "validation", "test")} == dict(kept)


def test_earlier_clusters_are_kept():
    from llmjax.curate.engine.decide import History

    history = History(*np.array([[3, 7], [30, 70], [1, 2]], np.uint64), similarity=0.6, seed=0)
    content_hash, cluster = np.array([7, 9, 3, 11], np.uint64), np.array([5, 5, 6, 11], np.uint64)
    assert history.update_clusters(content_hash, cluster).tolist() == [70, 70, 30, 11]
    assert history.has_document(content_hash, np.array([2, 2, 5, 0], np.uint64)).tolist() == [True, False, False, False]


def test_the_lost_part_of_a_file_counts_by_bytes(tmp_path):
    texts = corpora.documents()
    path = corpora.write_jsonl(tmp_path / "a.jsonl", {str(i): texts[i % len(texts)] for i in range(150)})
    data = gzip.compress(
        corpora.write_jsonl(tmp_path / "b", {str(i): text for i, text in enumerate(texts)}).read_bytes()
    )
    (tmp_path / "b.jsonl.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"bytes cannot be read \(1 unreadable\), more than"):
        curate(tmp_path / "w", {"a": f"{path.parent}/*.*"}, stages="('read',)", max_bad_fraction=0.02)


def test_damaged_members_of_an_archive_count_by_bytes(tmp_path, capsys):
    """One damaged member of twenty: few of the records, but more than 2% of the bytes."""
    pages = []
    for number, text in enumerate(corpora.documents()[:20]):
        body = f"<p>{text}</p>".encode()
        http = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.example/{number}\r\n"
        head += f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(http)}\r\n\r\n"
        pages.append(gzip.compress(head.encode() + http + b"\r\n\r\n"))
    half = len(pages[5]) // 2
    pages[5] = pages[5][:half] + bytes(255 - byte for byte in pages[5][half:])
    lines = {str(number): "short text" for number in range(500)}
    corpora.write_jsonl(tmp_path / "b.jsonl", lines)
    (tmp_path / "a.warc.gz").write_bytes(b"".join(pages))
    settings = {"stages": "('read',)", "max_bad_fraction": 0.02}
    with pytest.raises(UserError, match=r"bytes cannot be read \(1 damaged record, 1 unreadable\), more than"):
        curate(tmp_path / "w", {"a": f"{tmp_path}/*.*"}, **settings)
    assert "a: reads files: 1 as JSON lines, 1 as WARC\n" in capsys.readouterr().out
