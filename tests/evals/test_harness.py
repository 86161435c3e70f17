"""Evaluation scores every token of every document once, equally on any mesh, and each document independently."""

import dataclasses
import json
import math

from etils import epath
from flax import nnx
import jax
from jax.sharding import Mesh
import numpy as np
import pytest

from llmjax.batch import Batch
from llmjax.data.batches.pipeline import EvalData
from llmjax.data.config import ObjectiveConfig
from llmjax.data.store import prepare
from llmjax.data.store.tokenizer import load_tokenizer
from llmjax.errors import UserError
from llmjax.evals import harness
from llmjax.models.encoder import EncoderConfig
from llmjax.parallel import axes
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.run import config as run_config, state as states
from llmjax.run.config import resolve
from tests import jobs
from tests.train.trainer import one_device


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A config on two sources of bytes, and its store."""
    root = tmp_path_factory.mktemp("harness")
    for name, documents in (("one", 30), ("two", 17)):
        jobs.write_corpus(root / name, documents)
    settings = {**jobs.TINY, "train.global_batch": 8, "data.split.validation": 0.2}
    overrides = [(name, str(value)) for name, value in settings.items()]
    overrides += [(f"data.sources.{name}.path", f"{root / name}/*.txt") for name in ("one", "two")]
    config = resolve(str(jobs.ROOT / "configs" / "quickstart.py"), overrides)
    prepare.prepare(config.data, root / "store")
    vocab = load_tokenizer(root / "store").vocab_size
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab)), root / "store"


def score(prepared, mesh: Mesh, *, split: str = "validation", zero: bool = False) -> tuple[dict, dict, object]:
    config, store = prepared
    with axes.use_mesh(mesh, config.parallel.rules):
        spec = states.make_state_spec(config.model, config.optimizer, horizon=10)
        params = states.init_state(spec, config.model, seed=1).params
        if zero:
            params = jax.tree.map(lambda x: x * 0, params)
        scores = evaluator(config, store, spec.graph).score_split(params, split)
    assert scores is not None
    return scores, params, spec.graph


def evaluator(config, store, graph) -> harness.Evaluator:
    manifest = prepare.read_manifest(store)
    assert manifest is not None
    return harness.Evaluator(graph, config, run_config.objective(config, load_tokenizer(store)), store, manifest)


def test_should_stop_is_called_before_each_batch_and_ends_the_evaluation(prepared):
    config, store = prepared
    answers = []

    def should_stop() -> bool:
        answers.append(len(answers) == 1)
        return answers[-1]

    with axes.use_mesh(one_device(), config.parallel.rules):
        spec = states.make_state_spec(config.model, config.optimizer, horizon=10)
        params = states.init_state(spec, config.model, seed=1).params
        assert evaluator(config, store, spec.graph).score_split(params, "validation", should_stop) is None
    assert answers == [False, True]


def test_a_uniform_model_needs_log_vocab_nats(prepared):
    """With zero parameters every id of the vocabulary is as likely as any other; padding ids have no part in it."""
    config, store = prepared
    scores, _, _ = score(prepared, one_device(), zero=True)
    manifest = prepare.read_manifest(store)
    for name, source in scores["sources"].items():
        expected = manifest["sources"][name]["validation"]
        assert (source["num_targets"], source["text_bytes"]) == (expected["tokens"], expected["text_bytes"])
        # One token a byte and one EOS a document: bits per byte are those of all tokens over the bytes alone.
        assert source["num_targets"] == source["text_bytes"] + source["documents"]
        bits = math.log2(config.model.vocab_size) * source["num_targets"] / source["text_bytes"]
        # A batch adds some 500 equal terms in float32, which may all round the same way: 500 x 6e-8.
        assert source["bits_per_byte"] == pytest.approx(bits, rel=3e-5)
        assert source["loss"] == pytest.approx(math.log(config.model.vocab_size), rel=3e-5)
    total = scores["total"]
    assert total["num_targets"] == sum(source["num_targets"] for source in scores["sources"].values())


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_any_mesh_gives_the_same_scores(prepared, mesh):
    one, _, _ = score(prepared, one_device())
    many, _, _ = score(prepared, make_mesh(MeshConfig(**{"data": 1, **mesh})))
    for name, expected in one["sources"].items():
        scores = many["sources"][name]
        for exact in ("num_targets", "documents", "text_bytes"):
            assert scores[exact] == expected[exact]
        # Sums of a batch are float32 in another order; between batches they are float64.
        assert scores["nats"] == pytest.approx(expected["nats"], rel=1e-6)
        ties_of_logits = 2 / expected["num_targets"]
        assert scores["accuracy"] == pytest.approx(expected["accuracy"], abs=ties_of_logits)


def test_a_document_scores_the_same_alone_and_packed(prepared):
    """The oracle reads the store itself: chunks of seq_len tokens, a row each, unpacked, in float64, without losses."""
    config, store = prepared
    scores, params, graph = score(prepared, one_device())
    model, tokenizer, seq = nnx.merge(graph, params), load_tokenizer(store), config.data.seq_len
    from llmjax.data.store.token_store import TokenStore

    tokens = TokenStore(store / "one" / "validation")
    begin = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    nats = 0.0
    for start, length in zip(tokens.starts(), tokens.lengths(), strict=True):
        document = tokens.read(int(start), int(length)).astype(np.int32)
        assert document[-1] == tokenizer.eos_id
        before = np.r_[begin, document[:-1]]
        for first in range(0, len(document), seq):
            inputs, targets = before[first : first + seq], document[first : first + seq]
            width = len(targets)
            pad = lambda x, n=width: np.pad(x, (0, seq - n))[None].astype(np.int32)
            row = Batch(
                inputs=pad(inputs),
                targets=pad(targets),
                weights=pad(np.ones(width)).astype(np.float32),
                segments=pad(np.ones(width)),
                positions=pad(np.arange(width)),
                sample=np.zeros((1, 2), np.uint32),
            )
            logits = np.asarray(model.unembed(model(row).hidden), np.float64)[0, :width]
            highest = logits.max(-1)
            log_z = highest + np.log(np.exp(logits - highest[:, None]).sum(-1))
            nats += float((log_z - logits[np.arange(width), targets]).sum())
    # float32 logits of order 1 over thousands of tokens.
    assert scores["sources"]["one"]["nats"] == pytest.approx(nats, rel=1e-5)


def test_an_empty_split_is_refused(prepared, tmp_path):
    config, _ = prepared
    bare = dataclasses.replace(config.data, split=dataclasses.replace(config.data.split, test=0.0))
    prepare.prepare(bare, tmp_path / "store")
    with pytest.raises(UserError, match=r"--split=test: that split of .* is empty; raise data.split.test"):
        score((dataclasses.replace(config, data=bare), tmp_path / "store"), one_device(), split="test")


def test_the_file_of_scores_names_step_parameters_and_fingerprint(tmp_path):
    scores = {"split": "test", "total": {"loss": 1.0}, "sources": {}}
    path = harness.write(epath.Path(tmp_path), 7, scores, parameters="EMA of the parameters", fingerprint="ab")
    assert json.loads(path.read_text()) == {
        "step": 7,
        "parameters": "EMA of the parameters",
        "fingerprint": "ab",
        **scores,
    }
    assert path == epath.Path(tmp_path) / "eval" / "7" / "test.json"


def test_a_masked_objective_scores_masked_tokens_and_a_majority_class_baseline(prepared):
    """A uniform model needs log vocab nats for each; the baseline is the share of the most frequent target."""
    config, store = prepared
    encoder = EncoderConfig(num_layers=1, embed=32, num_heads=4)
    config = dataclasses.replace(config, model=encoder, objective=ObjectiveConfig(name="masked"))
    objective = run_config.objective(config, load_tokenizer(store))
    config = run_config.with_objective(config, objective)
    scores, _, _ = score((config, store), make_mesh(MeshConfig(data=8)), zero=True)
    again, _, _ = score((config, store), one_device(), zero=True)
    for name, source in scores["sources"].items():
        data = EvalData(store, config.data, split="validation", source=name, batch=8, objective=objective)
        counts = sum(np.bincount(b.targets.ravel(), b.weights.ravel(), 300) for b in data.batches(np.arange(8)))
        assert source["num_targets"] == counts.sum() == again["sources"][name]["num_targets"]
        assert source["baseline_accuracy"] == counts.max() / counts.sum() and source["bits_per_byte"] is None
        assert source["loss"] == pytest.approx(math.log(config.model.vocab_size), rel=3e-5)
    assert any("majority-class baseline" in line for line in harness.describe(scores))
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=259))
    with pytest.raises(UserError, match=r"objective\.name='masked' needs 260 ids, but model\.vocab_size=259"):
        score((small, store), one_device())
