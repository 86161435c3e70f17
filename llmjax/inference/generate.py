"""Continue prompts: prefill the KV cache once, then sample token by token."""

from collections.abc import Sequence
import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from llmjax.batch import Graph, Params
from llmjax.data.objectives.objective import Objective
from llmjax.data.objectives.prompts import decode_continuation, encode_prompt
from llmjax.data.store.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.models.registry import ModelConfig
from llmjax.nn.embedding import MASKED
from llmjax.run.config import SampleConfig
from llmjax.run.loading import Loaded

# Prompts are padded to a multiple of this many tokens, so that few lengths are compiled.
_BUCKET = 32

Tokens = Sequence[int] | np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How continuations are sampled.

    max_tokens    new tokens of a continuation at most
    temperature   logits are divided by it, from 1e-6 to 1e6; 0: always the most likely token
    top_k         only the k most likely tokens; 0: all
    top_p         only the fewest most likely tokens whose probabilities, after temperature and top_k, reach p
    seed          keys the draws, together with a prompt's index and the position
    """

    max_tokens: int = 100
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens}: must be at least 1")
        # Beyond these limits, float32 cannot tell one token's score from another's, or from that of an excluded token.
        if self.temperature and not 1e-6 <= self.temperature <= 1e6:
            raise UserError(f"temperature={self.temperature}: must be 0 (the most likely token), or from 1e-6 to 1e6")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k}: must be at least 0 (0: all tokens)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: must be above 0 and at most 1")


def complete(loaded: Loaded, prompts: Sequence[str], sampling: Sampling) -> list[str]:
    """A continuation of each prompt, up to the end of the document or `sampling.max_tokens`.

    The model reads prompts as its objective presents them: after BOS, or as a source with a gap at its end; those of an
    imported model as its tokenizer frames them. Runs on the mesh of `use_mesh`.
    Raises UserError for a prompt with special tokens that the tokenizer does not know, and where a prompt and its
    continuation exceed a model's learned positions or the memory.
    """
    tokenizer, objective = loaded.tokenizer, loaded.objective
    tokens = _encode(prompts, tokenizer, objective)
    try:
        continuations = generate(
            loaded.graph, loaded.params, loaded.config.model, tokens, sampling, stop_ids=tokenizer.stop_ids
        )
    except jax.errors.JaxRuntimeError as error:
        if not any(sign in str(error) for sign in ("Out of memory", "RESOURCE_EXHAUSTED")):
            raise
        raise UserError(
            f"max_tokens={sampling.max_tokens}: out of memory with {len(tokens)} prompt(s) of up to "
            f"{max(map(len, tokens))} tokens; lower it, or give fewer prompts at a time"
        ) from error
    if objective.answers:
        return [tokenizer.decode(ids) for ids in continuations]
    pairs = zip(tokens, continuations, strict=True)
    return [decode_continuation(tokenizer, prompt, new) for prompt, new in pairs]


def sampling_from_config(config: SampleConfig, seed: int = 0) -> Sampling:
    """How the samples after training are drawn. Raises UserError for a value out of range."""
    return Sampling(max_tokens=config.max_tokens, temperature=config.temperature, top_p=config.top_p, seed=seed)


def check_samples(sample: SampleConfig, model: ModelConfig, tokenizer: Tokenizer, objective: Objective) -> None:
    """Raise UserError, before anything is trained, for samples that could not be drawn at the end of training."""
    if not (sample.prompts and model.generates):
        return
    for prompt in sample.prompts:
        if not isinstance(prompt, str):
            raise UserError(f"sample.prompts: {prompt!r} is not a string; give strings, such as ('Once', 'Call me')")
    try:
        sampling_from_config(sample)
        _check(model, _encode(sample.prompts, tokenizer, objective), sample.max_tokens)
    except UserError as error:
        raise UserError(f"the samples after training: {error}; `llmjax fields sample` lists what to set") from None


def _encode(prompts: Sequence[str], tokenizer: Tokenizer, objective: Objective) -> list[np.ndarray]:
    return [objective.prompt(encode_prompt(tokenizer, prompt)) for prompt in prompts]


def draw(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """One token id for each row of float32 logits [batch, vocab] and keys [batch]; int32 [batch].

    Among equal logits the lowest id comes first, so top_k=k leaves exactly k tokens to draw from.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Scores are relative to the highest logit, so that no temperature overflows.
    scores = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    if sampling.top_k == 0 and sampling.top_p == 1:
        return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)
    k = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    scores, ids = jax.lax.top_k(scores, k)
    probabilities = jax.nn.softmax(scores, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The first token is allowed even where rounding excludes it.
    allowed = (before < sampling.top_p) | (jnp.arange(k) == 0)
    index = jax.vmap(jax.random.categorical)(keys, jnp.where(allowed, scores, MASKED))
    return jnp.take_along_axis(ids, index[:, None], axis=-1)[:, 0].astype(jnp.int32)


def generate(
    graph: Graph,
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Tokens],
    sampling: Sampling,
    *,
    stop_ids: Sequence[int],
) -> list[list[int]]:
    """New token ids for each prompt: up to one of `stop_ids`, which is not returned, or `sampling.max_tokens` of them.

    A prompt starts with the id that starts documents. Draws are keyed by (seed, row, position), so a row's tokens do
    not depend on the other rows. Raises UserError for a family that does not generate text, and where a prompt is
    empty, contains an id that the model does not have, or is too long for learned positions.
    """
    _check(config, prompts, sampling.max_tokens)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), -(-int(lengths.max()) // _BUCKET) * _BUCKET), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    model = nnx.merge(graph, params)
    logits, cache, first = _prefill(model, tokens, lengths, max_tokens=sampling.max_tokens)
    key = jax.random.key(sampling.seed)
    without_seed = dataclasses.replace(sampling, seed=0)  # a static argument: another seed must not compile again
    decoded = _decode(model, logits, cache, first, key, sampling=without_seed, stop_ids=tuple(stop_ids))
    new, counts = jax.device_get(decoded)
    return [row[:count].tolist() for row, count in zip(new, counts, strict=True)]


@functools.partial(jax.jit, static_argnames="max_tokens")
def _prefill(model, tokens: jax.Array, lengths: jax.Array, *, max_tokens: int):
    """Logits [batch, vocab] after each prompt, the cache, and the position [batch] of the token to draw."""
    hidden, cache, positions = model.prefill(tokens, lengths, max_tokens)
    return model.unembed(hidden), cache, positions


@functools.partial(jax.jit, static_argnames=("sampling", "stop_ids"))
def _decode(model, logits, cache, first, key, *, sampling: Sampling, stop_ids: tuple[int, ...]):
    """New tokens [batch, max_tokens], and the number of tokens of each row before its stop id, [batch]."""
    batch, max_tokens, stops = logits.shape[0], sampling.max_tokens, jnp.array(stop_ids, jnp.int32)
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))

    def is_unfinished(state):
        i, _, _, _, _, stopped = state
        return (i < max_tokens) & ~jnp.all(stopped)

    def step(state):
        i, logits, cache, new, counts, stopped = state
        positions = first + i
        token = draw(logits, jax.vmap(jax.random.fold_in)(row_keys, positions), sampling)
        stopped |= jnp.isin(token, stops)
        new = new.at[:, i].set(token)
        hidden, cache = model.cached(token[:, None], positions[:, None], cache)
        return i + 1, model.unembed(hidden[:, 0]), cache, new, counts + ~stopped, stopped

    new = jnp.zeros((batch, max_tokens), jnp.int32)
    start = (0, logits, cache, new, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool))
    _, _, _, new, counts, _ = jax.lax.while_loop(is_unfinished, step, start)
    return new, counts


def _check(config: ModelConfig, prompts: Sequence[Tokens], max_tokens: int) -> None:
    """Raise UserError for what `generate` cannot continue with the model of `config`."""
    if not config.generates:
        raise UserError(f"model.family={config.family!r} does not generate text: use `llmjax fill`, or another model")
    if not prompts:
        raise UserError("no prompt: give at least one")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {number} has no tokens; start it with the tokenizer's BOS or EOS")
        for token_id in (min(prompt), max(prompt)):
            if not 0 <= token_id < config.vocab_size:
                raise UserError(
                    f"prompt {number} contains token id {token_id}; the model has ids 0 to {config.vocab_size - 1}"
                )
        # The model never reads the last new token, so that one needs no position.
        if config.max_seq_len is not None and len(prompt) + max_tokens - 1 > config.max_seq_len:
            raise UserError(
                f"max_tokens={max_tokens}: prompt {number} has {len(prompt)} tokens and the model only "
                f"{config.max_seq_len} learned positions; at most {config.max_seq_len - len(prompt) + 1} new tokens fit"
            )
