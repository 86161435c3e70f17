"""Continue prompts: prefill the KV cache once, then sample token by token."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from llmjax.batch import Graph, Params
from llmjax.data.chat_template import ChatTemplate
from llmjax.data.objectives.objective import Objective
from llmjax.data.objectives.prompts import decode_continuation, encode_prompt
from llmjax.data.readers.dialogues import Message
from llmjax.data.store.chat import find_end_of_turn
from llmjax.data.store.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.inference.beams import BeamSearch, search
from llmjax.inference.sampling import Sampling, cut_at_stop, draw, make_row_keys, penalize
from llmjax.models.registry import ModelConfig
from llmjax.parallel import axes
from llmjax.parallel.memory import device_memory
from llmjax.run.config import SampleConfig
from llmjax.run.loading import Loaded

# Prompts are padded to a multiple of this many tokens, so that few lengths are compiled.
_BUCKET = 32
# Between two looks at the text for stop strings, so many tokens are drawn.
_TOKENS_PER_LOOK = 16

Tokens = Sequence[int] | np.ndarray
Method = Sampling | BeamSearch  # how the continuations of a prompt are found


def complete(loaded: Loaded, prompts: Sequence[str], method: Method, *, samples: int = 1) -> list[str]:
    """`samples` continuations of each prompt, one after another, up to the end of the document, a stop string or
    `method.max_tokens`.

    The model reads prompts as its objective presents them: after BOS, or as a source with a gap at its end; those of an
    imported model as its tokenizer frames them. Runs on the mesh of `use_mesh`.
    Raises UserError for a prompt with special tokens that the tokenizer does not know, where a prompt and its
    continuation exceed a model's learned positions or the memory, and for a beam search by another model than an
    encoder-decoder.
    """
    return continue_prompts(loaded, _encode(prompts, loaded.tokenizer, loaded.objective), method, samples=samples)


def answer(
    loaded: Loaded,
    dialogues: Sequence[Sequence[Message]],
    template: ChatTemplate,
    method: Method,
    *,
    samples: int = 1,
) -> list[str]:
    """The assistant's next turn of each dialogue, without the token that ends it. Raises UserError as `complete` does.

    The dialogue's token ids are those of the template: nothing is put before or after them.
    """
    tokens = encode_dialogues(loaded, dialogues, template)
    return continue_prompts(loaded, tokens, method, samples=samples, template=template)


def encode_prompts(loaded: Loaded, prompts: Sequence[str]) -> list[np.ndarray]:
    """Prompts as the model reads them. Raises UserError as `complete` does."""
    return _encode(prompts, loaded.tokenizer, loaded.objective)


def encode_dialogues(
    loaded: Loaded, dialogues: Sequence[Sequence[Message]], template: ChatTemplate
) -> list[np.ndarray]:
    """Dialogues as the model reads them, up to the assistant's turn. Raises UserError for an encoder-decoder."""
    if loaded.config.model.reads_source:
        raise UserError(
            f"--chat: model.family={loaded.config.model.family!r} answers prompts without a chat template; use "
            "--prompt_form=plain"
        )
    return [template.encode(messages, loaded.tokenizer) for messages in dialogues]


def find_stop_ids(tokenizer: Tokenizer, template: ChatTemplate | None) -> tuple[int, ...]:
    """The ids that end a text, or with a template the assistant's turn.

    A template that a base model was trained with may end turns with a token that does not end its documents.
    """
    end_of_turn = () if template is None else find_end_of_turn(template, tokenizer)
    return tuple(dict.fromkeys([*tokenizer.stop_ids, *end_of_turn]))


def continue_prompts(
    loaded: Loaded,
    prompts: Sequence[Tokens],
    method: Method,
    *,
    samples: int = 1,
    numbers: Sequence[int] | None = None,
    shape: tuple[int, int] | None = None,
    template: ChatTemplate | None = None,
) -> list[str]:
    """The texts of `complete` for encoded prompts.

    numbers   that key the draws of each prompt; None: 0, 1, 2, ...
    shape     (prompts, tokens of the longest) of the batch that is computed; None: those of these prompts
    template  that wrote the prompts; None: they are plain text
    """
    tokenizer, model = loaded.tokenizer, loaded.config.model
    stop_ids = find_stop_ids(tokenizer, template)

    def decode(prompt: Tokens, ids: Sequence[int]) -> str:
        return tokenizer.decode(ids) if loaded.objective.answers else decode_continuation(tokenizer, prompt, ids)

    try:
        if isinstance(method, BeamSearch):
            check_prompts(model, prompts, method)
            tokens, lengths = _pad(prompts, shape)
            found = search(loaded.graph, loaded.params, model, tokens, lengths, method, stop_ids)
            pairs = zip(prompts, found, strict=False)
            return [decode(prompt, ids) for prompt, best in pairs for ids, _ in best[:samples]]
        rows = [(number, sample) for number in numbers or range(len(prompts)) for sample in range(samples)]
        repeated = [prompt for prompt in prompts for _ in range(samples)]
        has_stop = lambda row, ids: any(stop in decode(repeated[row], ids) for stop in method.stop)
        new = generate(
            loaded.graph,
            loaded.params,
            model,
            repeated,
            method,
            stop_ids=stop_ids,
            rows=rows,
            shape=None if shape is None else (shape[0] * samples, shape[1]),
            has_stop=has_stop if method.stop else None,
        )
    except jax.errors.JaxRuntimeError as error:
        if not any(sign in str(error) for sign in ("Out of memory", "RESOURCE_EXHAUSTED")):
            raise
        raise UserError(
            f"max_tokens={method.max_tokens}: out of memory with {len(prompts)} prompt(s) of up to "
            f"{max(map(len, prompts))} tokens; lower it, or give fewer prompts at a time"
        ) from error
    pairs = zip(repeated, new, strict=True)
    return [cut_at_stop(decode(prompt, ids), method.stop) for prompt, ids in pairs]


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
        check_prompts(model, _encode(sample.prompts, tokenizer, objective), sampling_from_config(sample))
    except UserError as error:
        raise UserError(f"the samples after training: {error}; `llmjax fields sample` lists what to set") from None


def _encode(prompts: Sequence[str], tokenizer: Tokenizer, objective: Objective) -> list[np.ndarray]:
    return [objective.prompt(encode_prompt(tokenizer, prompt)) for prompt in prompts]


def generate(
    graph: Graph,
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Tokens],
    sampling: Sampling,
    *,
    stop_ids: Sequence[int],
    rows: Sequence[tuple[int, int]] | None = None,
    shape: tuple[int, int] | None = None,
    has_stop: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """New token ids for each prompt: up to one of `stop_ids`, which is not returned, or `sampling.max_tokens` of them.

    A prompt starts with the id that starts documents. Draws are keyed by (seed, row, position), so a row's tokens do
    not depend on the other rows. Raises UserError for a family that does not generate text, and where a prompt is
    empty, contains an id that the model does not have, or is too long for learned positions.

    rows      (index of the prompt, number of its sample) of each prompt, which key its draws; None: (0, 0), (1, 0), ...
    shape     (rows, tokens of the longest prompt) of the batch that is computed; None: the smallest
    has_stop  (row, new ids) -> whether they contain what ends a text besides `stop_ids`; the ids may go beyond it
    """
    check_prompts(config, prompts, sampling)
    tokens, lengths = _pad(prompts, shape)
    keys = np.zeros((len(tokens), 2), np.uint32)
    keys[: len(prompts)] = rows or [(row, 0) for row in range(len(prompts))]
    model = nnx.merge(graph, params)
    _check_memory(model, tokens, lengths, sampling.max_tokens)
    logits, cache, first = _prefill(model, tokens, lengths, max_tokens=sampling.max_tokens)
    decode = functools.partial(
        _decode,
        # Static arguments: neither another seed nor another stop string must compile again.
        sampling=dataclasses.replace(sampling, seed=0, stop=()),
        stop_ids=tuple(stop_ids),
    )
    state = _State(
        step=np.int32(0),
        logits=logits,
        cache=cache,
        new=np.zeros((len(tokens), sampling.max_tokens), np.int32),
        counts=np.zeros(len(tokens), np.int32),
        stopped=np.arange(len(tokens)) >= len(prompts),
        seen=None if sampling.repetition_penalty == 1 else find_seen(config, prompts, logits.shape),
    )
    look = sampling.max_tokens if has_stop is None else _TOKENS_PER_LOOK
    row_keys, until = make_row_keys(sampling.seed, keys), 0
    while True:
        until = min(until + look, sampling.max_tokens)
        state = decode(model, state, first, row_keys, until)
        new, counts, stopped = jax.device_get((state.new, state.counts, state.stopped))
        found = [row[:count].tolist() for row, count in zip(new, counts[: len(prompts)], strict=False)]
        if until == sampling.max_tokens:
            return found
        if has_stop is not None:
            ends = [not stopped[row] and has_stop(row, ids) for row, ids in enumerate(found)]
            stopped = stopped | np.pad(ends, (0, len(stopped) - len(ends)))
            state = state._replace(stopped=stopped)
        if stopped.all():
            return found


class _State(NamedTuple):
    """The state of decoding a batch.

    step      tokens that each row has drawn
    logits    float32 [batch, vocab] of the next token
    cache     of the model
    new       int32 [batch, max_tokens]: the tokens
    counts    int32 [batch]: tokens before the stop id
    stopped   bool [batch]
    seen      bool [batch, vocab]: tokens that the text of a row contains; None where no penalty needs it
    """

    step: Any
    logits: jax.Array
    cache: Any
    new: Any
    counts: Any
    stopped: Any
    seen: Any


def _pad(prompts: Sequence[Tokens], shape: tuple[int, int] | None) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32 [rows, length], lengths int32 [rows]); rows without a prompt have one padding token."""
    longest = max(map(len, prompts))
    count, length = shape or (len(prompts), -(-longest // _BUCKET) * _BUCKET)
    tokens, lengths = np.zeros((count, length), np.int32), np.ones(count, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    return tokens, lengths


def find_seen(config: ModelConfig, prompts: Sequence[Tokens], shape: tuple[int, int]) -> np.ndarray:
    """Tokens that the text of a row contains before the first draw, bool of the shape [batch, vocab].

    They are the prompt's, or those that an encoder-decoder's decoder has read: its start token.
    """
    seen = np.zeros(shape, bool)
    for row, prompt in enumerate(prompts):
        seen[row, config.decoder_start_id if config.reads_source else prompt] = True
    return seen


def _check_memory(model: Any, tokens: np.ndarray, lengths: np.ndarray, max_tokens: int) -> None:
    """UserError where the cache exceeds a device's memory.

    The host's allocator may grant more than there is, and the kernel then kills the process when it is written.
    """
    _, cache, _ = _prefill.trace(model, tokens, lengths, max_tokens=max_tokens).out_info
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    if (memory := device_memory()) is not None and 2 * size > memory:  # decoding reads one cache and writes another
        raise UserError(
            f"max_tokens={max_tokens}: out of memory with {len(tokens)} text(s): two caches of {size / 2**30:.3g} GiB, "
            f"and a device has {memory / 2**30:.3g}; lower it, or give fewer prompts at a time"
        )


@functools.partial(jax.jit, static_argnames="max_tokens")
def _prefill(model, tokens: jax.Array, lengths: jax.Array, *, max_tokens: int):
    """Logits [batch, vocab] after each prompt, the cache, and the position [batch] of the token to draw."""
    hidden, cache, positions = model.prefill(tokens, lengths, max_tokens)
    return model.unembed(hidden), cache, positions


@functools.partial(jax.jit, static_argnames=("sampling", "stop_ids"))
def _decode(
    model, state: _State, first: jax.Array, row_keys: jax.Array, until: int, *, sampling: Sampling,
    stop_ids: tuple[int, ...],
) -> _State:  # fmt: skip
    """The state after `until` tokens, or when all rows have stopped; `first` [batch] is the first token's position."""
    stops = jnp.array(stop_ids, jnp.int32)

    def is_unfinished(state: _State):
        return (state.step < until) & ~jnp.all(state.stopped)

    def step(state: _State):
        positions, logits, seen = first + state.step, state.logits, state.seen
        if seen is not None:
            logits = penalize(logits, seen, sampling.repetition_penalty)
        token = draw(logits, jax.vmap(jax.random.fold_in)(row_keys, positions), sampling)
        stopped = state.stopped | jnp.isin(token, stops)
        hidden, cache = model.cached(token[:, None], positions[:, None], state.cache)
        return _State(
            step=state.step + 1,
            logits=model.unembed(hidden[:, 0]),
            cache=cache,
            new=state.new.at[:, state.step].set(token),
            counts=state.counts + ~stopped,
            stopped=stopped,
            seen=None if seen is None else seen.at[jnp.arange(len(token)), token].set(True),
        )

    state = jax.lax.while_loop(is_unfinished, step, state)
    # Each process of a job reads them whole.
    return state._replace(
        new=axes.constrain(state.new, None, None),
        counts=axes.constrain(state.counts, None),
        stopped=axes.constrain(state.stopped, None),
    )


def check_model(config: ModelConfig, method: Method) -> None:
    """Raise UserError for a model that does not continue text, or not by this method."""
    if config.num_outputs:
        raise UserError("the model has a head for labels, so it does not generate text: use `llmjax predict`")
    if not config.generates:
        raise UserError(f"model.family={config.family!r} does not generate text: use `llmjax fill`, or another model")
    if isinstance(method, BeamSearch):
        method.check_model(config)


def check_prompts(config: ModelConfig, prompts: Sequence[Tokens], method: Method) -> None:
    """Raise UserError for a model that `check_model` refuses, and for a prompt that it cannot continue."""
    check_model(config, method)
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
        if config.max_seq_len is not None and len(prompt) + method.max_tokens - 1 > config.max_seq_len:
            raise UserError(
                f"max_tokens={method.max_tokens}: prompt {number} has {len(prompt)} tokens and the model only "
                f"{config.max_seq_len} learned positions; at most {config.max_seq_len - len(prompt) + 1} new tokens fit"
            )
