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
from llmjax.inference.generate import Tokens, find_seen, find_stop_ids
from llmjax.inference.sampling import Sampling, draw_rows
from llmjax.models.registry import ModelConfig
from llmjax.run.loading import Loaded

_SHORTEST = 32  # prompts are padded to this many tokens times a power of two, so that few lengths are compiled
_CONTEXT = 2048  # default; a cache of all positions that a published model has rarely fits into memory


class QueueFullError(RuntimeError):
    """Every slot is taken, and as many requests wait as may."""


@dataclasses.dataclass(eq=False, kw_only=True)
class Request:
    """A prompt to continue.

    prompt     token ids
    sampling   without stop strings, which need the text: who decodes it cancels the request
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

    The others are fields of Sampling.
    """

    tokens: np.ndarray
    positions: np.ndarray
    keys: np.ndarray
    inverse_temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    repetition_penalty: np.ndarray


class Engine:
    """Continues prompts in `slots` rows of a cache with `context` positions each.

    `submit` may be called from any thread, `step` only from the one that has entered the mesh. Draws are
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
            # Tokens that the text of a slot contains, for the repetition penalty: bool [slots, vocab].
            self._seen = jnp.zeros((slots, config.padded_vocab), bool)
            jax.block_until_ready((self._cache, self._seen))
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
            min_p=np.zeros(slots, np.float32),
            repetition_penalty=np.ones(slots, np.float32),
        )
        self.num_slots = slots
        self._running: dict[int, Request] = {}  # slot -> request
        self._counts: dict[int, int] = {}  # slot -> number of new tokens
        self._waiting: collections.deque[Request] = collections.deque()
        self._lock = threading.Lock()
        self.on_submit: Callable[[], None] = lambda: None  # called in the thread that submits

    def check(self, prompt: Tokens, sampling: Sampling) -> None:
        """Raise UserError for a request that cannot be served."""
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
        with self._lock:
            if len(self._running) + len(self._waiting) + len(requests) > self.capacity:
                raise QueueFullError(
                    f"{len(self._running)} requests are running and {len(self._waiting)} are waiting; try again later"
                )
            self._waiting.extend(requests)
        self.on_submit()

    def warm_up(self) -> None:
        """Compile the decode step and the shortest prefill, before the first request."""
        prompt, sampling = [0], Sampling(max_tokens=min(2, self.context), temperature=0)
        ignore = lambda _: None
        self.submit([Request(prompt=prompt, sampling=sampling, on_token=ignore, on_end=ignore)])
        while self.step():
            pass

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
        with self._lock:
            kept = [request for request in self._waiting if not request.cancelled.is_set()]
            self._waiting = collections.deque(kept)

    def _admit(self) -> tuple[int, Request] | None:
        """(the first free slot, the request that has waited longest, which now runs in it); None without one."""
        with self._lock:
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
        slots.top_k[slot] = min(sampling.top_k, self._config.padded_vocab)  # a larger one may not fit into int32
        slots.top_p[slot], slots.min_p[slot] = sampling.top_p, sampling.min_p
        slots.repetition_penalty[slot], slots.positions[slot] = sampling.repetition_penalty, length
        seen = find_seen(self._config, [request.prompt], (1, self._config.padded_vocab))
        logits, self._cache, self._seen = _prefill(
            self._model, tokens, np.array([length], np.int32), seen, np.int32(slot), self._cache, self._seen
        )
        drawing = {name: values[slot : slot + 1] for name, values in vars(slots).items() if name != "tokens"}
        self._take(slot, int(jax.device_get(_draw(logits, seen, **drawing))[0]))

    def _decode(self) -> None:
        """One more token of each running request."""
        tokens, self._cache, self._seen = _step(self._model, self._cache, self._seen, **vars(self._slots))
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
        slots.top_k[slot], slots.top_p[slot], slots.min_p[slot], slots.repetition_penalty[slot] = 0, 1, 0, 1
        with self._lock:
            del self._running[slot], self._counts[slot]


@functools.partial(jax.jit, static_argnames=("slots", "context"))
def _make_cache(model: Any, *, slots: int, context: int) -> Any:
    return model.cache(slots, context)


@functools.partial(jax.jit, donate_argnames=("cache", "seen"))
def _prefill(
    model: Any, tokens: jax.Array, lengths: jax.Array, prompt_seen: jax.Array, slot: jax.Array, cache: Any, seen: Any
) -> tuple[jax.Array, Any, jax.Array]:
    """(logits [1, vocab] after a prompt [1, seq], cache and seen with what belongs to the prompt in a slot)"""
    hidden, new, _ = model.prefill(tokens, lengths, 0)
    # Every leaf is [layers, slots, ...]. What is behind the prompt stays: a token is written before it is attended to.
    write = lambda old, rows: jax.lax.dynamic_update_slice_in_dim(old, rows.astype(old.dtype), slot, axis=1)
    seen = jax.lax.dynamic_update_slice_in_dim(seen, prompt_seen, slot, axis=0)
    return model.unembed(hidden), jax.tree.map(write, cache, new), seen


@functools.partial(jax.jit, donate_argnames=("cache", "seen"))
def _step(
    model: Any, cache: Any, seen: jax.Array, *, tokens: jax.Array, positions: jax.Array, **drawing: jax.Array
) -> tuple[jax.Array, Any, jax.Array]:
    """(the token after `tokens` [slots], cache, seen with `tokens`)"""
    hidden, cache = model.cached(tokens[:, None], positions[:, None], cache)
    seen = seen.at[jnp.arange(len(tokens)), tokens].set(True)
    return _draw(model.unembed(hidden[:, 0]), seen, positions=positions + 1, **drawing), cache, seen


@jax.jit
def _draw(
    logits: jax.Array, seen: jax.Array, *, keys: jax.Array, positions: jax.Array, **settings: jax.Array
) -> jax.Array:
    """A token for each row, by the data of its key [rows, 2] and the position of the token."""
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys), positions)
    return draw_rows(logits, keys, seen, **settings)


def make_engine(
    loaded: Loaded, *, slots: int, context: int | None, waiting: int, template: ChatTemplate | None
) -> Engine:
    """An engine for a checkpoint, inside its mesh. Raises UserError where it cannot be served.

    context   None: 2048 positions, or the model's learned positions if there are fewer
    template  that writes the prompts, whose end of turn ends a text; None: there is none
    """
    check_processes()
    model, stop_ids = loaded.config.model, find_stop_ids(loaded.tokenizer, template)
    if context is None:
        context = default_context(model)
    return Engine(loaded.graph, loaded.params, model, slots=slots, context=context, waiting=waiting, stop_ids=stop_ids)


def check_processes() -> None:
    """Raise UserError in a job of several processes."""
    if jax.process_count() > 1:
        raise UserError(
            f"this is a job of {jax.process_count()} processes, and chat and serve run in one; start one alone, inside "
            "a Slurm step or on a TPU slice with LLMJAX_DISTRIBUTED=off"
        )


def default_context(config: ModelConfig) -> int:
    """2048 positions, or the model's learned positions if there are fewer."""
    return min(_CONTEXT, config.max_seq_len or _CONTEXT)


def continues_text(config: ModelConfig) -> bool:
    """Whether an engine can use the model."""
    return config.generates and not config.reads_source


def _check_model(config: ModelConfig, context: int) -> None:
    if not config.generates:
        raise UserError(f"model.family={config.family!r}: the model does not generate text; use one that does")
    if config.reads_source:
        raise UserError(
            f"model.family={config.family!r}: an encoder-decoder is not served; use `llmjax generate`, or export it"
        )
    if config.max_seq_len is not None and context > config.max_seq_len:
        raise UserError(f"--context={context}: the model has only {config.max_seq_len} learned positions; lower it")
