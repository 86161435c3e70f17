"""A tiny model that was overfitted to a few documents writes them again, and not those of validation; and it exposes a
canary that was among them."""

import dataclasses
import json
import math

from flax import nnx
import jax
import numpy as np
import optax
import pytest

from llmjax.data.batches.pipeline import EvalData
from llmjax.data.config import DataConfig, SourceConfig, TokenizerConfig
from llmjax.data.store.prepare import prepare
from llmjax.errors import UserError
from llmjax.evals.config import TaskConfig
from llmjax.evals.requests import LanguageModel
from llmjax.evals.tasks import run
from llmjax.evals.tasks.memorisation import draw_alternatives, find_exposure
from llmjax.nn import losses
from llmjax.parallel import axes
from tests.evals.tasks.models import make_loaded, write_records
from tests.serve import runs
from tests.train.trainer import one_device

RNG = np.random.default_rng(0)
CANARY = "the code is 831942"
UNSEEN = "the code is 275610"
DOCUMENTS, PROMPT, CONTINUATION = 12, 8, 16
STEPS = 150


@pytest.fixture(scope="module", autouse=True)
def mesh():
    with axes.use_mesh(one_device(), runs.make_config().parallel.rules):
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Random documents of 30 letters; one of six letters, which is too short, and the canary."""
    folder = tmp_path_factory.mktemp("store")
    texts = ["".join(RNG.choice(list("abcdefgh "), 30)) for _ in range(2 * DOCUMENTS)]
    records = [{"text": text, "split": ["train", "validation"][n % 2]} for n, text in enumerate(texts)]
    records += [{"text": text, "split": "train"} for text in ("abcdef", CANARY)]
    source = SourceConfig(path=write_records(folder / "a.jsonl", records), split_field="split")
    config = DataConfig(sources={"main": source}, tokenizer=TokenizerConfig(kind="bytes"), workers=1, seq_len=64)
    prepare(config, folder / "store")
    return folder / "store"


@pytest.fixture(scope="module")
def overfitted(store):
    """The model, with the parameters that Adam found for the training split."""
    loaded = dataclasses.replace(make_loaded(), store=store, fingerprint="overfitted")
    config = loaded.config
    data = EvalData(store, config.data, split="train", source="main", batch=16, objective=loaded.objective)
    (batch,) = data.batches(np.arange(16))
    adam = optax.adam(1e-2)
    params = jax.tree.map(lambda leaf: leaf / 3, loaded.params)  # as at the start of training

    @jax.jit
    def train(params):
        def loss(params):
            model = nnx.merge(loaded.graph, params)
            sums = losses.batch_loss(model(batch).hidden, model.unembed, batch, chunk=0, z_loss=0.0)
            return sums.nats / sums.weight

        def step(carry, _):
            params, state = carry
            updates, state = adam.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, adam.init(params)), length=STEPS)[0][0]

    return dataclasses.replace(loaded, params=train(params))


def evaluate(folder, loaded, **options):
    options = {"prompt_tokens": PROMPT, "continuation_tokens": CONTINUATION, "alternatives": 99} | options
    task = TaskConfig(kind="memorisation", **options)
    record = run.evaluate(folder, loaded, "mine", task, make_model=lambda: LanguageModel(loaded, 8))
    return record, [json.loads(line) for line in (folder / "eval" / "0" / "mine.jsonl").read_text().splitlines()]


def test_an_overfitted_model_writes_its_training_text_and_exposes_the_canary(tmp_path, overfitted):
    record, lines = evaluate(tmp_path, overfitted, canaries=(CANARY, UNSEEN))
    values = {name: metric["value"] for name, metric in record["metrics"].items()}
    assert record["documents"] == {"train": DOCUMENTS, "validation": DOCUMENTS}
    assert values["extraction_rate"] > 0.8 and values["control_rate"] == 0
    assert values["extraction_gap"] == values["extraction_rate"] - values["control_rate"]
    assert record["metrics"]["extraction_gap"]["low"] > 0
    assert values["matched_tokens"] > CONTINUATION / 2 > values["control_matched_tokens"]
    of_canary, of_unseen = record["canaries"]
    assert of_canary == {"input": CANARY, "exposure": pytest.approx(math.log2(100)), "rank": 1, "alternatives": 99}
    assert of_unseen["exposure"] < of_canary["exposure"] - 1
    assert values["exposure"] == pytest.approx((of_canary["exposure"] + of_unseen["exposure"]) / 2)
    # What one forward pass tells is what the model writes.
    model = LanguageModel(overfitted, 8)
    documents = [line for line in lines if line["split"] != "canary"]
    prompts = [model.encode_prompt(line["input"]) for line in documents]
    for line, text in zip(documents, model.generate(prompts, max_tokens=CONTINUATION), strict=True):
        count = line["matched_tokens"]
        assert line["prediction"] == text[:count] == line["target"][:count]
        assert count == CONTINUATION or text[count : count + 1] != line["target"][count]
        assert line["extraction_rate"] == (count == CONTINUATION)


def test_a_limit_is_of_each_split(tmp_path, overfitted):
    record, lines = evaluate(tmp_path, overfitted, limit=3)
    assert record["documents"] == {"train": 3, "validation": 3} and len(lines) == 6
    assert "exposure" not in record["metrics"]


def test_texts_that_cannot_be_continued(tmp_path, overfitted):
    with pytest.raises(UserError, match=r"eval\.tasks\.mine\.prompt_tokens=40: no training document .* has the 56 tok"):
        evaluate(tmp_path, overfitted, prompt_tokens=40)
    with pytest.raises(UserError, match="prompt_tokens=60: with continuation_tokens=16, more than the 64 tokens"):
        evaluate(tmp_path, overfitted, prompt_tokens=60)
    without = dataclasses.replace(overfitted, store=tmp_path)
    with pytest.raises(UserError, match="holds no token store, so the training documents are unknown"):
        evaluate(tmp_path, without)


def test_exposure():
    """By hand: of 8 texts, two are at least as likely as the canary."""
    assert find_exposure(3.0, [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]) == (math.log2(8) - math.log2(3), 3)
    assert find_exposure(1.0, [1.0] * 7) == (0, 8)  # a uniform model exposes nothing


def test_alternatives_differ_in_their_digits():
    texts = draw_alternatives(CANARY, 50)
    assert len(set(texts)) == 50 and CANARY not in texts
    assert all(text.startswith("the code is ") and text[12:].isdigit() and len(text) == len(CANARY) for text in texts)
    assert sorted(draw_alternatives("room 7!", 50)) == [f"room {digit}!" for digit in "012345689"]
