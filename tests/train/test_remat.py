"""A run with model.remat="auto" chooses a policy once, records it, and keeps it."""

import json
import pathlib
import types

from etils import epath
import jax
import pytest

from llmjax.errors import UserError
from llmjax.plan import remat_choice, topology as topologies
from llmjax.run import config as run_config, workdir as workdirs
from llmjax.train import remat
from tests import jobs
from tests.plan.fake_plan import make_plan

AUTO = run_config.resolve("llama:tiny", (("model.vocab_size", "512"), ("model.remat", "auto")))


@pytest.fixture
def choose(monkeypatch):
    """Let the planner take "dots", with a step of so many GiB of 100; returns the topologies that it was asked for."""
    asked = []

    def install(gib: float = 1.0) -> list[topologies.Topology]:
        def choose_remat(config, topology, *, host_devices):
            assert host_devices == jax.local_device_count()
            asked.append(topology)
            plan = make_plan(run_config.with_fields(config, [("model.remat", "dots")]), topology, seconds=1.0, gib=gib)
            return remat_choice.RematChoice(
                plan=plan, tried={"dots": plan}, limits=remat_choice.Limits(100 << 30, None, "all of it")
            )

        monkeypatch.setattr(remat, "choose_remat", choose_remat)
        return asked

    return install


def test_the_choice_is_for_the_devices_of_the_job(choose, tmp_path):
    asked = choose()
    config, reason = remat.resolve_remat(AUTO, epath.Path(tmp_path), resumes=False)
    assert (
        config == run_config.with_fields(AUTO, [("model.remat", "dots")]) and "1.00 GiB of at most 100.00 GiB" in reason
    )
    assert asked == [topologies.parse(f"cpu:{jax.device_count()}")]


def test_a_resumed_run_keeps_its_choice_and_an_explicit_policy_is_no_choice(choose, tmp_path):
    asked = choose()
    workdirs.write_json(tmp_path / workdirs.RUN, {"remat": {"policy": "full", "reason": "the fastest of 1"}})
    resolve = lambda resumes: remat.resolve_remat(AUTO, epath.Path(tmp_path), resumes=resumes)
    assert resolve(True) == (run_config.with_fields(AUTO, [("model.remat", "full")]), "the fastest of 1") and not asked
    assert resolve(False)[0].model.remat == "dots", "without a step, nothing depends on the first choice"
    workdirs.write_json(tmp_path / workdirs.RUN, {"remat": {"policy": "full", "reason": ""}})
    assert resolve(True)[0].model.remat == "dots"
    explicit = run_config.with_fields(AUTO, [("model.remat", "attention")])
    assert remat.resolve_remat(explicit, epath.Path(tmp_path), resumes=True) == (explicit, "")


def test_a_step_that_fits_with_no_policy_is_refused(choose, tmp_path):
    choose(gib=101.0)
    message = r"model.remat='auto': dots is the smallest, but no policy fits: 101.00 GiB.*raise train.accumulation"
    with pytest.raises(UserError, match=message):
        remat.resolve_remat(AUTO, epath.Path(tmp_path), resumes=False)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ({"platform": "gpu"}, "this process holds the GPUs; run `llmjax plan --topology=gpu`"),
        ({"platform": "tpu", "device_kind": "TPU v3"}, "device_kind='TPU v3'.*; or set model.remat to a policy"),
    ],
)
def test_devices_that_cannot_be_compiled_for_are_refused(choose, tmp_path, monkeypatch, device, message):
    choose()
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(**device)])
    with pytest.raises(UserError, match=message):
        remat.resolve_remat(AUTO, epath.Path(tmp_path), resumes=False)


def policies(workdir: pathlib.Path) -> tuple[str, str, bool]:
    """The policy in config.json, that in run.json, and whether it was chosen."""
    config, run = (json.loads((workdir / name).read_text()) for name in (workdirs.CONFIG, workdirs.RUN))
    return config["model"]["remat"], run["remat"]["policy"], bool(run["remat"]["reason"])


def test_a_run_records_the_policy(tmp_path):
    """The CPU's memory is large enough for all policies, so that nothing is computed again."""
    corpus, workdir = jobs.write_corpus(tmp_path / "corpus"), tmp_path / "run"
    command = jobs.command("train", workdir, corpus, model__remat="auto", model__num_layers=1, train__steps=2)
    printed = jobs.run(command, LLMJAX_CPU_DEVICES="2")
    assert "model.remat='auto': none, computes least again of those that fit" in printed
    assert "over 2 devices" in printed and policies(workdir) == ("none", "none", True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_processes_agree_and_other_commands_use_the_recorded_policy(tmp_path):
    corpus, workdir = jobs.write_corpus(tmp_path / "corpus"), tmp_path / "run"
    settings = {"model__remat": "auto", "model__num_layers": 1, "train__steps": 8}
    train = lambda **changes: jobs.command("train", workdir, corpus, **settings, **changes)
    refused = jobs.run(jobs.launch(train(parallel__backend="pmap"), 2, 2), status=78)
    assert "model.remat='auto': parallel.backend='pmap': only 'jit' compiles ahead of time" in refused
    jobs.run(jobs.launch(train(train__stop_at=4), 2, 2))
    chosen = ("none", "none", True)
    assert policies(workdir) == chosen
    printed = jobs.run(train(train__stop_at=6))
    assert "as this run chose at its start" in printed and "compiling the step" not in printed
    assert policies(workdir) == chosen
    printed = jobs.run([str(jobs.LLMJAX), "train", f"--workdir={workdir}"])
    assert "remat" not in printed and policies(workdir) == chosen
    jobs.run([*jobs.command("eval", workdir), "--config.model.remat=auto"])
