"""Some steps of a recipe of each family lower the loss, twice with the same bits. `make recipes` trains all recipes."""

import json
import pathlib

import pytest

from llmjax.binding import load_module
from llmjax.models import registry
from llmjax.run import config as run_config
from tests import jobs

# Fifty steps gain more from optimised code than it takes to compile.
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess, pytest.mark.usefixtures("users_compiler")]


TOOL = load_module(jobs.ROOT / "tools" / "recipes.py")
RECIPES = {name: spec for name, (spec, _, _) in TOOL.list_recipes().items()}
# The first recipe of each family.
CHECKED = {run_config.resolve(spec, []).model.family: name for name, spec in reversed(RECIPES.items())}.values()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> dict:
    """Settings for a store of bytes of this project's sources, which needs no tokenizer to be trained."""
    corpus = jobs.write_corpus(tmp_path_factory.mktemp("corpus"), documents=200)
    workdir = tmp_path_factory.mktemp("prepared")
    jobs.run(jobs.command("prepare", workdir, corpus))
    return {
        "data.store": workdir / "store",
        "data.sources.main.path": f"{corpus}/*.txt",
        "data.tokenizer.kind": "bytes",
        "data.split.near_copies": "False",
        "data.seq_len": 64,
    }


def train_some_steps(spec: str, workdir: pathlib.Path, text: dict, steps: int) -> list[dict]:
    """The recipe's first steps, on rows of 64 bytes; compiled programs are shared by all runs beside this one."""
    settings = {
        **text,
        "train.compilation_cache": workdir.parent / "compiled",
        "train.global_batch": 8,
        "train.stop_at": steps,
        "train.log_every": 1,
        "eval.every": 0,
        "sample.prompts": "()",
    }
    arguments = [str(jobs.LLMJAX), "train", f"--config={spec}", f"--workdir={workdir}"]
    jobs.run([*arguments, *(f"--config.{name}={value}" for name, value in settings.items())])
    return jobs.metrics(workdir)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("t5:tiny", "recurrent:lstm") else pytest.mark.exhaustive)
        for name in CHECKED
    ],
)
def test_fifty_steps_lower_the_loss_and_ten_repeat(name, text, tmp_path):
    metrics = train_some_steps(RECIPES[name], tmp_path / "run", text, 50)
    start, end = metrics[0]["loss"], sum(line["loss"] for line in metrics[-10:]) / 10
    assert end < start - 0.5, f"loss {start:.3f} at first, {end:.3f} after fifty steps"
    score = json.loads((tmp_path / "run" / "eval" / "50" / "validation.json").read_text())
    assert score["total"]["loss"] < start
    again = train_some_steps(RECIPES[name], tmp_path / "again", text, 10)
    fields = ("step", "loss", "grad_norm", "batch_digest", "learning_rate")
    assert [[line[field] for field in fields] for line in metrics[:10]] == [
        [line[field] for field in fields] for line in again
    ]


def test_every_family_has_a_recipe():
    assert {run_config.resolve(spec, []).model.family for spec in RECIPES.values()} == set(registry.FAMILIES)
