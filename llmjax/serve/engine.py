"""Continuous batching: requests share one compiled decode step, each in a slot of one KV cache."""

import collections
from collections.abc import Callable, Sequence
import dataclasses
import functools
import threading
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from llmjax.batch import Graph, Params
from llmjax.data.chat_template import ChatTemplate
from llmjax.errors import UserError
from llmjax.inference.generate import Tokens, find_stop_ids
from llmjax.inference.sampling import Sampling, allow
from llmjax.models.registry import ModelConfig
from llmjax.nn.embedding import MASKED
from llmjax.run.loading import Loaded

_SHORTEST = 32  # prompts are padded to this many tokens times a power of two, so that few lengths are compiled
_CONTEXT = 2048  # default; a cache of all positions that a published model has rarely fits into memory
_SUPPORTED = {"max_tokens", "temperature", "top_k", "top_p", "seed"}  # fields of Sampling


class QueueFullError(RuntimeError):
    """Every slot is taken, and as many requests wait as may."""


@dataclasses.dataclass(eq=False, kw_only=True)
class Request:
    """A prompt to continue.

    prompt     token ids
    row        keys the draws, as the index of a prompt does in `generate`
    on_token   called with each new token, without the stop id that ends the text
    on_end     called at the end with "stop" (a stop id) or "length" (sampling.max_tokens); not after `cancelled`
    cancelled  set by any thread to free the slot before the next step

    Both are called in the thread of the engine, and must not wait.
    """

    prompt: Tokens
    sampling: Sampling
    on_token: Callable[[int], None]
    on_end: Callable[[str], None]
    row: int = 0
    cancelled: threading.Event = dataclasses.field(default_factory=threading.Event)


@dataclasses.dataclass
class _Slots:
    """What the step reads of each slot: [slots], keys [slots, 2]. An empty slot computes, and nobody reads it.

    tokens               the last token of the text, which the step reads
    positions            its position
    keys                 the data of the key of the request's draws
    inverse_temperature  1 / temperature; 0: greedy
    """

    tokens: np.ndarray
    positions: np.ndarray
    keys: np.ndarray
    inverse_temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray


class Engine:
    """Continues prompts in `slots` rows of a cache with `context` positions each.

    `submit` may be called from any thread, `step` and `run` only from the one that has entered the mesh. Draws are
    keyed as in `generate`: the text of a request is the same whatever the other requests are, up to rounding.
    """

    def __init__(
        self,
        graph: Graph,
        params: Params,
        config: ModelConfig,
        *,
        slots: int,
        context: int,
        waiting: int,
        stop_ids: Sequence[int],
    ):
        """waiting: how many requests may wait for a slot. Raises UserError for a model that cannot be used."""
        _check_model(config, context)
        self.context, self.capacity, self._config, self._stop_ids = context, slots + waiting, config, set(stop_ids)
        self._model = nnx.merge(graph, params)
        try:
            self._cache = _make_cache(self._model, slots=slots, context=context)
            jax.block_until_ready(self._cache)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "Out of memory" not in str(error):
                raise
            raise UserError(
                f"slots={slots}, context={context}: out of memory for the cache of keys and values; lower one of them"
            ) from error
        self._slots = _Slots(
            tokens=np.zeros(slots, np.int32),
            positions=np.zeros(slots, np.int32),
            keys=np.zeros((slots, 2), np.uint32),
            inverse_temperature=np.zeros(slots, np.float32),
            top_k=np.zeros(slots, np.int32),
            top_p=np.ones(slots, np.float32),
        )
        self.num_slots = slots
        self._running: dict[int, Request] = {}  # slot -> request
        self._counts: dict[int, int] = {}  # slot -> number of new tokens
        self._waiting: collections.deque[Request] = collections.deque()
        self._changed = threading.Condition()
        self._is_closed = False

    def check(self, prompt: Tokens, sampling: Sampling) -> None:
        """Raise UserError for a request that cannot be served."""
        for field in dataclasses.fields(sampling):
            if field.name not in _SUPPORTED and getattr(sampling, field.name) != field.default:
                raise UserError(f"{field.name}={getattr(sampling, field.name)}: is not supported here; remove it")
        if not len(prompt):
            raise UserError("the prompt has no tokens; give a text")
        if max(prompt) >= self._config.vocab_size or min(prompt) < 0:
            raise UserError(f"the prompt has token ids that are not from 0 to {self._config.vocab_size - 1}")
        # The model never reads the last new token, so that one needs no position.
        if len(prompt) + sampling.max_tokens - 1 > self.context:
            raise UserError(
                f"max_tokens={sampling.max_tokens}: the prompt has {len(prompt)} tokens, and the context "
                f"{self.context}; at most {max(0, self.context - len(prompt) + 1)} new tokens fit"
            )

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue all of the requests, or none. Raises UserError as `check` does, and QueueFullError."""
        for request in requests:
            self.check(request.prompt, request.sampling)
        with self._changed:
            if len(self._running) + len(self._waiting) + len(requests) > self.capacity:
                raise QueueFullError(
                    f"{len(self._running)} requests are running and {len(self._waiting)} are waiting; try again later"
                )
            self._waiting.extend(requests)
            self._changed.notify()

    def close(self) -> None:
        """Let `run` return, from any thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def warm_up(self) -> None:
        """Compile the decode step and the shortest prefill, before the first request."""
        prompt, sampling = [0], Sampling(max_tokens=min(2, self.context), temperature=0)
        ignore = lambda _: None
        self.submit([Request(prompt=prompt, sampling=sampling, on_token=ignore, on_end=ignore)])
        while self.step():
            pass

    def run(self) -> None:
        """Serve requests until `close`."""
        while not self._is_closed:
            if not self.step():
                with self._changed:
                    self._changed.wait_for(lambda: self._waiting or self._is_closed)

    def step(self) -> bool:
        """Prefill at most one waiting request, and decode one token of each running one; whether any is left."""
        self._drop_cancelled()
        # One at a time, so that a long queue of prompts does not stall the texts that are being written.
        if (admitted := self._admit()) is not None:
            self._prefill(*admitted)
        if self._running:
            self._decode()
        return bool(self._running or self._waiting)

    def _drop_cancelled(self) -> None:
        for slot in [slot for slot, request in self._running.items() if request.cancelled.is_set()]:
            self._free(slot)
        with self._changed:
            kept = [request for request in self._waiting if not request.cancelled.is_set()]
            self._waiting = collections.deque(kept)

    def _admit(self) -> tuple[int, Request] | None:
        """(the first free slot, the request that has waited longest, which now runs in it); None without one."""
        with self._changed:
            free = next((slot for slot in range(self.num_slots) if slot not in self._running), None)
            if free is None or not self._waiting:
                return None
            request = self._waiting.popleft()
            self._running[free], self._counts[free] = request, 0
            return free, request

    def _prefill(self, slot: int, request: Request) -> None:
        """Read the prompt into the request's slot, and draw the first token."""
        slots, sampling, length = self._slots, request.sampling, len(request.prompt)
        padded = _SHORTEST
        while padded < length:
            padded *= 2
        tokens = np.zeros((1, min(padded, self.context)), np.int32)
        tokens[0, :length] = request.prompt
        slots.keys[slot] = jax.random.key_data(jax.random.fold_in(jax.random.key(sampling.seed), request.row))
        if sampling.temperature:  # the reciprocal, as the compiler divides by a constant
            slots.inverse_temperature[slot] = np.float32(1) / np.float32(sampling.temperature)
        slots.top_k[slot], slots.top_p[slot], slots.positions[slot] = sampling.top_k, sampling.top_p, length
        logits, self._cache = _prefill(self._model, tokens, np.array([length], np.int32), self._cache, np.int32(slot))
        drawing = {name: values[slot : slot + 1] for name, values in vars(slots).items() if name != "tokens"}
        self._take(slot, int(jax.device_get(_draw(logits, **drawing))[0]))

    def _decode(self) -> None:
        """One more token of each running request."""
        tokens, self._cache = _step(self._model, self._cache, **vars(self._slots))
        new = jax.device_get(tokens)  # before the arrays that the step may still read change
        for slot in list(self._running):
            self._slots.positions[slot] += 1
            self._take(slot, int(new[slot]))

    def _take(self, slot: int, token: int) -> None:
        """Hand a new token to the request of a slot, and free the slot if it is the last one."""
        request = self._running[slot]
        self._slots.tokens[slot] = token
        is_stop = token in self._stop_ids
        if not is_stop:
            self._counts[slot] += 1
            request.on_token(token)
        if is_stop or self._counts[slot] == request.sampling.max_tokens:
            self._free(slot)
            request.on_end("stop" if is_stop else "length")

    def _free(self, slot: int) -> None:
        """Empty a slot. It computes at position 0, which every model has, until a prompt overwrites its cache."""
        slots = self._slots
        slots.positions[slot], slots.inverse_temperature[slot] = 0, 0
        slots.top_k[slot], slots.top_p[slot] = 0, 1
        with self._changed:
            del self._running[slot], self._counts[slot]


def draw_rows(
    logits: jax.Array, keys: jax.Array, inverse_temperature: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
    """`sampling.draw` with settings for each row: float32 logits [batch, vocab], keys [batch], settings [batch].

    What no row needs is not computed. inverse_temperature is 1 / temperature, or 0 for the most likely token.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    is_filtered, rank = (top_k > 0) | (top_p < 1), jnp.arange(logits.shape[-1])
    draw = jax.vmap(jax.random.categorical)

    def sample() -> jax.Array:
        scores = (logits - jnp.max(logits, axis=-1, keepdims=True)) * inverse_temperature[:, None]
        free = lambda: draw(keys, scores).astype(jnp.int32)
        # Noise is by token without a filter and by rank with one, as in `sampling.draw`.
        return jax.lax.cond(jnp.any(is_filtered), lambda: jnp.where(is_filtered, filter_and_draw(scores), free()), free)

    def filter_and_draw(scores: jax.Array) -> jax.Array:
        scores, ids = jax.lax.top_k(scores, scores.shape[-1])
        is_inside = rank < jnp.where(top_k > 0, top_k, len(rank))[:, None]
        is_allowed = allow(jnp.where(is_inside, scores, -jnp.inf), top_p[:, None], 0.0) & is_inside
        index = draw(keys, jnp.where(is_allowed, scores, MASKED))
        return jnp.take_along_axis(ids, index[:, None], axis=-1)[:, 0].astype(jnp.int32)

    is_drawn = inverse_temperature > 0
    return jnp.where(is_drawn, jax.lax.cond(jnp.any(is_drawn), sample, lambda: greedy), greedy)


@functools.partial(jax.jit, static_argnames=("slots", "context"))
def _make_cache(model: Any, *, slots: int, context: int) -> Any:
    return model.cache(slots, context)


@functools.partial(jax.jit, donate_argnames="cache")
def _prefill(model: Any, tokens: jax.Array, lengths: jax.Array, cache: Any, slot: jax.Array) -> tuple[jax.Array, Any]:
    """(logits [1, vocab] after a prompt [1, seq], cache with its keys and values, or its state, in a slot)."""
    hidden, new, _ = model.prefill(tokens, lengths, 0)
    # Every leaf is [layers, slots, ...]. What is behind the prompt stays: a token is written before it is attended to.
    write = lambda old, rows: jax.lax.dynamic_update_slice_in_dim(old, rows.astype(old.dtype), slot, axis=1)
    return model.unembed(hidden), jax.tree.map(write, cache, new)


@functools.partial(jax.jit, donate_argnames="cache")
def _step(model: Any, cache: Any, *, tokens: jax.Array, positions: jax.Array, **drawing: jax.Array) -> tuple[Any, Any]:
    """(the token after `tokens` [slots], cache)"""
    hidden, cache = model.cached(tokens[:, None], positions[:, None], cache)
    return _draw(model.unembed(hidden[:, 0]), positions=positions + 1, **drawing), cache


@jax.jit
def _draw(logits: jax.Array, *, keys: jax.Array, positions: jax.Array, **settings: jax.Array) -> jax.Array:
    """A token for each row, by the data of its key [rows, 2] and the position of the token."""
    return draw_rows(logits, jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys), positions), **settings)


def make_engine(
    loaded: Loaded, *, slots: int, context: int | None, waiting: int, template: ChatTemplate | None
) -> Engine:
    """An engine for a checkpoint, inside its mesh. Raises UserError where it cannot be served.

    context   None: 2048 positions, or the model's learned positions if there are fewer
    template  that writes the prompts, whose end of turn ends a text; None: there is none
    """
    if jax.process_count() > 1:
        raise UserError(
            f"this is a job of {jax.process_count()} processes, and chat and serve run in one; start one alone, inside "
            "a Slurm step or on a TPU slice with LLMJAX_DISTRIBUTED=off"
        )
    model = loaded.config.model
    if context is None:
        context = min(_CONTEXT, model.max_seq_len or _CONTEXT)
    stop_ids = find_stop_ids(loaded.tokenizer, template)
    return Engine(loaded.graph, loaded.params, model, slots=slots, context=context, waiting=waiting, stop_ids=stop_ids)


def _check_model(config: ModelConfig, context: int) -> None:
    if config.num_outputs or not config.generates:
        raise UserError(f"model.family={config.family!r}: the model does not generate text; use one that does")
    if config.reads_source:
        raise UserError(
            f"model.family={config.family!r}: an encoder-decoder is not served; use `llmjax generate`, or export it"
        )
    if config.max_seq_len is not None and context > config.max_seq_len:
        raise UserError(f"--context={context}: the model has only {config.max_seq_len} learned positions; lower it")
