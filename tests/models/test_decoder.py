"""The decoder against a plain numpy implementation, setting by setting."""

import dataclasses

import jax
import numpy as np
import pytest

from llmjax.models import registry
from llmjax.models.decoder import Decoder
from tests.batches import packed
from tests.models import decoder_oracle
from tests.models.programs import assert_close, init_model, logits
from tests.models.variants import DECODERS, GEMMA, GPT2, GPT_OSS_DENSE, LLAMA, OLMO, QWEN3, VOCAB


@pytest.mark.parametrize("name", DECODERS)
def test_equals_the_numpy_oracle(name):
    config = DECODERS[name]
    graph, params = init_model(config)
    row = packed(1, 24, VOCAB)
    actual, expected = np.asarray(logits(graph, params, row))[0], decoder_oracle.logits(config, params, row)
    assert actual.dtype == np.float32
    # float32 against float64 over two layers: some 1e-6 of the largest logit
    np.testing.assert_allclose(actual[:, :VOCAB], expected[:, :VOCAB], atol=1e-5 * np.abs(expected).max())
    assert (actual[:, VOCAB:] == np.float32(-1e30)).all()


OFF = {
    "window": (GEMMA, dict(window=0, rope_local_base=0.0)),
    "pattern": (GEMMA, dict(attention_pattern="gl")),
    "local base": (GEMMA, dict(rope_local_base=0.0)),
    "local base, unscaled": (OLMO, dict(rope_local_base=0.0)),
    "score softcap": (GEMMA, dict(score_softcap=0.0)),
    "logit softcap": (GEMMA, dict(logit_softcap=0.0)),
    "score scale": (GEMMA, dict(score_scale=0.0)),
    "embed multiplier": (GEMMA, dict(embed_multiplier=1.0)),
    "linear": (GEMMA, dict(rope_factor=1.0)),
    "llama3": (QWEN3, dict(rope_factor=1.0)),
    "yarn": (GPT_OSS_DENSE, dict(rope_factor=1.0)),
    "truncation": (GPT_OSS_DENSE, dict(rope_truncate=True)),
    "attention factor": (GPT_OSS_DENSE, dict(rope_attention_factor=0.0)),
}


@pytest.mark.parametrize("name", OFF)
def test_every_setting_without_parameters_changes_logits(name):
    """The oracle's agreement says nothing of a setting that does not bite at these sizes."""
    config, off = OFF[name]
    graph, params = init_model(config)
    row = packed(1, 24, VOCAB)
    without = registry.abstract(dataclasses.replace(config, **off))[0]
    difference = np.abs(logits(graph, params, row) - logits(without, params, row))[..., :VOCAB].max()
    assert difference > 1e-3


def test_axes_of_parameters():
    names = registry.abstract(GPT2)[2]
    assert names["blocks"]["attention"]["query"]["weight"] == ("layers", "embed", "heads", "head_dim")
    assert names["blocks"]["attention"]["key"]["bias"] == ("layers", "kv_heads", "head_dim")
    assert names["blocks"]["attention"]["out"]["weight"] == ("layers", "heads", "head_dim", "embed")
    assert names["blocks"]["mlp"]["down"]["weight"] == ("layers", "mlp", "embed")
    assert names["blocks"]["mlp_norm"]["scale"] == ("layers", "embed")
    assert names["embed"]["table"] == ("vocab", "embed")
    attention = registry.abstract(dataclasses.replace(OLMO, attention_sinks=True))[2]["blocks"]["attention"]
    assert attention["query_norm"]["scale"] == ("layers", "heads", "head_dim")
    assert attention["key_norm"]["scale"] == ("layers", "kv_heads", "head_dim")
    assert attention["sinks"] == ("layers", "heads")
    assert registry.abstract(LLAMA)[2]["head"] == ("embed", "vocab")


@pytest.mark.slow
def test_initial_parameters_are_equal_with_and_without_jit():
    eager, compiled = (
        registry.init(LLAMA, jax.random.key(3)),
        jax.jit(lambda k: registry.init(LLAMA, k))(jax.random.key(3)),
    )
    assert_close(eager, compiled, 1e-6)
    assert isinstance(registry.build(LLAMA, jax.random.key(3)), Decoder)
