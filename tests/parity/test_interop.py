"""Checkpoints of transformers, imported and exported: the same logits, the same text, the same tensors."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs `make parity`")
transformers = pytest.importorskip("transformers", reason="parity needs `make parity`")

from flax import nnx
import jax
import jax.numpy as jnp

from llmjax.batch import Batch
from llmjax.config import bind
from llmjax.interop import mapping
from llmjax.interop.decoder import ARCHITECTURES
from llmjax.models import registry
from llmjax.models.decoder_config import DecoderConfig


def _gpt2(**other):
    config = transformers.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1, **other
    )
    return transformers.GPT2LMHeadModel(config)


def _llama(**other):
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        bos_token_id=0,
        eos_token_id=1,
        **other,
    )
    return transformers.LlamaForCausalLM(config)


MODELS = {"gpt2": _gpt2, "llama": _llama, "llama-tied": lambda: _llama(tie_word_embeddings=True)}


def moved(model):
    """Weights off their init, so that no bias is 0 and no scale is 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_logits(name):
    torch.manual_seed(0)
    model = moved(MODELS[name]())
    hf = model.config.to_dict()
    architecture = ARCHITECTURES[type(model).__name__]
    config = bind(DecoderConfig, architecture.read_config(hf), "model")
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    rules = architecture.rules(config)
    params = mapping.load(rules, state, config)
    back = mapping.dump(rules, params, config)
    assert set(back) == set(state)
    for key, value in state.items():
        np.testing.assert_array_equal(back[key].view(np.uint32), value.view(np.uint32), err_msg=key)
    tokens = np.random.default_rng(0).integers(0, 97, (2, 20)).astype(np.int32)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    ours_model = nnx.merge(registry.abstract(config)[0], params)
    batch = Batch(
        inputs=jnp.asarray(tokens),
        targets=jnp.asarray(tokens),
        weights=jnp.ones(tokens.shape),
        segments=jnp.ones(tokens.shape, jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(20), tokens.shape),
        sample=jnp.zeros((2, 2), jnp.uint32),
    )
    ours = jax.jit(lambda batch: ours_model.unembed(ours_model(batch).hidden))(batch)
    np.testing.assert_allclose(np.asarray(ours)[..., :97], theirs, atol=2e-4, rtol=0)
