"""`llmjax inspect` lists checkpoints, damage, config and store of a run, and reads no array."""

import json
import shutil

import jax.numpy as jnp
import pytest

from llmjax.checkpoint.manager import Checkpoints
from llmjax.cli import main
from llmjax.data.config import DataConfig, SourceConfig, TokenizerConfig
from llmjax.data.store.prepare import prepare
from llmjax.errors import UserError
from llmjax.run import inspection

CONFIG = {"seed": 0, "data": {"store": "", "seq_len": 64}, "train": {"steps": 30, "global_batch": 8}}
STATE = {"version": 1, "fingerprint": "ab", "seed": 0, "mixture": "cd", "global_batch": 8}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A workdir of three checkpoints, and their fingerprints; the last one has another horizon than the first two."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    workdir.mkdir()
    checkpoints, fingerprints = Checkpoints(workdir / "checkpoints"), {}
    for step in (9, 10, 30):
        config = {**CONFIG, "train": {"steps": 30 if step == 30 else 10, "global_batch": 8}}
        meta = {"config": config, "data_state": {**STATE, "next_sample": step * 8}, "total_targets": step * 500}
        fingerprints[step] = checkpoints.save(step, {"params": {"w": jnp.full((4,), step, jnp.float32)}}, meta)
    checkpoints.close()
    split = {"documents": 3, "tokens": 1000, "text_bytes": 4000}
    source = {"path": "stdlib:", "train": split, "validation": split, "test": split}
    manifest = {"fingerprint": "ef", "tokenizer": {"kind": "bytes", "vocab_size": 258}, "sources": {"main": source}}
    (workdir / "store").mkdir()
    (workdir / "store" / "manifest.json").write_text(json.dumps(manifest))
    (workdir / "config.json").write_text(json.dumps(CONFIG))
    (workdir / "metrics.jsonl").write_text('{"step": 30, "loss": 2.5}\n{"step": 31, "lo')
    return workdir, fingerprints


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of that workdir, for tests that change it."""
    return shutil.copytree(finished_run[0], tmp_path / "run")


def test_inspect_lists_checkpoints_oldest_first_with_fingerprint_and_data_state(finished_run):
    workdir, fingerprints = finished_run
    result = inspection.inspect(workdir)
    assert [item["step"] for item in result["checkpoints"]] == [9, 10, 30]  # by number: as text, 10 sorts before 9
    assert {item["step"]: item["fingerprint"] for item in result["checkpoints"]} == fingerprints
    assert len(set(fingerprints.values())) == 3
    assert result["checkpoints"][1]["data_state"] == {**STATE, "next_sample": 80}
    assert result["checkpoints"][1]["config_differences"] == {"train.steps": [10, 30]}
    assert result["checkpoints"][2]["config_differences"] == {}
    assert result["config"] == CONFIG
    assert result["store"]["sources"]["main"]["train"]["tokens"] == 1000 and result["store"]["tokens"] == 3000
    assert result["last_logged"] == {"step": 30, "loss": 2.5}
    assert json.loads(json.dumps(result)) == result


def test_describe_shows_steps_fingerprints_config_changes_and_the_next_command(finished_run):
    workdir, fingerprints = finished_run
    text = inspection.describe(inspection.inspect(workdir))
    rows = [
        line.split("  ") for line in text.splitlines() if fingerprints[10][:16] in line or fingerprints[30][:16] in line
    ]
    assert [[cell.strip() for cell in row if cell.strip()] for row in rows] == [
        ["10", fingerprints[10][:16], "80", "5,000", "train.steps"],
        ["30", fingerprints[30][:16], "240", "15,000", "same as config.json"],
    ]
    assert "last logged step 30, loss 2.5000" in text
    assert "steps=30" in text and "3,000 tokens of main" in text
    assert text.splitlines()[-1].startswith(f"next: llmjax eval --workdir={workdir}")


def test_damaged_checkpoints_are_listed_beside_the_good_ones(run):
    (meta,) = (run / "checkpoints" / "10" / "meta").glob("metadata")
    meta.write_text(meta.read_text().replace("5000", "5001"))
    (run / "checkpoints" / "damaged" / "7-1").mkdir(parents=True)
    result = inspection.inspect(run)
    assert [item["step"] for item in result["checkpoints"]] == [9, 30]
    assert [item["path"] for item in result["damaged"]] == [
        str(run / "checkpoints" / "10"),
        str(run / "checkpoints" / "damaged" / "7-1"),
    ]
    text = inspection.describe(result)
    assert "checksum" in text and "7-1: set aside when a run resumed" in text


def test_the_next_command_of_a_prepared_workdir_is_train(run):
    shutil.rmtree(run / "checkpoints")
    (run / "config.json").unlink()
    text = inspection.describe(inspection.inspect(run))
    assert "no checkpoint yet" in text and "nothing was trained yet" in text
    assert text.splitlines()[-1] == f"next: llmjax train --config=FILE --workdir={run}"


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--workdir=.*absent: no such folder"):
        inspection.inspect(tmp_path / "absent")
    with pytest.raises(UserError, match=r"--workdir=.*: no run there"):
        inspection.inspect(tmp_path)


def test_an_incomplete_config_file_is_named(run):
    (run / "config.json").write_text('{"seed": ')
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        inspection.inspect(run)


@pytest.fixture
def prepared(tmp_path):
    """A workdir with a token store of two sources."""
    for name in ("books", "code"):
        (tmp_path / name).mkdir()
        for number in range(40):
            (tmp_path / name / f"{number}.txt").write_text(f"{name} {number} " * 50)
    sources = {name: SourceConfig(path=f"{tmp_path / name}/*.txt") for name in ("books", "code")}
    config = DataConfig(sources=sources, tokenizer=TokenizerConfig(kind="bytes"), workers=1)
    prepare(config, tmp_path / "run" / "store")
    return tmp_path / "run"


def test_verify_reads_every_byte_of_the_token_store(prepared, capsys):
    assert main.run(["inspect", f"--workdir={prepared}", "--verify"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("verified ")]
    splits = [f"{name}/{split}" for name in ("books", "code") for split in ("train", "validation", "test")]
    assert [line[1] for line in lines] == [f"{part}:" for part in splits]
    for part, line in zip(splits, lines, strict=True):
        manifest = json.loads((prepared / "store" / part / "manifest.json").read_text())
        edges = manifest["documents"] + len(manifest["shards"])
        assert int(line[2].replace(",", "")) == 2 * manifest["tokens"] + 8 * edges
        assert line[-1] == "MB/s"
    assert main.run(["inspect", f"--workdir={prepared}", "--verify", "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)["verified"]
    assert [f"{part['source']}/{part['split']}" for part in verified] == splits


@pytest.mark.parametrize("file", ["tokens-00000.bin", "offsets-00000.npy"])
def test_verify_names_the_file_of_a_flipped_bit(prepared, file, capsys):
    path = prepared / "store" / "code" / "train" / file
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"code/train/{file}.* damaged.*llmjax prepare"):
        main.run(["inspect", f"--workdir={prepared}", "--verify"])
    assert "verified books/test" in capsys.readouterr().out


def test_verify_without_a_token_store_is_refused(run):
    shutil.rmtree(run / "store")
    with pytest.raises(UserError, match=r"no token store to verify; `llmjax prepare`"):
        main.run(["inspect", f"--workdir={run}", "--verify"])
