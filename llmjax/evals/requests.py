"""A model that answers requests: likelihoods of continuations and of whole texts, and generated text."""

from collections.abc import Iterator, Sequence
import logging
import time
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from llmjax.batch import Batch, Params
from llmjax.data.chat_template import ChatTemplate
from llmjax.data.objectives import vocabulary
from llmjax.errors import UserError
from llmjax.inference.generate import check_model, continue_prompts
from llmjax.inference.sampling import Sampling
from llmjax.inference.text_batches import fill_batches, group_by_length, round_length
from llmjax.nn.losses import join, split
from llmjax.parallel import axes, backends, hosts
from llmjax.run.loading import Loaded

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 5.0

Tokens = Sequence[int] | np.ndarray
Pair = tuple[Tokens, Tokens]  # token ids of a context, and those of its continuation


class _Request(NamedTuple):
    """A pair as the model reads it.

    ids     int64: those of the decoder, of which it does not read the last one
    span    how many of them, at the end, are scored
    source  int64: those of the encoder; None: the model has none
    """

    ids: np.ndarray
    span: int
    source: np.ndarray | None

    @property
    def length(self) -> int:
        """Positions of the source, or else of the ids that are read."""
        return len(self.ids) - 1 if self.source is None else len(self.source)

    @property
    def inputs(self) -> tuple[bytes, bytes, int]:
        """Equal for requests that differ in the last token alone."""
        return self.ids[:-1].tobytes(), b"" if self.source is None else self.source.tobytes(), self.span


class LanguageModel:
    """Answers lists of requests with a checkpoint, on the mesh of `use_mesh`, in batches of similar lengths.

    An answer does not depend on the other requests, except for rounding. In a job of several processes all of them call
    each method with the same requests, and all get the answers.

    tokenizer     of the checkpoint
    max_length    tokens that the model reads at most: data.seq_len, or the learned positions where they are fewer
    prefix_id     what the model reads before a text without a context: BOS, or EOS if there is no BOS
    num_cut       contexts and prompts so far that were cut on the left to fit into max_length
    """

    def __init__(self, loaded: Loaded, batch: int | None = None):
        """batch: rows that are computed at a time; None: eval.batch, or train.global_batch.

        Raises UserError for a model that does not continue text, and for a batch that the mesh cannot split.
        """
        config = loaded.config
        check_model(config.model, Sampling())
        self.tokenizer = loaded.tokenizer
        self.max_length = min(config.data.seq_len, config.model.max_seq_len or config.data.seq_len)
        self.prefix_id = vocabulary.build_vocab(loaded.tokenizer).bos_id
        self.num_cut = 0
        self._loaded = loaded
        self._reads_source = config.model.reads_source
        self._batch = batch or config.eval.batch or config.train.global_batch
        field = "eval.batch" if config.eval.batch else "train.global_batch"
        backends.check_batch("--batch" if batch else field, self._batch)
        self._multiple = max(8, 2 * axes.num_shards("seq"))  # of the positions of a row
        self._sharding = backends.batch_sharding()
        self._rows = hosts.local_rows(self._sharding, self._batch)
        replicated = jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.sharding.PartitionSpec())
        self._score = jax.jit(self._score_batch, static_argnames=("span", "share"), out_shardings=replicated)

    def use(self, loaded: Loaded) -> None:
        """Answer with the parameters of another step of the same run; compiled programs are kept."""
        self._loaded = loaded

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, in which special tokens are recognised, without ids before or after them."""
        return self.tokenizer.encode_prompt(text).tolist()

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text as the model reads prompts. An id that starts texts is not repeated."""
        ids = self.tokenizer.encode_prompt(text)
        if self._reads_source:
            return self._make_source(ids)
        frame = self.tokenizer.prompt_frame
        before = [self.prefix_id] if frame is None else list(frame[0])
        return ids.tolist() if ids[: len(before)].tolist() == before else [*before, *ids.tolist()]

    def encode_pair(self, context: str, continuation: str) -> Pair:
        """Token ids of a context and of its continuation, as lm-eval splits them.

        Both are encoded as one text, and spaces at the end of the context belong to the continuation. The context of an
        encoder-decoder is its source; where it answers prompts, it is encoded apart from the continuation.
        """
        if self._reads_source:
            stripped = context.rstrip()
            before, spaces = self.encode(stripped), context[len(stripped) :]
            if self._loaded.objective.answers:
                return self._make_source(before), self.encode(spaces + continuation)
            return self._make_source(before), self.encode(context + continuation)[len(before) :]
        if not context:
            ids = self.encode(continuation)
            return (ids[:1], ids[1:]) if ids[:1] == [self.prefix_id] else ([self.prefix_id], ids)
        text = context + continuation
        before = self.encode_prompt(context.rstrip())
        return before, self.encode_prompt(text)[len(before) :]

    def loglikelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Of each continuation, its log-likelihood in nats, and whether each of its tokens is the most likely one.

        Arguments and errors as of `score_tokens`.
        """
        return [(float(np.sum(scores, dtype=np.float64)), is_greedy) for scores, is_greedy in self.score_tokens(pairs)]

    def rolling(self, texts: Sequence[Tokens]) -> list[float]:
        """The log-likelihood in nats of each text, every token of it scored once: the sum of `rolling_tokens`."""
        return [float(np.sum(scores, dtype=np.float64)) for scores in self.rolling_tokens(texts)]

    def rolling_tokens(self, texts: Sequence[Tokens]) -> list[np.ndarray]:
        """The log-likelihood in nats of each token of each text, float32 [tokens], after `prefix_id`.

        A text longer than `max_length` is read in windows, as `split_windows` cuts them. The source of an
        encoder-decoder is an empty prompt, or what the window continues.
        """
        windows = [split_windows(ids, self.prefix_id, self.max_length) for ids in texts]
        if self._reads_source:
            windows = [
                [(self._make_source(before if at else []), ids) for at, (before, ids) in enumerate(parts)]
                for parts in windows
            ]
        scores = iter(self.score_tokens([window for parts in windows for window in parts]))
        empty = [np.zeros(0, np.float32)]
        return [np.concatenate(empty + [next(scores)[0] for _ in parts]) for parts in windows]

    def score_tokens(self, pairs: Sequence[Pair]) -> list[tuple[np.ndarray, bool]]:
        """Of each continuation, the log-likelihoods in nats of its tokens, and whether each is the most likely one.

        An empty context is `prefix_id`. A context that does not fit is cut on the left. Raises UserError for a
        continuation longer than `max_length`, and for an id that the model does not have.
        """
        return [(scores, bool(is_first.all())) for scores, is_first in self._score_pairs(pairs)]

    def count_greedy(self, pairs: Sequence[Pair]) -> list[int]:
        """Of each continuation, the number of its first tokens that greedy decoding would write after the context.

        One forward pass tells: up to the first token that is not the most likely one, greedy decoding reads the same
        tokens as the continuation has. Arguments and errors as of `score_tokens`.
        """
        return [len(is_first) if is_first.all() else int(is_first.argmin()) for _, is_first in self._score_pairs(pairs)]

    def _score_pairs(self, pairs: Sequence[Pair]) -> list[tuple[np.ndarray, np.ndarray]]:
        """As `score_tokens`, with bool [tokens]: whether each token is the most likely one."""
        rows = [self._join(number, context, continuation) for number, (context, continuation) in enumerate(pairs)]
        # Requests that differ in their last token alone, such as the letters of choices, are computed once.
        by_inputs: dict[tuple[bytes, bytes, int], list[int]] = {}
        for number, row in enumerate(rows):
            by_inputs.setdefault(row.inputs, []).append(number)
        equal = list(by_inputs.values())
        firsts = [rows[numbers[0]] for numbers in equal]
        # Short spans together, so that a batch is not scored at many positions for one long continuation.
        groups = fill_batches(
            [row.length for row in firsts],
            [row.span for row in firsts],
            rows=self._batch,
            longest=self.max_length,
            multiple=self._multiple,
        )
        scored = [(np.zeros(0, np.float32), np.ones(0, bool))] * len(pairs)
        for part, _, length in _log_progress(list(groups), len(equal)):
            members = [equal[index] for index in part]
            firsts = [rows[numbers[0]] for numbers in members]
            longest = max(row.span for row in firsts)
            span = round_length(longest) if longest else 1
            span = span if self._reads_source else min(span, length)
            batch = self._make_batch(firsts, length)
            share = any(len(numbers) > 1 for numbers in members)
            # One batch at a time: collectives of two programs could start in different orders on CPU processes.
            scores, is_first, last = jax.device_get(self._score(self._loaded.params, batch, span=span, share=share))
            for row, numbers in enumerate(members):
                count = rows[numbers[0]].span
                for number in numbers:
                    of_tokens, is_greedy = scores[row, :count].copy(), is_first[row, :count].copy()
                    if len(numbers) > 1 and count:
                        token = rows[number].ids[-1]
                        of_tokens[-1], is_greedy[-1] = last[row, token], last[row].argmax() == token
                    scored[number] = of_tokens, is_greedy
        return scored

    def generate(
        self,
        prompts: Sequence[Tokens],
        *,
        stop: Sequence[str] = (),
        max_tokens: int,
        temperature: float = 0.0,
        template: ChatTemplate | None = None,
    ) -> list[str]:
        """The text that continues each prompt, up to a stop string, which it lacks, or the end of a document.

        prompts      as `encode_prompt` returns them; one that does not fit is cut on the left
        temperature  0: always the most likely token
        template     that wrote the prompts; its end of a turn ends a text as well
        Raises UserError where `max_tokens` leave no room for a prompt.
        """
        limit = self.max_length - (0 if self._loaded.config.model.reads_source else max_tokens)
        if limit < 1:
            raise UserError(
                f"max_tokens={max_tokens}: must be below {self.max_length}, what the model reads; lower it, or raise "
                "data.seq_len"
            )
        self.num_cut += sum(len(prompt) > limit for prompt in prompts)
        cut = [prompt[-limit:] if len(prompt) else [self.prefix_id] for prompt in prompts]
        method = Sampling(max_tokens=max_tokens, temperature=temperature, stop=tuple(stop))
        texts = [""] * len(prompts)
        groups = list(group_by_length([len(prompt) for prompt in cut], limit, rows=self._batch))
        for part, count, length in _log_progress(groups, len(prompts)):
            new = continue_prompts(
                self._loaded,
                [cut[number] for number in part],
                method,
                numbers=part,
                shape=(count, length),
                template=template,
            )
            for number, text in zip(part, new, strict=True):
                texts[number] = text
        return texts

    def _make_source(self, ids: Tokens) -> list[int]:
        """The ids of a text as the encoder of an encoder-decoder reads prompts."""
        return self._loaded.objective.prompt(np.asarray(ids, np.int32)).tolist()

    def _join(self, number: int, context: Tokens, continuation: Tokens) -> _Request:
        """The request of a pair; the model reads max_length ids at most."""
        if len(continuation) > self.max_length:
            raise UserError(
                f"request {number}: its continuation has {len(continuation)} tokens, and the model reads "
                f"{self.max_length}; shorten it, or raise data.seq_len"
            )
        config = self._loaded.config.model
        before = np.asarray(context if len(context) else [self.prefix_id], np.int64)
        ids = np.concatenate([before, np.asarray(continuation, np.int64)])
        if not 0 <= ids.min() <= ids.max() < config.vocab_size:
            raise UserError(f"request {number} contains a token id outside of 0 to {config.vocab_size - 1}")
        if self._reads_source:
            self.num_cut += len(before) > self.max_length
            start = [config.decoder_start_id, *self._loaded.objective.answer_begin]
            return _Request(
                np.append(start, continuation).astype(np.int64), len(continuation), before[-self.max_length :]
            )
        self.num_cut += len(ids) > self.max_length + 1
        return _Request(ids[-(self.max_length + 1) :], len(continuation), None)

    def _make_batch(self, rows: Sequence[_Request], length: int) -> Batch:
        """One request a row, of which the last `span` targets are scored; rows without one are padding.

        length   positions of the sources, or else of the rows
        """
        sources = {}
        if self._reads_source:
            source, source_segments = np.zeros((2, self._batch, length), np.int32)
            for number, row in enumerate(rows):
                assert row.source is not None
                source[number, : row.length], source_segments[number, : row.length] = row.source, 1
            source_positions = np.arange(length, dtype=np.int32) * source_segments
            sources = {"source": source, "source_segments": source_segments, "source_positions": source_positions}
            length = round_length(max(len(row.ids) for row in rows) - 1, self._multiple)
        inputs, targets, segments = np.zeros((3, self._batch, length), np.int32)
        weights = np.zeros((self._batch, length), np.float32)
        for number, row in enumerate(rows):
            end = len(row.ids) - 1
            inputs[number, :end], targets[number, :end], segments[number, :end] = row.ids[:-1], row.ids[1:], 1
            weights[number, end - row.span : end] = 1
        local = Batch(
            inputs=inputs[self._rows],
            targets=targets[self._rows],
            weights=weights[self._rows],
            segments=segments[self._rows],
            positions=(np.arange(length, dtype=np.int32) * segments)[self._rows],
            sample=np.zeros((len(self._rows), 2), np.uint32),
            one_segment=True,
            **{name: array[self._rows] for name, array in sources.items()},
        )
        return hosts.global_batch(self._sharding, local, self._rows, self._batch)

    def _score_batch(self, params: Params, batch: Batch, *, span: int, share: bool) -> tuple[Any, Any, Any]:
        """(log-likelihood float32, whether no id is more likely) [batch, span] of targets from the first scored on.

        Logits over the whole vocabulary are computed for these positions alone, train.loss_chunk of them at a time.
        share   the third result is float32 [batch, vocab], the log-likelihoods of all ids as the last scored target
        """
        model = nnx.merge(self._loaded.graph, params)
        hidden = axes.constrain(model(batch).hidden, "batch", "seq", None)
        first = jnp.argmax(batch.weights > 0, axis=1)
        at = jnp.minimum(first[:, None] + jnp.arange(span), hidden.shape[1] - 1)
        hidden = axes.constrain(jnp.take_along_axis(hidden, at[..., None], axis=1), "batch", None, None)
        targets = jnp.take_along_axis(batch.targets, at, axis=1)

        def score(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            hidden, targets = part
            logits = model.unembed(hidden)
            # Targets are compared, not looked up, so that vocab may be sharded.
            ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2)
            target = jnp.sum(jnp.where(ids == targets[..., None], logits, 0.0), axis=-1)
            # As argmax, which is slower: the sum needs the maximum as well, and a minimum of ids is vectorised.
            is_highest = logits == jnp.max(logits, axis=-1, keepdims=True)
            first = jnp.min(jnp.where(is_highest, ids, logits.shape[-1]), axis=-1)
            return target - jax.nn.logsumexp(logits, axis=-1), first == targets

        chunk = min(self._loaded.config.train.loss_chunk or span, span)
        scores, is_first = jax.lax.map(score, (split(hidden, chunk), split(targets, chunk)))
        if not share:
            return join(scores, span), join(is_first, span), None
        last = jnp.sum(batch.weights > 0, axis=1)[:, None, None] - 1
        logits = model.unembed(jnp.take_along_axis(hidden, jnp.maximum(last, 0), axis=1))[:, 0]
        return join(scores, span), join(is_first, span), jax.nn.log_softmax(logits, axis=-1)


def split_windows(ids: Tokens, prefix_id: int, max_length: int) -> list[Pair]:
    """The pairs (context, continuation) of which a text's likelihood consists: each token is in one continuation.

    As lm-eval cuts them: windows of `max_length` tokens, each after the last token of the one before, the first after
    `prefix_id`; the last, shorter one after as many tokens as the model can read.
    """
    ids, pairs = list(ids), []
    for start in range(0, len(ids), max_length):
        end = min(start + max_length, len(ids))
        before = [prefix_id] if start == 0 else ids[end - max_length - 1 : start]
        pairs.append((before, ids[start:end]))
    return pairs


def _log_progress(groups: Sequence[tuple[list[int], int, int]], total: int) -> Iterator[tuple[list[int], int, int]]:
    """Yield groups of requests (indices, rows, positions of a row), and log on long work how many requests are done."""
    start = last = time.monotonic()
    done = 0
    for group in groups:
        yield group
        done += len(group[0])
        now = time.monotonic()
        if now - last > _PROGRESS_SECONDS and done < total:
            last = now
            seconds = (now - start) / done * (total - done)
            logger.info("  %d/%d requests, %.0f s left", done, total, seconds, extra={"progress": True})
