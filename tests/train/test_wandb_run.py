"""`train.wandb_project` logs to W&B under the run's id; without the package it is refused."""

import importlib.machinery
import json
import logging
import time
import types

from etils import epath
import pytest

from llmjax.errors import UserError
from llmjax.metrics import MetricsLog
from llmjax.parallel import hosts
from llmjax.run import workdir as workdirs
from llmjax.run.config import RunConfig, TrainConfig
from llmjax.train.wandb_run import check_wandb, start_wandb

PROJECT = TrainConfig(wandb_project="demo")


def log_step(workdir, step: int, loss: float) -> None:
    """Start (or resume) a run, log one step and an evaluation."""
    workdirs.write_json(workdir / "run.json", {"run_id": "abc123"})
    with MetricsLog(workdir, primary=hosts.is_primary(), resume_step=step - 1) as log:
        config = RunConfig(train=PROJECT)
        start_wandb(types.SimpleNamespace(config=config, workdir=epath.Path(workdir), log=log))
        log.write({"step": step, "loss": loss, "mfu": None})
        log.scalars(step, {"validation/loss": loss + 0.5})


def test_an_offline_run_is_written_below_the_workdir_and_resumed_under_its_id(tmp_path, monkeypatch, caplog):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step, loss in ((1, 2.625), (2, 1.125)):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="llmjax"):
            log_step(tmp_path, step, loss)
        (line,) = caplog.messages
        assert line.startswith(f"  W&B: run abc123 of project demo, offline in {tmp_path}/wandb/offline-run-")
        content = (epath.Path(line.partition("offline in ")[2]) / "run-abc123.wandb").read_bytes()
        for expected in ("demo", "train/loss", str(loss), "validation/loss", str(loss + 0.5)):
            assert expected.encode() in content, expected
        assert b"train/mfu" not in content
        time.sleep(1)  # W&B names folders by the second
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_run_that_wandb_refuses_is_an_error_of_one_line(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs the extra wandb")

    def refuse(**settings):
        raise wandb.Error("no API key")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"train\.wandb_project=demo: W&B does not start \(no API key\).*WANDB_MODE"):
        log_step(tmp_path, 1, 2.0)


def test_only_the_primary_process_starts_a_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(hosts, "is_primary", lambda: False)
    with caplog.at_level(logging.INFO, logger="llmjax"):
        log_step(tmp_path, 1, 2.0)
    assert not caplog.messages and not (tmp_path / "wandb").exists()


@pytest.mark.parametrize("spec", [None, importlib.machinery.ModuleSpec("wandb", None)])
def test_a_missing_package_is_an_error_of_one_line(monkeypatch, spec):
    """A folder `wandb` without the package, such as W&B itself writes, does not count as the package."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    check_wandb(TrainConfig())
    with pytest.raises(UserError, match=r"wandb is not installed; run `pip install 'llmjax\[wandb\]'`"):
        check_wandb(PROJECT)
