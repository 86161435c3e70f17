"""Fine-tuning by real commands: a run's parameters are imported, adapted, killed, resumed, merged and exported."""

import json
import pathlib

from etils import epath
import pytest

from llmjax.errors import UserError
from llmjax.run import loading
from tests import jobs

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

# Llama's layers, so that a class of transformers fits.
LORA = {"model__lora__rank": 4, "model__lora__layers": "('blocks.attention', '*.up')", "train__steps": 6}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    return jobs.write_corpus(tmp_path_factory.mktemp("corpus"), 30)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, corpus) -> pathlib.Path:
    """A run of four steps on bytes."""
    workdir = tmp_path_factory.mktemp("pretrained")
    jobs.run(jobs.command("train", workdir, corpus, train__steps=4), LLMJAX_CPU_DEVICES="8")
    return workdir


def import_run(source: pathlib.Path, workdir: pathlib.Path) -> pathlib.Path:
    printed = jobs.run([str(jobs.LLMJAX), "import", f"--from={source}", f"--workdir={workdir}"], LLMJAX_CPU_DEVICES="8")
    assert f"of step 4 of {source} are now {workdir}" in printed
    return workdir


def tune(workdir: pathlib.Path, corpus: pathlib.Path, **changes) -> list[str]:
    """The command that trains adapters in a workdir with imported parameters."""
    without_model = {name: value for name, value in jobs.TINY.items() if not name.startswith(("model.", "data.token"))}
    settings = {**without_model, **{name.replace("__", "."): value for name, value in {**LORA, **changes}.items()}}
    settings["data.sources.main.path"] = f"{corpus}/*.txt"
    settings["checkpoint.every"] = 2
    return [str(jobs.LLMJAX), "train", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in settings.items())]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, corpus, pretrained) -> tuple[pathlib.Path, str]:
    """A run of adapters on the pretrained model, not interrupted, and what it printed."""
    workdir = import_run(pretrained, tmp_path_factory.mktemp("tuned") / "run")
    return workdir, jobs.run(tune(workdir, corpus), LLMJAX_CPU_DEVICES="8")


def test_the_start_says_what_is_trained_and_how_fast(tuned):
    printed = tuned[1]
    assert "optimizer.learning_rate=0.0002: lower than the default of pretraining (0.001)" in printed
    assert "starting from the parameters that were imported from" in printed
    assert "are trained" in printed


def test_a_killed_and_resumed_run_of_adapters_equals_an_unbroken_one(tuned, corpus, pretrained, tmp_path):
    unbroken, _ = tuned
    resumed = import_run(pretrained, tmp_path / "resumed")
    arguments = tune(resumed, corpus, train__compilation_cache=unbroken / "compilation_cache")
    jobs.kill_after_checkpoint(arguments, resumed / "checkpoints" / "2", LLMJAX_CPU_DEVICES="8")
    # Neither the settings of the model nor those of the optimizer are repeated: config.json has them.
    printed = jobs.run([str(jobs.LLMJAX), "train", f"--workdir={resumed}"], LLMJAX_CPU_DEVICES="8")
    assert "resuming at step" in printed
    assert jobs.trace(resumed) == jobs.trace(unbroken)
    fingerprints = [{k: v["fingerprint"] for k, v in jobs.checkpoints(each).items()} for each in (resumed, unbroken)]
    assert fingerprints[0] == fingerprints[1]


def test_merged_parameters_score_as_adapters_do_and_start_another_run(tuned, tmp_path):
    workdir, _ = tuned
    merged = tmp_path / "merged"
    jobs.run([str(jobs.LLMJAX), "import", f"--from={workdir}", f"--workdir={merged}"], LLMJAX_CPU_DEVICES="8")
    store = f"--config.data.store={workdir / 'store'}"
    for folder in (workdir, merged):
        jobs.run([str(jobs.LLMJAX), "eval", f"--workdir={folder}", store], LLMJAX_CPU_DEVICES="8")
    read = lambda folder, step: json.loads((folder / "eval" / str(step) / "validation.json").read_text())["total"]
    adapted, after = read(workdir, 6), read(merged, 0)
    # The same function, whose float32 sums are rounded in another order.
    assert adapted["nats"] == pytest.approx(after["nats"], rel=1e-5)
    assert adapted["num_targets"] == after["num_targets"]
    config = json.loads((merged / "config.json").read_text())
    assert config["model"]["lora"]["rank"] == 0


def test_a_step_of_the_imported_parameters_is_loaded_without_adapters(tuned):
    with loading.load(epath.Path(tuned[0]), step=0) as loaded:
        assert loaded.config.model.lora.rank == 0 and loaded.params_name == "imported parameters"


def test_changes_of_adapters_are_refused(tuned, corpus):
    printed = jobs.run(tune(tuned[0], corpus, model__lora__rank=8), status=78, LLMJAX_CPU_DEVICES="8")
    assert "model.lora.rank: 4 -> 8" in printed
    printed = jobs.run(tune(tuned[0], corpus, optimizer__frozen="('*.up',)"), status=78, LLMJAX_CPU_DEVICES="8")
    assert "optimizer.frozen: [] -> ['*.up']" in printed


def test_an_import_of_a_run_refuses_what_it_would_change(pretrained, tmp_path):
    from llmjax.interop.import_run import import_run

    with pytest.raises(UserError, match=r"model.lora=.*set it when you train"):
        import_run(epath.Path(pretrained), epath.Path(tmp_path / "new"), overrides=[("model.lora.rank", "4")])
    with pytest.raises(UserError, match="already contains a run"):
        import_run(epath.Path(pretrained), epath.Path(pretrained))
