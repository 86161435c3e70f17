"""Vectors of texts for several requests at a time, in small batches between the steps of the engine."""

import collections
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import threading

from flax import nnx
import numpy as np

from llmjax.batch import Graph, Params
from llmjax.data.store.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.inference.embed import Embedding, embed_rows, encode_texts, find_limit
from llmjax.inference.generate import Tokens
from llmjax.models.registry import ModelConfig
from llmjax.serve.engine import QueueFullError

# A step computes so many tokens: few, since a text that is being written waits for it, and since a batch of a single
# short text is padded to it.
_BATCH_TOKENS = 512


@dataclasses.dataclass(eq=False)
class _Job:
    batches: Iterator[tuple[list[int], np.ndarray]]
    vectors: np.ndarray
    on_done: Callable[[np.ndarray], None]
    cancelled: threading.Event


class Embedder:
    """Embeds texts as `llmjax embed` does, up to rounding; a text's vector does not depend on the other texts.

    `encode` and `submit` may be called from any thread, `step` only from the one that has entered the mesh.

    limit   tokens that a text may have, special tokens included
    """

    def __init__(
        self,
        graph: Graph,
        params: Params,
        config: ModelConfig,
        tokenizer: Tokenizer,
        embedding: Embedding,
        *,
        context: int,
        waiting: int,
    ):
        """context: the most tokens of a text; waiting: how many requests may wait for the one that is computed."""
        self._model, self._config = nnx.merge(graph, params), config
        self._tokenizer, self._embedding = tokenizer, embedding
        self.limit = min(context, find_limit(config, embedding) or context)
        self._places = 1 + waiting
        self._jobs: collections.deque[_Job] = collections.deque()
        self._lock = threading.Lock()
        self.on_submit: Callable[[], None] = lambda: None  # called in the thread that submits

    def encode(self, inputs: Sequence[str | list[int]]) -> list[Tokens]:
        """The token ids that the model reads: texts with the special tokens around them, and token ids as they are.

        Raises UserError for an input that is too long, and for token ids that the model does not have.
        """
        texts = [text for text in inputs if isinstance(text, str)]
        encoded = iter(encode_texts(texts, self._tokenizer, self._embedding, None)[0])
        rows: list[Tokens] = [next(encoded) if isinstance(each, str) else each for each in inputs]
        for number, row in enumerate(rows):
            if len(row) > self.limit:
                raise UserError(
                    f"input {number} has {len(row)} tokens, special tokens included, and at most {self.limit} are "
                    "embedded; give a shorter one"
                )
            if not isinstance(row, np.ndarray) and not 0 <= min(row) <= max(row) < self._config.vocab_size:
                raise UserError(
                    f"input {number} has token ids that are not from 0 to {self._config.vocab_size - 1}; give those of "
                    "the model's tokenizer"
                )
        return rows

    def submit(self, rows: Sequence[Tokens], on_done: Callable[[np.ndarray], None], cancelled: threading.Event) -> None:
        """Queue what `encode` returned. Raises QueueFullError.

        on_done    called with the vectors, float32 [rows, embed], in the thread of `step`; it must not wait
        cancelled  set by any thread to drop the request
        """
        batches = embed_rows(self._model, self._config, rows, self._embedding, tokens=_BATCH_TOKENS)
        job = _Job(batches, np.zeros((len(rows), self._config.embed), np.float32), on_done, cancelled)
        with self._lock:
            if len(self._jobs) == self._places:
                raise QueueFullError(f"{len(self._jobs)} requests for embeddings are waiting; try again later")
            self._jobs.append(job)
        self.on_submit()

    def step(self) -> bool:
        """Compute a batch of the request that has waited longest since its last one; whether any is left."""
        with self._lock:
            self._jobs = collections.deque(job for job in self._jobs if not job.cancelled.is_set())
            job = self._jobs[0] if self._jobs else None
        if job is None:
            return False
        if (batch := next(job.batches, None)) is not None:
            part, job.vectors[part] = batch  # type: ignore[misc]
        else:
            job.on_done(job.vectors)
        with self._lock:
            self._jobs.popleft()
            if batch is not None:
                self._jobs.append(job)
            return bool(self._jobs)
