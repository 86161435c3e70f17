"""What the comparisons with transformers share: noise in the reference's weights, padded rows, and our program."""

import functools

from flax import nnx
import jax
import numpy as np
import pytest

from llmjax.batch import Batch
from llmjax.inference.generate import generate
from llmjax.inference.sampling import Sampling
from llmjax.models import registry
from llmjax.nn import losses

torch = pytest.importorskip("torch", reason="parity needs `make parity`")

VOCAB, SEQ, LENGTHS = 97, 24, (24, 17, 9)


def add_noise(model, scale: float = 0.1, seed: int = 1):
    """The model for evaluation, with noise in every parameter so that no bias is 0 and no norm multiplies by 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if "correction" in name:  # the expert bias of DeepSeek-V3
                buffer += scale * torch.randn(buffer.shape, generator=generator)
    return model.eval()


def padded_rows() -> tuple[np.ndarray, Batch]:
    """(whether a position holds a token [batch, seq], rows of three lengths, padded on the right)"""
    tokens = np.random.default_rng(2).integers(1, VOCAB, (len(LENGTHS), SEQ)).astype(np.int32)
    is_token = np.arange(SEQ) < np.array(LENGTHS)[:, None]
    is_scored = is_token & np.roll(is_token, -1, axis=1) & (np.arange(SEQ) < SEQ - 1)
    return is_token, Batch(
        inputs=np.where(is_token, tokens, 0),
        targets=np.where(is_scored, np.roll(tokens, -1, axis=1), 0),
        weights=is_scored.astype(np.float32),
        segments=is_token.astype(np.int32),
        positions=np.where(is_token, np.arange(SEQ), 0).astype(np.int32),
        sample=np.zeros((len(LENGTHS), 2), np.uint32),
    )


def score_reference(model):
    """The reference's output on `padded_rows`, after the backward pass of its mean loss."""
    is_token, batch = padded_rows()
    model.zero_grad()
    output = model(
        input_ids=torch.tensor(batch.inputs, dtype=torch.long),
        attention_mask=torch.tensor(is_token, dtype=torch.long),
        labels=torch.tensor(np.where(is_token, batch.inputs, -100), dtype=torch.long),
    )
    output.loss.backward()
    return output


@functools.partial(jax.jit, static_argnums=0)
def loss_logits_and_grads(graph, params, batch):
    """((mean loss, logits), gradients)"""

    def score(params):
        model = nnx.merge(graph, params)
        hidden = model(batch).hidden
        sums = losses.cross_entropy(hidden, model.unembed, batch.targets, batch.weights, chunk=0, z_loss=0.0)
        return sums.nats / sums.weight, model.unembed(hidden)

    return jax.value_and_grad(score, has_aux=True)(params)


def assert_same_greedy_text(model, config, params) -> None:
    """Two prompts of unequal length, token by token from our cache, against the reference's own generation."""
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2]]
    sampling = Sampling(max_tokens=12, temperature=0)
    actual = generate(registry.abstract(config)[0], params, config, prompts, sampling, stop_ids=[VOCAB + 1])
    for prompt, tokens in zip(prompts, actual, strict=True):
        output = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert tokens == output[0, len(prompt) :].tolist()
