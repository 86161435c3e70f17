"""BERT and ModernBERT of transformers: the same logits, loss, gradients and tensors."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs `make parity`")
transformers = pytest.importorskip("transformers", reason="parity needs `make parity`")

from flax import nnx
import jax
import jax.numpy as jnp

from llmjax.batch import Batch
from llmjax.binding import bind
from llmjax.errors import UserError
from llmjax.interop.encoder import ARCHITECTURES
from llmjax.models import registry
from llmjax.models.encoder import EncoderConfig
from tests.interop import state_dicts
from tests.parity.reference import LENGTHS, SEQ, VOCAB, add_noise, loss_logits_and_grads


def _bert(**other):
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
        type_vocab_size=3,
        attn_implementation="eager",
        **other,
    )
    return transformers.BertForMaskedLM(config)


def _modernbert(**other):
    config = transformers.ModernBertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
        local_attention=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        attn_implementation="eager",
        **other,
    )
    return transformers.ModernBertForMaskedLM(config)


MODELS = {
    "bert": _bert,
    "bert-tanh": lambda: _bert(hidden_act="gelu_new"),
    "modernbert": _modernbert,
    "modernbert-global": lambda: _modernbert(global_attn_every_n_layers=1),
    "modernbert-irregular": lambda: _modernbert(
        layer_types=[f"{kind}_attention" for kind in ("sliding", "full", "full", "sliding", "full")]
    ),
}
# Hugging Face parameter -> our parameter and the layer, for the gradients that are compared.
GRADIENTS = {
    "BertForMaskedLM": {
        "bert.embeddings.word_embeddings.weight": lambda g: g["embed"]["table"][:VOCAB],
        "bert.encoder.layer.1.attention.self.key.weight": lambda g: (
            g["blocks"]["attention"]["key"]["weight"][1].reshape(32, 32).T
        ),
        "bert.encoder.layer.0.output.LayerNorm.weight": lambda g: g["blocks"]["mlp_norm"]["scale"][0],
        "bert.embeddings.token_type_embeddings.weight": lambda g: g["token_types"]["table"],
    },
    "ModernBertForMaskedLM": {
        "model.embeddings.tok_embeddings.weight": lambda g: g["embed"]["table"][:VOCAB],
        "model.layers.0.mlp.Wo.weight": lambda g: g["first"]["mlp"]["down"]["weight"][0].T,
        "model.layers.2.attn_norm.weight": lambda g: g["blocks"]["attention_norm"]["scale"][1],
        "decoder.bias": lambda g: g["head"]["bias"][:VOCAB],
    },
}


def masked_rows() -> Batch:
    """Rows with padding at their ends, random token types, and a third of the tokens scored."""
    rng = np.random.default_rng(0)
    shape = len(LENGTHS), SEQ
    used = np.arange(SEQ) < np.array(LENGTHS)[:, None]
    return Batch(
        # Above the special ids: torch gives the row of a padding id no gradient.
        inputs=np.where(used, rng.integers(3, VOCAB, shape), 0).astype(np.int32),
        targets=rng.integers(3, VOCAB, shape).astype(np.int32),
        weights=(used & (rng.random(shape) < 0.3)).astype(np.float32),
        segments=used.astype(np.int32),
        positions=np.broadcast_to(np.arange(SEQ, dtype=np.int32), shape),
        sample=np.zeros((len(LENGTHS), 2), np.uint32),
        token_types=rng.integers(0, 3, shape).astype(np.int32),
    )


def imported(model):
    architecture = ARCHITECTURES[type(model).__name__]
    config = bind(EncoderConfig, architecture.read_config(model.config.to_dict()), "model")
    rules = architecture.rules(config)
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    return architecture, config, rules, state


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_gradients_and_tensors(name):
    torch.manual_seed(0)
    model = add_noise(MODELS[name](), 0.2)
    architecture, config, rules, state = imported(model)
    params = state_dicts.load(rules, state, config)
    back = state_dicts.dump(rules, params, config)
    assert set(back) == set(state)
    for key, value in state.items():
        np.testing.assert_array_equal(back[key].view(np.uint32), value.view(np.uint32), err_msg=key)
    written = bind(EncoderConfig, architecture.read_config(architecture.write_config(config)), "model")
    assert written == config

    batch, graph = masked_rows(), registry.abstract(config)[0]
    used, scored = batch.segments > 0, batch.weights > 0
    tensor = lambda x: torch.tensor(np.asarray(x), dtype=torch.long)
    arguments = {"input_ids": tensor(batch.inputs), "attention_mask": tensor(used)}
    if config.token_types:
        arguments["token_type_ids"] = tensor(batch.token_types)
    output = model(**arguments, labels=tensor(np.where(scored, batch.targets, -100)))
    output.loss.backward()

    (loss, logits), grads = loss_logits_and_grads(graph, params, batch)
    expected = output.logits.detach().numpy()
    np.testing.assert_allclose(np.asarray(logits)[used][:, :VOCAB], expected[used], atol=2e-4, rtol=0)
    assert abs(float(loss) - output.loss.item()) < 1e-5
    parameters = dict(model.named_parameters())
    for key, pick in GRADIENTS[type(model).__name__].items():
        expected = parameters[key].grad.numpy()
        np.testing.assert_allclose(pick(grads), expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=key)


def test_the_pooler():
    torch.manual_seed(0)
    model = add_noise(transformers.BertModel(_bert().config), 0.2)
    config = bind(EncoderConfig, ARCHITECTURES["BertForMaskedLM"].read_config(model.config.to_dict()), "model")
    config = dataclasses.replace(config, pooler=True)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), registry.abstract(config)[1])
    pooling_model = nnx.merge(registry.abstract(config)[0], params)
    weight, bias = model.pooler.dense.weight.detach().numpy(), model.pooler.dense.bias.detach().numpy()
    pooling_model.pooler.weight[...], pooling_model.pooler.bias[...] = weight.T, bias
    hidden = np.random.default_rng(0).normal(size=(2, 5, 32)).astype(np.float32)
    expected = model.pooler(torch.tensor(hidden)).detach().numpy()
    np.testing.assert_allclose(pooling_model.pool(hidden), expected, atol=1e-5)


def test_names_of_the_first_published_files():
    """gamma and beta, the position buffer, and the parts that masked-LM models of transformers leave out too."""
    model = _bert()
    architecture, config, rules, state = imported(model)
    old = {key.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x for key, x in state.items()}
    old["bert.embeddings.position_ids"] = np.arange(40)[None]
    old["bert.pooler.dense.weight"] = np.zeros((32, 32), np.float32)
    old["cls.seq_relationship.bias"] = np.zeros(2, np.float32)
    kept = {key: value for key, value in old.items() if not key.startswith(architecture.left_out)}
    renamed = {architecture.rename(key): value for key, value in kept.items()}
    renamed.pop(None)
    jax.tree.map(
        np.testing.assert_array_equal, state_dicts.load(rules, renamed, config), state_dicts.load(rules, state, config)
    )


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("bert", {"is_decoder": True}, "is_decoder=True"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ("bert", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ("bert", {"hidden_act": "mish"}, "hidden_act='mish'"),
        ("modernbert", {"attention_bias": True}, "attention_bias=True"),
        ("modernbert", {"classifier_activation": "silu"}, "classifier_activation='silu'.*hidden_activation"),
        (
            "modernbert",
            {"layer_types": ["full_attention", "chunked_attention"]},
            "layer_types holds 'chunked_attention'",
        ),
        (
            "modernbert",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            "rope_parameters.full_attention.rope_type='yarn'",
        ),
    ],
)
def test_unsupported_fields_are_refused_by_name(name, change, words):
    model = MODELS[name]()
    with pytest.raises(UserError, match=words):
        ARCHITECTURES[type(model).__name__].read_config(model.config.to_dict() | change)


def test_the_published_modernbert_config_reads():
    """The fields of the published files, older than layer_types and rope_parameters."""
    hf = transformers.ModernBertConfig().to_dict()
    del hf["layer_types"], hf["rope_parameters"]
    hf |= {
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000.0,
        "local_rope_theta": 10000.0,
        "layer_norm_eps": 1e-05,
        "position_embedding_type": "absolute",
        "reference_compile": None,
        "repad_logits_with_grad": False,
        "gradient_checkpointing": False,
    }
    read = ARCHITECTURES["ModernBertForMaskedLM"].read_config
    assert read(hf) == read(transformers.ModernBertConfig().to_dict())
    config = bind(EncoderConfig, read(hf), "model")
    assert (config.window, config.attention_pattern) == (65, "gll")
    assert registry.count_parameters(dataclasses.replace(config, vocab_multiple=1)) == 149_655_232
