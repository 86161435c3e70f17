"""Continue prompts: prefill the KV cache once, then sample token by token."""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from llmjax.errors import UserError
from llmjax.nn.embedding import MASKED

# Prompts are padded to a multiple of this many tokens, so that few lengths are compiled.
_BUCKET = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from logits.

    temperature   logits are divided by it, from 1e-6 to 1e6; 0: always the most likely token
    top_k         only the k most likely tokens; 0: all
    top_p         only the fewest most likely tokens whose probabilities, after temperature and top_k, reach p
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        # Beyond these, float32 knows no difference between tokens, or between one and those that are left out.
        if self.temperature and not 1e-6 <= self.temperature <= 1e6:
            raise UserError(f"temperature={self.temperature}: must be 0 (the most likely token), or from 1e-6 to 1e6")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k}: must be at least 0 (0: all tokens)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: must be above 0 and at most 1")


def draw(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """One token id for each row of float32 logits [batch, vocab] and keys [batch]; int32 [batch].

    Among equal logits the lowest id comes first, so top_k=k leaves exactly k.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Relative to the highest logit, so that no temperature overflows.
    scores = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    if sampling.top_k == 0 and sampling.top_p == 1:
        return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)
    k = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    scores, ids = jax.lax.top_k(scores, k)
    probabilities = jax.nn.softmax(scores, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The first token stays even where rounding lets nothing else in.
    inside = (before < sampling.top_p) | (jnp.arange(k) == 0)
    choice = jax.vmap(jax.random.categorical)(keys, jnp.where(inside, scores, MASKED))
    return jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)


def generate(
    graph: Any,
    params: dict,
    config: Any,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int],
) -> list[list[int]]:
    """New token ids for each prompt: up to one of `stop_ids`, which is not returned, or `max_tokens` of them.

    `nnx.merge(graph, params)` is the model of `config`; a prompt starts with the id that starts documents. Draws are
    keyed by (seed, row, position), so a row's tokens do not depend on the other rows. UserError for settings out of
    range, for a family that continues no text, and where a prompt is empty, holds an id that the model lacks, or is
    too long for learned positions.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    check(config, prompts, max_tokens)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), -(-int(lengths.max()) // _BUCKET) * _BUCKET), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    model = nnx.merge(graph, params)
    logits, cache, first = _prefill(model, tokens, lengths, max_tokens=max_tokens)
    root = jax.random.key(seed)
    found = _decode(
        model, logits, cache, first, root, max_tokens=max_tokens, sampling=sampling, stop_ids=tuple(stop_ids)
    )
    new, counts = jax.device_get(found)
    return [row[:count].tolist() for row, count in zip(new, counts, strict=True)]


@functools.partial(jax.jit, static_argnames="max_tokens")
def _prefill(model, tokens: jax.Array, lengths: jax.Array, *, max_tokens: int):
    """Logits [batch, vocab] after each prompt, the cache, and the position [batch] of the token to draw."""
    hidden, cache, positions = model.prefill(tokens, lengths, max_tokens)
    return model.unembed(hidden), cache, positions


@functools.partial(jax.jit, static_argnames=("max_tokens", "sampling", "stop_ids"))
def _decode(model, logits, cache, first, root, *, max_tokens: int, sampling: Sampling, stop_ids: tuple[int, ...]):
    """New tokens [batch, max_tokens] and how many of them count in each row."""
    batch, ends = logits.shape[0], jnp.array(stop_ids, jnp.int32)
    rows = jax.vmap(lambda row: jax.random.fold_in(root, row))(jnp.arange(batch))

    def unfinished(state):
        i, _, _, _, _, done = state
        return (i < max_tokens) & ~jnp.all(done)

    def step(state):
        i, logits, cache, new, counts, done = state
        positions = first + i
        token = draw(logits, jax.vmap(jax.random.fold_in)(rows, positions), sampling)
        done |= jnp.isin(token, ends)
        new = new.at[:, i].set(token)
        hidden, cache = model.cached(token[:, None], positions[:, None], cache)
        return i + 1, model.unembed(hidden[:, 0]), cache, new, counts + ~done, done

    new = jnp.zeros((batch, max_tokens), jnp.int32)
    start = (0, logits, cache, new, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool))
    _, _, _, new, counts, _ = jax.lax.while_loop(unfinished, step, start)
    return new, counts


def check(config: Any, prompts: Sequence[Sequence[int] | np.ndarray], max_tokens: int) -> None:
    """Raise UserError for what `generate` cannot continue with the model of `config`."""
    if not config.generates:
        raise UserError(f"model.family={config.family!r} fills gaps and continues no text: take a family that does")
    if max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens}: must be at least 1")
    if not prompts:
        raise UserError("no prompt given")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {number} has no tokens; start it with the tokenizer's BOS or EOS")
        if (low := min(prompt)) < 0 or (high := max(prompt)) >= config.vocab_size:
            raise UserError(
                f"prompt {number} holds token id {low if low < 0 else high}; "
                f"the model knows 0 to {config.vocab_size - 1}"
            )
        # The last token drawn is never read, so it needs no position.
        needed = len(prompt) + max_tokens - 1
        if config.max_seq_len is not None and needed > config.max_seq_len:
            raise UserError(
                f"max_tokens={max_tokens}: prompt {number} has {len(prompt)} tokens and the model only "
                f"{config.max_seq_len} learned positions; at most {config.max_seq_len - len(prompt) + 1} new tokens fit"
            )
