"""A run is loaded and resumed from the files of its workdir, also after llmjax has got new fields and axes."""

import json
import pathlib
import shutil
import types

from etils import epath
import pytest

from llmjax.checkpoint import manager
from llmjax.data.store.tokenizer import Bytes
from llmjax.errors import UserError
from llmjax.run import loading
from tests import jobs


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
    """A corpus, and a run of two steps on it."""
    corpus, workdir = jobs.write_corpus(tmp_path_factory.mktemp("corpus"), 20), tmp_path_factory.mktemp("trained")
    jobs.run(jobs.command("train", workdir, corpus, train__steps=2, mesh__tensor=2), LLMJAX_CPU_DEVICES="2")
    return corpus, workdir


def test_the_chat_template_of_dialogues_comes_before_the_imported_one(tmp_path):
    store, workdir = tmp_path / "store", epath.Path(tmp_path / "run")
    loaded = types.SimpleNamespace(store=store, tokenizer=Bytes())
    with pytest.raises(UserError, match=r"has no chat template; import a chat model, train on dialogues"):
        loading.load_chat_template(workdir, loaded)
    for folder, source in ((workdir / "tokenizer", "imported"), (store, "of the dialogues")):
        folder.mkdir(parents=True)
        (folder / "chat_template.jinja").write_text(source)
        assert loading.load_chat_template(workdir, loaded).source == source


def without_rule(config: dict, axis: str) -> dict:
    """A config as it was saved before there was a rule for `axis`."""
    rules = [rule for rule in config["parallel"]["rules"] if rule[0] != axis]
    assert len(rules) == len(config["parallel"]["rules"]) - 1
    return {**config, "parallel": {**config["parallel"], "rules": rules}}


@pytest.mark.slow
def test_a_run_saved_without_a_rule_for_a_newer_axis_is_evaluated_and_resumed(trained, tmp_path):
    corpus, workdir = trained
    old = shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(old / "eval")
    path = old / "config.json"
    path.write_text(json.dumps(without_rule(json.loads(path.read_text()), "mlp")))
    meta = old / "checkpoints" / "2" / "meta" / "metadata"
    body = json.loads(meta.read_text())
    body["meta"]["config"] = without_rule(body["meta"]["config"], "mlp")
    del body["crc32"]
    meta.write_text(json.dumps({"crc32": manager._crc32(body), **body}))

    scores = {}
    for folder in (workdir, old):
        jobs.run(jobs.command("eval", folder), LLMJAX_CPU_DEVICES="2")
        scores[folder] = json.loads((folder / "eval" / "2" / "validation.json").read_text())
    assert scores[old] == scores[workdir]
    resumed = jobs.command("train", old, corpus, train__steps=3, mesh__tensor=2)
    assert "resuming at step 2" in jobs.run(resumed, LLMJAX_CPU_DEVICES="2")
    assert "mlp" in dict(json.loads(path.read_text())["parallel"]["rules"]), "all rules are saved now"


@pytest.mark.slow
def test_training_resumes_from_the_config_of_the_workdir(trained, tmp_path):
    """Neither --config nor the overrides of the first start are repeated; new overrides are applied."""
    workdir = shutil.copytree(trained[1], tmp_path / "run")
    command = [str(jobs.LLMJAX), "train", f"--workdir={workdir}"]
    assert "nothing left to train" in jobs.run(command, LLMJAX_CPU_DEVICES="2")
    resumed = jobs.run([*command, "--config.train.steps=4", "--config.train.stop_at=3"], LLMJAX_CPU_DEVICES="2")
    assert "resuming at step 2" in resumed and f"config: {workdir / 'config.json'}" in resumed
    assert "set --config.train.stop_at=0 to train to step 4" in jobs.run(command, LLMJAX_CPU_DEVICES="2")


def test_accept_changes_holds_for_one_start(tmp_path):
    path = epath.Path(tmp_path)
    saved = {"train": {"steps": 7}, "checkpoint": {"accept_changes": True, "every": 3}}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    config = loading.resolve(None, path, [("train.log_every", "2")])
    assert (config.train.steps, config.train.log_every, config.checkpoint.every) == (7, 2, 3)
    assert not config.checkpoint.accept_changes
    with pytest.raises(UserError, match="--config is missing"):
        loading.resolve(None, path / "empty", [])


def test_a_workdir_of_another_version_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"parallel": {"how": "pjit"}}))
    message = r"config\.json: unknown config field 'parallel\.how'.*; another version of llmjax wrote this workdir: use"
    for read in (lambda path: loading.read_config(path), lambda path: loading.resolve(None, path, [])):
        with pytest.raises(UserError, match=message):
            read(epath.Path(tmp_path))
    assert loading.resolve(str(jobs.ROOT / "configs" / "quickstart.py"), epath.Path(tmp_path), []).seed == 0
