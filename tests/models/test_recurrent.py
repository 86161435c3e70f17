"""What is specific to the recurrent family: states, loops over time, costs, limits."""

import dataclasses
import pathlib

from flax import nnx
import jax
import numpy as np
import pytest

from llmjax.binding import bind, load_module
from llmjax.errors import UserError
from llmjax.inference.generate import generate
from llmjax.inference.sampling import Sampling
from llmjax.models import registry
from llmjax.models.recurrent import RecurrentConfig
from llmjax.optim.layerwise import kind, matrix_view
from tests.batches import packed
from tests.models.programs import assert_close, init_model, logits, loss_and_grads
from tests.models.variants import LSTM, RECURRENT, RGLRU, VOCAB

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
every_variant = pytest.mark.parametrize("name", RECURRENT)


@pytest.mark.parametrize("name", ["lstm", "rglru"])
def test_unrolled_time_loops_do_not_change_results(name):
    config = dataclasses.replace(RECURRENT[name], dropout=0.2)
    graph, params = init_model(config)
    if name == "rglru":
        others = [dataclasses.replace(config, recurrence="sequential", unroll=unroll) for unroll in (1, 7)]
    else:
        others = [dataclasses.replace(config, unroll=7)]
    batch, key = packed(2, 24, VOCAB), jax.random.key(1)
    expected = loss_and_grads(graph, params, batch, key)
    for other in others:
        assert_close(loss_and_grads(registry.abstract(other)[0], params, batch, key), expected, 1e-5)


@pytest.mark.parametrize("name", ["lstm", "rglru"])
def test_remat_attention_does_not_run_the_recurrence_again(name):
    """One loop forward and one backward over time; with full remat there is one more."""
    for remat, loops in (("attention", 2), ("full", 3)):
        config = dataclasses.replace(RECURRENT[name], num_layers=1, scan=False, remat=remat, recurrence="sequential")
        graph, shapes, _ = registry.abstract(config)
        batch = packed(1, 24, VOCAB)
        score = lambda params, graph=graph, batch=batch: nnx.merge(graph, params)(batch).hidden.sum()
        assert str(jax.make_jaxpr(jax.grad(score))(shapes)).count("scan[") == loops


@every_variant
def test_padding_does_not_change_the_state(name):
    """The state after a padded prompt is, to the last bit, that after the prompt alone with other padding."""
    graph, params = init_model(RECURRENT[name])
    model = nnx.merge(graph, params)
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(0, VOCAB, (3, 9)), np.array([9, 1, 4])
    other = np.where(np.arange(9) < lengths[:, None], tokens, (tokens + 7) % VOCAB)
    prefill = jax.jit(lambda tokens: model.prefill(tokens, lengths, 20))
    jax.tree.map(np.testing.assert_array_equal, prefill(tokens), prefill(other))


def test_batched_prompts_generate_what_each_generates_alone():
    for config in (LSTM, RGLRU):
        graph, params = init_model(config)
        prompts = [[5], list(range(1, 40)), [8, 8, 3]]
        go = lambda some, graph=graph, params=params, config=config: generate(
            graph, params, config, some, Sampling(max_tokens=9, temperature=0), stop_ids=[-1]
        )
        assert go(prompts) == [go([prompt])[0] for prompt in prompts]


@pytest.mark.parametrize("name", ["gru", "zaremba", "rglru"])
def test_flops_are_what_the_compiler_counts(name):
    """Forward pass of one document, loops unrolled."""
    fields = dict(scan=False, vocab_multiple=1, embed=128, recurrence="sequential", unroll=24)
    config = dataclasses.replace(RECURRENT[name], **fields, hidden=6 * RECURRENT[name].hidden)
    graph, shapes, _ = registry.abstract(config)
    counted = logits.lower(graph, shapes, packed(1, 24, VOCAB)).compile().cost_analysis()["flops"]
    claimed = config.flops_per_token(24) / 3 * 24
    # What is elementwise is not claimed; at these widths it is up to a quarter.
    assert claimed < counted < 1.25 * claimed


def test_parameter_counts():
    width, hidden, layers = 32, 48, 2
    count = lambda **fields: registry.count_parameters(dataclasses.replace(LSTM, vocab_multiple=1, **fields))
    outside = VOCAB * width + width
    lstm = 4 * (width * hidden + hidden * hidden + hidden) + hidden * width + width + width
    assert count() == outside + layers * lstm
    gru = 3 * (width * hidden + hidden * hidden + hidden) + hidden + hidden * width + width + width
    assert count(cell="gru") == outside + layers * gru
    griffin = 2 * (width * hidden + hidden) + hidden * width + width + 5 * hidden
    griffin += 2 * (hidden * hidden // 4 + hidden) + hidden + 2 * width
    assert count(cell="rglru", mlp=40, gate_blocks=4) == outside + layers * (griffin + 3 * width * 40 + 2 * 40 + width)


def recipe(size: str) -> dict:
    return load_module(CONFIGS / "recurrent.py").get_config(size).to_dict()


def test_the_published_shapes():
    """Zaremba et al. state 66 million, of which the softmax's bias (10,000) and nothing else is absent here."""
    model = dataclasses.replace(bind(RecurrentConfig, recipe("zaremba")["model"]), vocab_size=10_000, vocab_multiple=1)
    assert registry.count_parameters(model) == 66_022_000 - 10_000 == 2 * 10_000 * 1500 + 2 * (8 * 1500**2 + 4 * 1500)


def test_hawk_has_the_size_of_its_name():
    """De et al. print the size with one decimal, and not their vocabulary: what lies outside the embedding is 1.3
    billion within half of that decimal."""
    hawk = dataclasses.replace(bind(RecurrentConfig, recipe("hawk-1.3B")["model"]), vocab_size=32_000, vocab_multiple=1)
    outside = registry.count_parameters(hawk) - 32_000 * hawk.embed
    assert abs(outside - 1.3e9) < 0.05e9
    # The matrices of table 2: three of the recurrent block, three of the feed-forward; and a 16th of each gate's.
    width, hidden = 2048, 2560
    matrices = 24 * (3 * width * hidden + 3 * width * 3 * width + 2 * hidden**2 // 16)
    assert 0 < outside - matrices < 0.001 * matrices, "norms, biases, convolutions and decays"


def test_every_gate_is_a_matrix_of_its_own():
    """Weight decay and Muon handle each weight by itself, even if several are concatenated for one matmul."""
    kinds = {"table": set(), "matrix": set(), "vector": set(), "head": set()}
    for config in (dataclasses.replace(LSTM, tie_embeddings=False), RGLRU, RECURRENT["gru"]):
        _, shapes, names = registry.abstract(config)
        leaves = jax.tree_util.tree_flatten_with_path(shapes)[0]
        for (path, leaf), axis in zip(
            leaves, jax.tree.leaves(names, is_leaf=lambda x: isinstance(x, tuple)), strict=True
        ):
            name = "/".join(entry.key for entry in path)
            kinds[kind(axis)].add(name)
            if kind(axis) == "matrix":
                view = matrix_view(leaf.shape, axis)[0]
                side = 12 if "_gate/" in name else 32  # the gates' blocks of Griffin, 48 / 4 wide
                assert min(view[-2:]) >= side and len(view) == (4 if "_gate/" in name else 3), name
    cell = "blocks/cell"
    gates = ("input", "forget", "new", "output", "reset", "update")
    matrices = {f"{cell}/{side}/{gate}/weight" for side in ("inputs", "recurrent") for gate in gates}
    matrices |= {f"{cell}/{name}/weight" for name in ("out", "input", "gate", "input_gate", "decay_gate")}
    matrices |= {f"blocks/mlp/{name}/weight" for name in ("gate", "up", "down")}
    assert kinds["matrix"] == matrices
    assert kinds["table"] == {"embed/table", f"{cell}/conv"}
    assert kinds["head"] == {"head"}
    assert all(name.endswith(("bias", "scale", "decay")) for name in kinds["vector"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"cell": "gruu"}, "model.cell='gruu'.*did you mean 'gru'"),
        ({"norm": "batchnorm"}, "model.norm='batchnorm'"),
        ({"remat": "half"}, "model.remat='half'"),
        ({"recurrence": "associative"}, "model.recurrence='associative'.*cell='rglru'"),
        ({"cell": "rglru", "recurrence": "associative", "unroll": 4}, "model.unroll=4"),
        ({"gate_blocks": 2}, "model.gate_blocks=2: only model.cell='rglru'"),
        ({"cell": "rglru", "gate_blocks": 3}, "model.gate_blocks=3: must divide .*256"),
        ({"num_layers": 0}, "model.num_layers=0"),
        ({"unroll": 0}, "model.unroll=0"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"norm_eps": 0.0}, "model.norm_eps=0.0"),
    ],
)
def test_a_value_out_of_bounds_is_named(fields, words):
    with pytest.raises(UserError, match=words):
        RecurrentConfig(**fields)


def test_the_mesh_must_fit_the_model():
    LSTM.check(seq_len=10**6, tensor=4)
    with pytest.raises(UserError, match=r"mesh.tensor=5: must divide model.hidden=48"):
        LSTM.check(seq_len=8, tensor=5)
    with pytest.raises(UserError, match=r"mesh.tensor=8: must divide model.gate_blocks=4"):
        RGLRU.check(seq_len=8, tensor=8)
    LSTM.check_mesh({"data": 2, "slice": 2, "tensor": 2})
    with pytest.raises(UserError, match=r"mesh.sequence=2: model.family='recurrent' passes a state .* use mesh.fsdp"):
        LSTM.check_mesh({"data": 4, "sequence": 2})
