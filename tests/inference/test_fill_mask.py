"""Predicted tokens have the probabilities of the model, texts are independent, and bad texts are refused."""

import dataclasses
import functools
import pathlib
import types
from typing import Any

from flax import nnx
import jax
import numpy as np
import pytest

from llmjax.batch import Batch
from llmjax.data.store.tokenizer import Bytes, SentencePiece
from llmjax.data.store.tokenizer_training import train_sentencepiece
from llmjax.errors import UserError
from llmjax.inference.fill_mask import fill
from llmjax.models import registry
from llmjax.models.decoder_config import DecoderConfig
from llmjax.models.encoder import EncoderConfig
from llmjax.parallel import axes

MASK = 259  # behind the bytes and their three special tokens
CONFIG = EncoderConfig(vocab_size=260, num_layers=2, embed=32, num_heads=4, max_positions=40)


@functools.cache
def parts(config):
    # Parameters far larger than at the start of training, so that probabilities differ clearly.
    params = jax.jit(lambda key: jax.tree.map(lambda p: p * 3, registry.init(config, key)))(jax.random.key(0))
    return registry.abstract(config)[0], params


def fill_texts(texts, count=3, tokenizer=None, config=CONFIG):
    graph, params = parts(config)
    auto = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), axis_types=auto, devices=jax.devices()[:1])
    with axes.use_mesh(mesh):
        return fill(loaded(graph, params, config, tokenizer or Bytes()), texts, count)


def loaded(graph, params, model, tokenizer) -> Any:
    config = types.SimpleNamespace(model=model)
    return types.SimpleNamespace(graph=graph, params=params, config=config, tokenizer=tokenizer)


def test_the_most_probable_tokens_are_those_of_the_model():
    predictions = fill_texts(["a[MASK]c[MASK]"])
    tokens = np.array([[256, ord("a"), MASK, ord("c"), MASK]], np.int32)
    ones = np.ones_like(tokens)
    positions = np.arange(5, dtype=np.int32)[None]
    batch = Batch(
        inputs=tokens,
        targets=tokens,
        weights=ones,
        segments=ones,
        positions=positions,
        sample=np.zeros((1, 2), np.uint32),
    )
    model = nnx.merge(*parts(CONFIG))
    probabilities = np.asarray(jax.nn.softmax(model.unembed(model(batch).hidden)))[0]
    for position, candidates in zip((2, 4), predictions[0], strict=True):
        best = np.argsort(-probabilities[position])[:3]
        names = ["<s>", "</s>", "<pad>", "[MASK]"]
        expected = [bytes([i]).decode(errors="replace") if i < 256 else names[i - 256] for i in best]
        assert [candidate.text for candidate in candidates] == expected
        predicted = [candidate.probability for candidate in candidates]
        np.testing.assert_allclose(predicted, probabilities[position][best], rtol=1e-4)


def test_a_text_does_not_depend_on_the_others():
    alone = fill_texts(["x = [MASK]"])[0]
    together = fill_texts(["a much longer text, [MASK] padded", "x = [MASK]"])[1]
    for a, b in zip(alone[0], together[0], strict=True):
        assert a.text == b.text and a.probability == pytest.approx(b.probability, rel=1e-4)


def test_the_space_before_a_mask_belongs_to_the_token():
    text = pathlib.Path(__file__).read_text()
    tokenizer = SentencePiece(train_sentencepiece([text], algorithm="bpe", vocab_size=400))
    config = dataclasses.replace(CONFIG, vocab_size=401)
    predict = lambda text: fill_texts([text], tokenizer=tokenizer, config=config)[0][0]
    assert predict("import [MASK] as np") == predict("import[MASK] as np")
    assert fill_texts(["a [MASK]"])[0] != fill_texts(["a[MASK]"])[0], "with bytes, the space is a token"


@pytest.mark.parametrize(
    ("text", "config", "words"),
    [
        ("no gap", CONFIG, r"text 'no gap' has no mask: write \[MASK\]"),
        ("[MASK] <|user|>", CONFIG, r"<\|user\|>"),
        ("x" * 50 + "[MASK]", CONFIG, "52 tokens, its start included, and the model only 40"),
        ("[MASK]", dataclasses.replace(CONFIG, vocab_size=259), r"vocab_size=259 has no id for \[MASK\]"),
        ("[MASK]", DecoderConfig(vocab_size=260), "model.family='decoder' does not predict masked tokens"),
    ],
)
def test_a_text_that_cannot_be_filled_is_refused(text, config, words):
    with pytest.raises(UserError, match=words):
        fill(loaded(None, {}, config, Bytes()), [text], 3)
