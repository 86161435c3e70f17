"""Recurrent layers against torch.nn and, for the linear recurrence, against RecurrentGemma's blocks."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs `make parity`")
transformers = pytest.importorskip("transformers", reason="parity needs `make parity`")

from flax import nnx
import jax
import jax.numpy as jnp

from llmjax.models import registry
from llmjax.models.recurrent import RecurrentConfig
from llmjax.nn.recurrent import CELLS
from tests.batches import packed

VOCAB, WIDTH, LAYERS = 61, 24, 3
PLAIN = RecurrentConfig(
    vocab_size=VOCAB,
    vocab_multiple=1,
    num_layers=LAYERS,
    embed=WIDTH,
    norm="none",
    residual=False,
    tie_embeddings=True,
)
LAYER = {"rnn": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}


class TorchModel(torch.nn.Module):
    """Embedding and torch's own stack of layers."""

    def __init__(self, cell: str):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(VOCAB, WIDTH)
        self.layers = LAYER[cell](WIDTH, WIDTH, num_layers=LAYERS, batch_first=True)

    def forward(self, tokens):
        return self.layers(self.embed(tokens))[0]


def load(cell: str, tensors: dict) -> dict:
    """Our parameters from torch's, which stacks the gates and has two biases a layer."""
    gates = CELLS[cell].gates

    def stacked(name: str, gate: int) -> np.ndarray:
        layers = [tensors[f"layers.{name}_l{i}"] for i in range(LAYERS)]
        return np.stack([np.split(layer, len(gates))[gate].T for layer in layers])

    inputs, recurrent = {}, {}
    for i, gate in enumerate(gates):
        inputs[gate] = {"weight": stacked("weight_ih", i), "bias": stacked("bias_ih", i)}
        recurrent[gate] = {"weight": stacked("weight_hh", i)}
        if gate in CELLS[cell].two_bias_gates:
            recurrent[gate]["bias"] = stacked("bias_hh", i)
        else:
            inputs[gate]["bias"] = inputs[gate]["bias"] + stacked("bias_hh", i)
    return {"embed": {"table": tensors["embed.weight"]}, "blocks": {"cell": {"inputs": inputs, "recurrent": recurrent}}}


def arrays(named) -> dict:
    return {name: tensor.detach().numpy() for name, tensor in named}


@pytest.mark.parametrize("cell", LAYER)
def test_hidden_states_and_gradients_equal_those_of_torch(cell):
    """Packed rows of documents of random lengths, against torch on each document alone."""
    torch_model, batch = TorchModel(cell), packed(4, 40, VOCAB)
    params = load(cell, arrays(torch_model.named_parameters()))
    graph, shapes, _ = registry.abstract(dataclasses.replace(PLAIN, cell=cell, unroll=3))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    score = np.random.default_rng(1).normal(size=(*batch.inputs.shape, WIDTH)).astype(np.float32)
    score *= batch.weights[..., None]

    @jax.jit
    def loss_fn(params):
        hidden = nnx.merge(graph, params)(batch).hidden
        return jnp.sum(hidden * score), hidden

    (_, hidden), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    total = 0.0
    for row, segments in enumerate(batch.segments):
        for number in range(1, segments.max() + 1):
            (where,) = np.nonzero(segments == number)
            actual = torch_model(torch.tensor(batch.inputs[row, where][None]))[0]
            np.testing.assert_allclose(hidden[row, where], actual.detach().numpy(), rtol=0, atol=1e-5)
            total = total + (actual * torch.tensor(score[row, where])).sum()
    total.backward()
    expected = load(cell, arrays((name, p.grad) for name, p in torch_model.named_parameters()))
    gate = CELLS[cell].gates[-1]
    for path in (("embed", "table"), ("blocks", "cell", "inputs", gate), ("blocks", "cell", "recurrent", gate)):
        actual, expected_value = grads, expected
        for name in path:
            actual, expected_value = actual[name], expected_value[name]
        if (
            "bias" in (expected_value if isinstance(expected_value, dict) else {})
            and gate not in CELLS[cell].two_bias_gates
        ):
            expected_value["bias"] = expected_value["bias"] / 2  # torch's two biases have the same gradient
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()), actual, expected_value
        )


GRIFFIN = RecurrentConfig(
    vocab_size=VOCAB,
    vocab_multiple=1,
    cell="rglru",
    recurrence="associative",
    num_layers=2,
    embed=32,
    hidden=48,
    mlp=40,
    gate_blocks=4,
    norm_eps=1e-6,
)


def load_griffin(tensors: dict, *, root: float) -> dict:
    """Our parameters from RecurrentGemma's. It scales embeddings by `root` = sqrt(embed), but not the tied head, and
    its norms multiply by 1 + weight."""
    layer = lambda name: np.stack([tensors[f"model.layers.{i}.{name}"] for i in range(GRIFFIN.num_layers)])
    linear = lambda name: {"weight": layer(f"{name}.weight").swapaxes(1, 2), "bias": layer(f"{name}.bias")}
    flat = lambda name: layer(f"temporal_block.rg_lru.{name}_bias").reshape(GRIFFIN.num_layers, -1)
    gate = lambda name: {"weight": layer(f"temporal_block.rg_lru.{name}_weight"), "bias": flat(name)}
    cell = {
        "input": linear("temporal_block.linear_x"),
        "gate": linear("temporal_block.linear_y"),
        "out": linear("temporal_block.linear_out"),
        "conv": layer("temporal_block.conv_1d.weight")[:, :, 0, ::-1].swapaxes(1, 2).copy(),
        "conv_bias": layer("temporal_block.conv_1d.bias"),
        "input_gate": gate("input_gate"),
        "decay_gate": gate("recurrent_gate"),
        "decay": layer("temporal_block.rg_lru.recurrent_param"),
    }
    blocks = {
        "cell": cell,
        "cell_norm": {"scale": 1 + layer("temporal_pre_norm.weight")},
        "mlp": {name: linear(f"mlp_block.{name}_proj") for name in ("gate", "up", "down")},
        "mlp_norm": {"scale": 1 + layer("channel_pre_norm.weight")},
    }
    table = tensors["model.embed_tokens.weight"]
    return {
        "embed": {"table": table * root},
        "blocks": blocks,
        "norm": {"scale": 1 + tensors["model.final_norm.weight"]},
        "head": table.T.copy(),
    }


def test_the_linear_recurrence_equals_recurrent_gemma():
    """Logits of packed documents, and gradients, against transformers on each document alone."""
    torch.manual_seed(0)
    config = transformers.RecurrentGemmaConfig(
        vocab_size=VOCAB,
        num_hidden_layers=2,
        hidden_size=32,
        lru_width=48,
        num_attention_heads=4,
        intermediate_size=2 * GRIFFIN.mlp,
        block_types=("recurrent", "recurrent"),
        attention_window_size=8,
        use_cache=False,
        attn_implementation="eager",
    )
    model = transformers.RecurrentGemmaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    root = model.model.normalizer.item()
    tensors = {name: p for name, p in model.named_parameters() if name != "lm_head.weight"}
    params = load_griffin(arrays(tensors.items()), root=root)
    graph, shapes, _ = registry.abstract(GRIFFIN)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    batch = packed(4, 40, VOCAB)

    @jax.jit
    def loss_fn(params):
        lm = nnx.merge(graph, params)
        logits = 30.0 * jnp.tanh(lm.unembed(lm(batch).hidden) / 30.0)  # the reference caps logits at 30
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(picked * batch.weights), logits

    (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    total = 0.0
    for row, segments in enumerate(batch.segments):
        for number in range(1, segments.max() + 1):
            (where,) = np.nonzero(segments == number)
            actual = model(torch.tensor(batch.inputs[row, where][None])).logits[0]
            np.testing.assert_allclose(logits[row, where], actual.detach().numpy(), rtol=0, atol=2e-4)
            targets = torch.tensor(batch.targets[row, where], dtype=torch.long)
            total = total + torch.nn.functional.cross_entropy(actual, targets, reduction="sum")
    assert abs(loss - total.item()) / batch.weights.sum() < 1e-5
    total.backward()
    expected = load_griffin(arrays((name, p.grad) for name, p in tensors.items()), root=1.0)["blocks"]["cell"]
    for name in ("decay", "conv", "decay_gate", "input_gate", "input"):
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())
        jax.tree.map(close, grads["blocks"]["cell"][name], expected[name])
