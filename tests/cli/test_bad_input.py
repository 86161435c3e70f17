"""Bad input ends with status 78 and one line that names the field, the value and the fix; no file is damaged."""

import errno
import json
import os
import pathlib
import shutil
import sys

import jax
import pytest

from llmjax.cli import main
from llmjax.parallel import axes
from llmjax.run import workdir as workdirs
from tests import jobs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    return jobs.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus) -> pathlib.Path:
    """A run of two steps."""
    workdir = tmp_path_factory.mktemp("trained")
    jobs.run(jobs.command("train", workdir, corpus, train__steps=2, checkpoint__every=1), LLMJAX_CPU_DEVICES="8")
    return workdir


@pytest.fixture
def run_copy(trained, tmp_path) -> pathlib.Path:
    """A copy of that run, for tests that damage it."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def refuse(monkeypatch, capfd):
    """Run a command line that is refused, and return its only error line."""

    def run(arguments: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", ["llmjax", *arguments[1:]])
        with pytest.raises(SystemExit) as stopped:
            main.main()
        printed = capfd.readouterr()
        assert stopped.value.code == 78, printed.err + printed.out
        lines = [line for line in printed.err.splitlines() if line.startswith("llmjax: error: ")]
        assert len(lines) == 1 and "Traceback" not in printed.err, printed.err
        return lines[0]

    return run


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FLAGS = {
    "unknown command": (["llmjax", "trian"], "unknown command 'trian' (did you mean 'train'?)"),
    "missing flag": (["llmjax", "eval"], "the following arguments are required: --workdir"),
    "unknown flag": (["llmjax", "inspect", "--workdir=x", "--jsno"], "unrecognized arguments: --jsno"),
    "flag of a wrong type": (
        ["llmjax", "eval", "--workdir=x", "--step=last"],
        "argument --step=last: expected an integer of 0 or more",
    ),
    "seed beyond a key": (
        ["llmjax", "generate", "--workdir=x", "--prompt=a", "--seed=4294967296"],
        "argument --seed=4294967296: expected an integer from 0 to 4294967295",
    ),
    "number of a wrong type": (
        ["llmjax", "generate", "--workdir=x", "--prompt=a", "--top_p=most"],
        "argument --top_p=most: expected a number",
    ),
    "override without a value": (["llmjax", "eval", "--workdir=x", "--config.seed"], "--config.seed: give a value"),
    "workdir left empty": (["llmjax", "inspect", "--workdir="], "--workdir=: empty; give a folder"),
    "workdir that is a file": (["llmjax", "eval", f"--workdir={__file__}"], "this is a file; give a folder"),
    "file that is no checkpoint": (["llmjax", "import", f"--from={__file__}", "--workdir=x"], "not a GGUF file"),
    "no such run": (["llmjax", "eval", "--workdir=/nowhere"], "--workdir=/nowhere: no config.json there"),
    "unknown section": (["llmjax", "fields", "optimiser"], "no section 'optimiser' (did you mean 'optimizer'?)"),
}


@pytest.mark.parametrize("mistake", FLAGS)
def test_bad_flags_are_refused(mistake, refuse):
    arguments, message = FLAGS[mistake]
    assert message in refuse(arguments)


CONFIGS = {
    "unknown field": ({"train__stepz": 3}, "unknown config field 'train.stepz' (did you mean 'steps'?)"),
    "wrong type": ({"train__steps": "many"}, "train.steps='many': expected an integer"),
    "mesh and devices": ({"mesh__data": 3}, "needs 3 devices, but there are 8"),
    "two free axes": ({"mesh__data": -1, "mesh__fsdp": -1}, "at most one of them to -1"),
    "batch and mesh": (
        {"train__global_batch": 12},
        "train.global_batch=12 is not divisible by mesh.data x mesh.fsdp = 8",
    ),
    "scheduled batch": (
        {"train__batch_schedule": "((64, 12),)"},
        "train.batch_schedule global_batch=12 is not divisible by mesh.data x mesh.fsdp = 8",
    ),
    "enormous batch": ({"train__global_batch": 10**9}, "train.global_batch=1000000000: must be at most 16777216"),
    "enormous rows": ({"data__seq_len": 10**9}, "data.seq_len=1000000000: must be at most 16777216"),
    "heads and mesh": ({"mesh__tensor": 8}, "mesh.tensor=8: must divide model.num_kv_heads=4"),
    "heads and width": (
        {"model__num_heads": 5},
        "model.num_heads=5: must divide model.embed=32, or set",
    ),
    "learned positions": (
        {"model__positions": "learned", "model__max_positions": 32},
        "data.seq_len=64: the model has only model.max_positions=32 learned positions",
    ),
    "pmap and fsdp": (
        {"parallel__backend": "pmap", "mesh__data": 4, "mesh__fsdp": 2},
        "parallel.backend='pmap' replicates the state and does not support mesh {'fsdp': 2}",
    ),
    "experts of a dense model": (
        {"mesh__expert": 8},
        "mesh.expert=8: model.family='decoder' has no experts; set it to 1 and use mesh.fsdp",
    ),
    "rows that devices cannot share": (
        {"mesh__sequence": 8, "data__seq_len": 72},
        "data.seq_len=72 is not divisible by 2 x mesh.sequence = 16: set it to 64, or change the mesh",
    ),
    "rules without an axis of the mesh": (
        {"mesh__sequence": 2, "parallel__rules": str((("seq", None), ("embed", "fsdp")))},
        "mesh.sequence=2: no rule of parallel.rules uses this axis; set parallel.rules=()",
    ),
    "optimizer": ({"optimizer__name": "adam"}, "optimizer.name='adam' (did you mean 'adamw'?)"),
    "warmup": ({"optimizer__warmup_steps": 99}, "optimizer.warmup_steps=99: must be below the 2 steps of the schedule"),
    "rule for an unknown mesh axis": (
        {"parallel__rules": str((("embed", "fdsp"), *axes.DEFAULT_RULES[1:]))},
        "parallel.rules: 'embed' -> 'fdsp': there is no such mesh axis (did you mean 'fsdp'?)",
    ),
    "rule that names no axis": (
        {"parallel__rules": str((("embed", 3), *axes.DEFAULT_RULES[1:]))},
        "parallel.rules: 'embed' -> 3: there is no such mesh axis",
    ),
    "rules that cut an array twice": (
        {"parallel__rules": str((*axes.DEFAULT_RULES, ("mlp", "fsdp")))},
        "parallel.rules: 'fsdp' would shard two dimensions of (",
    ),
    "joined documents of another objective": (
        {"data__packing": "stream", "objective__name": "prefix"},
        "data.packing='stream': objective.name='prefix' needs documents that are kept apart",
    ),
    "prompt form of a causal model": (
        {"objective__prompt_form": "plain"},
        "objective.prompt_form='plain': objective.name='causal' does not use it, only prefix, span, ul2",
    ),
    "prompt form of one stack": (
        {"objective__name": "prefix", "objective__prompt_form": "plain"},
        "objective.prompt_form='plain': model.family='decoder' is not an encoder-decoder",
    ),
    "store that is a file": ({"data__store": __file__}, "this is a file; give the folder of a token store"),
    "prompt that is no text": ({"sample__prompts": "(1, 2)"}, "sample.prompts: 1 is not a string"),
    "special token in a prompt": ({"sample__prompts": "('<|im_start|>',)"}, "the text contains <|im_start|>"),
    "samples out of range": ({"sample__prompts": "('a',)", "sample__top_p": 2}, "top_p=2.0: must be above 0"),
}


@pytest.mark.parametrize("mistake", CONFIGS)
def test_bad_config_fields_are_refused_before_training(mistake, refuse, trained, corpus, tmp_path):
    changes, message = CONFIGS[mistake]
    settings = {"train__steps": 2, "data__store": trained / "store", **changes}
    assert message in refuse(jobs.command("train", tmp_path / "run", corpus, **settings))
    assert not (tmp_path / "run" / "checkpoints").exists()


SOURCES = {
    "missing": ("/nowhere/*.txt", "/nowhere/*.txt"),
    "empty path": ("", "data.sources.main.path"),
}


@pytest.mark.parametrize("mistake", SOURCES)
def test_a_source_without_files_is_refused(mistake, refuse, tmp_path):
    path, message = SOURCES[mistake]
    arguments = [*jobs.command("prepare", tmp_path / "run"), f"--config.data.sources.main.path={path}"]
    assert message in refuse(arguments)


def test_an_empty_corpus_is_refused(refuse, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("")
    line = refuse(jobs.command("prepare", tmp_path / "run", tmp_path / "texts"))
    assert "data.sources.main" in line


def test_too_many_bad_records_are_refused_and_a_few_are_left_out(refuse, tmp_path):
    records = [json.dumps({"text": f"document number {n} is fine"}) for n in range(40)]
    records[3:6] = ["{not json", json.dumps({"text": 5}), json.dumps({"body": "no text"})]
    file = tmp_path / "records.jsonl"
    file.write_bytes("\n".join(records).encode() + b"\n\xff\xfe broken\n")
    arguments = [*jobs.command("prepare", tmp_path / "run"), f"--config.data.sources.main.path={file}"]
    line = refuse(arguments)
    assert "max_bad_fraction" in line and "4" in line
    rejects = (tmp_path / "run" / "store" / "rejects.jsonl").read_text().splitlines()
    assert len(rejects) == 4
    # A small enough number is left out, counted and written to rejects.jsonl.
    jobs.run([*arguments, "--config.data.max_bad_fraction=0.2"])
    assert len((tmp_path / "run" / "store" / "rejects.jsonl").read_text().splitlines()) == 4


def test_a_store_of_other_settings_is_refused_and_not_changed(refuse, run_copy, corpus):
    before = contents(run_copy / "store")
    line = refuse(jobs.command("prepare", run_copy, corpus, data__split__validation=0.2))
    assert "validation" in line
    assert contents(run_copy / "store") == before


@pytest.mark.slow
def test_changes_that_matter_are_refused_unless_accept_changes_is_set(refuse, run_copy, corpus):
    settings = {"train__steps": 4, "checkpoint__every": 1}
    line = refuse(jobs.command("train", run_copy, corpus, optimizer__name="lion", **settings))
    assert "optimizer.name: 'adamw' -> 'lion'" in line and "checkpoint.accept_changes=true" in line
    line = refuse(jobs.command("train", run_copy, corpus, model__num_heads=4, **settings))
    assert "model.num_heads: 8 -> 4" in line
    assert sorted(jobs.checkpoints(run_copy)) == [1, 2]
    accepted = jobs.command(
        "train", run_copy, corpus, optimizer__name="lion", checkpoint__accept_changes="true", **settings
    )
    printed = jobs.run(accepted, LLMJAX_CPU_DEVICES="8")
    assert "the optimizer's state and learning rate start at update 0" in printed
    assert 4 in jobs.checkpoints(run_copy)


def test_a_store_of_other_texts_is_refused(refuse, run_copy, corpus, tmp_path):
    other = jobs.write_corpus(tmp_path / "other", documents=30)
    jobs.run(jobs.command("prepare", tmp_path / "second", other))
    settings = {"train__steps": 4, "data__store": tmp_path / "second" / "store"}
    line = refuse(jobs.command("train", run_copy, other, **settings))
    assert "the training texts" in line and "checkpoint.accept_changes=true" in line


def test_a_store_of_another_tokenizer_is_refused(refuse, run_copy, corpus, tmp_path):
    settings = {"data__tokenizer__kind": "sentencepiece", "data__tokenizer__vocab_size": 400}
    jobs.run(jobs.command("prepare", tmp_path / "second", corpus, **settings))
    store = tmp_path / "second" / "store"
    line = refuse(["llmjax", "eval", f"--workdir={run_copy}", f"--config.data.store={store}"])
    assert "tokenizer" in line and str(store) in line


def test_a_corrupt_token_shard_is_refused(refuse, run_copy, corpus):
    shard = next((run_copy / "store" / "main" / "train").glob("tokens-*.bin"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    line = refuse(jobs.command("train", run_copy, corpus, train__steps=6))
    assert shard.name in line
    assert sorted(jobs.checkpoints(run_copy)) == [1, 2]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_and_the_previous_one_resumed(refuse, run_copy, corpus):
    def damage(step: int) -> None:
        """Flip a bit in every file of array data: which of them a restore reads depends on how writes were merged."""
        for path in (run_copy / "checkpoints" / str(step) / "params").rglob("d/*"):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 4
            path.write_bytes(data)

    damage(2)
    printed = jobs.run(jobs.command("train", run_copy, corpus, train__steps=2), LLMJAX_CPU_DEVICES="8")
    assert "checkpoint 2 is damaged and was moved" in printed and "resuming at step 1" in printed
    for step in jobs.checkpoints(run_copy):
        damage(step)
    line = refuse(jobs.command("train", run_copy, corpus, train__steps=2))
    assert "holds damaged checkpoints and no good one" in line
    assert list((run_copy / "checkpoints" / "damaged").iterdir())


def test_a_workdir_in_use_is_refused(refuse, run_copy, corpus):
    with workdirs.Lock(run_copy, primary=True):
        line = refuse(jobs.command("train", run_copy, corpus, train__steps=2))
    assert str(run_copy) in line and "in use" in line


def test_a_missing_step_is_refused(refuse, run_copy):
    assert "3" in refuse(["llmjax", "eval", f"--workdir={run_copy}", "--step=3"])


def test_a_prompt_with_an_unknown_special_token_is_refused(refuse, run_copy):
    line = refuse(["llmjax", "generate", f"--workdir={run_copy}", "--prompt=<|im_start|>user"])
    assert "<|im_start|>" in line


GENERATIONS = {
    "top_p": (["--prompt=a", "--top_p=1.5"], "top_p=1.5"),
    "a prompt of other bytes": (["--prompt=\udcff"], "contains bytes that are not UTF-8"),
    "more than memory holds": (["--prompt=a", f"--max_tokens={2**30}"], f"max_tokens={2**30}: out of memory"),
    "a mesh that does not fit": (["--prompt=a", "--config.mesh.tensor=3"], "3 does not divide the 8 devices"),
}


@pytest.mark.parametrize("mistake", GENERATIONS)
def test_bad_generation_settings_are_refused(mistake, refuse, run_copy):
    flags, message = GENERATIONS[mistake]
    assert message in refuse(["llmjax", "generate", f"--workdir={run_copy}", *flags])


@pytest.mark.parametrize("text", ["", "{torn", "[]", "\0"])
def test_a_damaged_config_file_is_refused(text, refuse, run_copy):
    (run_copy / "config.json").write_text(text)
    line = refuse(["llmjax", "eval", f"--workdir={run_copy}"])
    assert str(run_copy / "config.json") in line and "JSON" in line


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 59.6 GiB"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9 bytes"),
    ],
    ids=["host", "device"],
)
def test_too_little_memory(error, refuse, monkeypatch, run_copy, corpus):
    def allocate(*arguments, **named):
        raise error

    monkeypatch.setattr(workdirs, "write_json", allocate)
    line = refuse(jobs.command("train", run_copy, corpus, train__steps=2))
    assert f"out of memory ({error}): lower train.global_batch" in line


def test_a_missing_package_for_gs_paths_is_named(refuse, monkeypatch):
    def fail(arguments):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setitem(main.COMMANDS, "fields", fail)
    assert "pip install 'llmjax[gcs]'" in refuse(["llmjax", "fields"])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS], ids=errno.errorcode.get)
def test_an_error_of_the_operating_system_is_one_line(number, refuse, monkeypatch, run_copy, corpus):
    def fail(*arguments, **named):
        raise OSError(number, os.strerror(number), str(run_copy / "run.json"))

    monkeypatch.setattr(workdirs, "write_json", fail)
    line = refuse(jobs.command("train", run_copy, corpus, train__steps=2))
    assert os.strerror(number).removesuffix(" on device").lower() in line and "run.json" in line
    assert jax.process_count() == 1
