"""The choice of an attention kernel, its refusals, and the mask of cuDNN's."""

import dataclasses

import jax
import numpy as np
import pytest

from llmjax.errors import UserError
from llmjax.models.decoder_config import DecoderConfig
from llmjax.models.encdec import EncDecConfig
from llmjax.models.encoder import EncoderConfig
from llmjax.models.moe import MoeConfig
from llmjax.nn.kernels import FEATURES, KERNELS, resolve_attention
from tests.nn.test_blockwise import ROWS, draw, value_and_grads

GEMMA = {"window": 8, "attention_pattern": "lg", "score_softcap": 50.0}
MODELS = {
    "llama": DecoderConfig(dtype="bfloat16"),
    "float32": DecoderConfig(),
    "gemma": DecoderConfig(dtype="bfloat16", **GEMMA),
    "gpt_oss": DecoderConfig(dtype="bfloat16", attention_sinks=True),
    "mistral": DecoderConfig(dtype="bfloat16", window=8, score_scale=0.1),
    "wide": DecoderConfig(dtype="bfloat16", head_dim=256),
    "deepseek": MoeConfig(dtype="bfloat16", latent=16, value_dim=8),
    "bert": EncoderConfig(dtype="bfloat16"),
    "t5": EncDecConfig(dtype="bfloat16"),
}


@pytest.mark.parametrize(
    ("model", "tpu", "gpu", "gpu_long"),
    [
        ("llama", "splash", "cudnn", "blockwise"),
        ("float32", "splash", "dot", "blockwise"),
        ("gemma", "splash", "dot", "blockwise"),
        ("gpt_oss", "splash", "dot", "blockwise"),
        ("mistral", "splash", "cudnn", "blockwise"),
        ("wide", "splash", "dot", "blockwise"),
        ("deepseek", "splash", "dot", "blockwise"),
        ("bert", "splash", "cudnn", "blockwise"),
        ("t5", "blockwise", "dot", "blockwise"),
    ],
)
def test_auto(model, tpu, gpu, gpu_long):
    choose = lambda platform, seq: resolve_attention("auto", MODELS[model].attention_needs, platform, seq).kernel
    assert (choose("tpu", 512), choose("tpu", 8192)) == (tpu, tpu)
    assert (choose("gpu", 1024), choose("gpu", 8192)) == (gpu, gpu_long)
    assert (choose("cpu", 2047), choose("cpu", 2048)) == ("dot", "blockwise")


def test_auto_says_why():
    choose = lambda model, *where: str(resolve_attention("auto", MODELS[model].attention_needs, *where))
    assert choose("llama", "tpu", 8192) == "splash (tpu)"
    assert choose("t5", "tpu", 512) == (
        "blockwise (tpu; splash does not support a bias on the scores (model.family='encdec'))"
    )
    assert choose("gemma", "gpu", 512) == (
        "dot (gpu; cudnn does not support a soft-cap of the scores (model.score_softcap=50.0); rows of 512 tokens)"
    )
    assert str(DecoderConfig().choose_attention(64)) == "dot (cpu; rows of 64 tokens)"


@pytest.mark.parametrize(
    ("name", "needs", "platform", "seq", "words"),
    [
        ("splash", {}, "cpu", 512, "model.attention='splash': splash runs on tpu, not on cpu; set it to 'auto'"),
        ("splash", {"prefix": "objective.name='prefix'"}, "tpu", 512, "splash.*prefixes.*objective.name='prefix'"),
        ("cudnn", {}, "gpu", 8192, "cudnn takes rows of at most 4096 tokens .data.seq_len=8192.; set it to 'auto'"),
        ("cudnn", {"softcap": "model.score_softcap=5.0"}, "gpu", 512, "a soft-cap.*model.score_softcap=5.0"),
    ],
)
def test_a_named_kernel_is_refused_where_it_cannot_run(name, needs, platform, seq, words):
    with pytest.raises(UserError, match=words):
        resolve_attention(name, needs, platform, seq)
    assert resolve_attention("blockwise", needs, platform, seq).kernel == "blockwise"


@pytest.mark.parametrize(
    ("config", "fields", "words"),
    [
        ("t5", {"attention": "splash"}, "splash does not support a bias .*model.family='encdec'"),
        ("gpt_oss", {"attention": "cudnn"}, "cudnn does not support attention sinks .model.attention_sinks=True"),
        ("float32", {"attention": "cudnn"}, "float32 .model.dtype='float32'.; set it to 'auto' or 'blockwise'"),
        ("deepseek", {"attention": "cudnn"}, "values of another width.*model.latent=16"),
        ("llama", {"attention_block": 100}, "model.attention_block=100: must be a multiple of 128"),
    ],
)
def test_a_config_names_what_its_kernel_lacks(config, fields, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(MODELS[config], **fields)


@pytest.mark.parametrize("rule", [{"causal": True, "window": 20}, {"causal": False}])
def test_cudnn_mask(rule, monkeypatch):
    """Its mask through XLA's form of the same function of JAX, since cuDNN needs a GPU."""
    xla = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **k: xla(*a, **{**k, "implementation": "xla"}))
    segments, positions = ROWS
    inputs = {name: draw(4, 113, heads, 8, seed=heads) for name, heads in (("q", 4), ("k", 2), ("v", 2))}

    def run(name):
        mask = KERNELS[name].make_mask(segments, positions, **rule)
        return value_and_grads(lambda inputs: mask.attend(**inputs, scale=0.9), inputs, segments > 0)

    for actual, expected in zip(*(jax.tree.leaves(run(name)) for name in ("cudnn", "dot")), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)  # float32 sums of 113 terms in another order


def test_all_kernels_keep_the_needs_of_a_config():
    assert set().union(*(model.attention_needs for model in MODELS.values())) | {"prefix", "sequence"} == set(FEATURES)
