"""The engine writes what `generate` writes, for several requests at a time; slots are reused, freed and refused."""

import dataclasses
import threading

import pytest

from llmjax.errors import UserError
from llmjax.inference.generate import generate
from llmjax.inference.sampling import Sampling
from llmjax.models import registry
from llmjax.models.encdec import EncDecConfig
from llmjax.models.encoder import EncoderConfig
from llmjax.models.moe import MoeConfig
from llmjax.models.recurrent import RecurrentConfig
from llmjax.serve.engine import Engine, QueueFullError, Request
from llmjax.serve.loop import Loop
from tests.inference.test_generate import NO_EOS, VOCAB, config, parts

SMALL = {"vocab_size": VOCAB, "vocab_multiple": 16, "num_layers": 2, "embed": 32}
MODELS = {
    "decoder": config(),
    "local": config(window=6, attention_pattern="lg"),
    "learned": config(positions="learned", max_positions=64),
    "recurrent": RecurrentConfig(**SMALL, cell="rglru", hidden=32),
    "moe": MoeConfig(**SMALL, num_heads=4, num_kv_heads=2),
}
SLOW = ("local", "learned", "recurrent", "moe")
PROMPTS = [[3, 1, 4, 1, 5], [9], list(range(1, 40)), [8, 8, 3], list(range(50, 10, -1)), [7, 2]]


def make_engine(settings, slots: int = 3, context: int = 64, waiting: int = 10, stop_ids=(NO_EOS,)) -> Engine:
    graph, params = parts(settings)
    return Engine(graph, params, settings, slots=slots, context=context, waiting=waiting, stop_ids=stop_ids)


class Collected:
    """A request, its tokens, and why it ended."""

    def __init__(self, prompt, sampling: Sampling, row: int = 0):
        self.tokens: list[int] = []
        self.reasons: list[str] = []
        self.request = Request(
            prompt=prompt, sampling=sampling, row=row, on_token=self.tokens.append, on_end=self.reasons.append
        )


def finish(engine: Engine) -> int:
    """Run all requests to their end, and return the number of steps."""
    steps = 1
    while engine.step():
        steps += 1
    return steps


def submit(engine: Engine, prompts, sampling: Sampling, rows=None) -> list[Collected]:
    collected = [Collected(prompt, sampling, row) for prompt, row in zip(prompts, rows or [0] * 99, strict=False)]
    engine.submit([one.request for one in collected])
    return collected


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MODELS]
)
def test_requests_get_the_tokens_of_generate(name):
    """Ten requests of five kinds in three slots; some start while others run, in slots that others have left."""
    settings = MODELS[name]
    graph, params = parts(settings)
    engine = make_engine(settings)
    samplings = [
        Sampling(max_tokens=9, temperature=0),
        Sampling(max_tokens=12, temperature=0.7, seed=5),
        Sampling(max_tokens=7, temperature=1.3, top_p=0.8, seed=2**32 - 1),
        Sampling(max_tokens=12, temperature=0, repetition_penalty=1.6),
        Sampling(max_tokens=9, temperature=1.1, min_p=0.02, repetition_penalty=0.8, seed=5),
    ]
    results = [(s, submit(engine, PROMPTS[i % 3 :: 3], s, rows=range(2))) for i, s in enumerate(samplings)]
    finish(engine)
    for i, (sampling, collected) in enumerate(results):
        expected = generate(graph, params, settings, PROMPTS[i % 3 :: 3], sampling, stop_ids=[NO_EOS])
        assert [one.tokens for one in collected] == expected
        assert [one.reasons for one in collected] == [["length"]] * 2
    assert len({tuple(one.tokens) for _, collected in results for one in collected}) == 10


def test_a_request_ends_at_a_stop_id():
    settings = config()
    graph, params = parts(settings)
    sampling = Sampling(max_tokens=12, temperature=0)
    free = generate(graph, params, settings, [[3, 1]], sampling, stop_ids=[NO_EOS])[0]
    engine = make_engine(settings, stop_ids=(free[4],))
    (one,) = submit(engine, [[3, 1]], sampling)
    finish(engine)
    assert one.tokens == free[: free.index(free[4])] and one.reasons == ["stop"]


def test_requests_share_steps():
    engine = make_engine(config(), slots=3)
    submit(engine, [[1], [2], [3]], Sampling(max_tokens=10, temperature=0))
    assert finish(engine) <= 9 + 2, "one prefill a step, then all at once"


def test_a_cancelled_request_frees_its_slot():
    engine = make_engine(config(), slots=1)
    long, waiting, next_one = submit(engine, [[1], [2], [3]], Sampling(max_tokens=30, temperature=0))
    for _ in range(3):
        engine.step()
    assert len(long.tokens) == 4 and not waiting.tokens
    long.request.cancelled.set()
    waiting.request.cancelled.set()
    assert finish(engine) <= 30
    assert (len(long.tokens), len(waiting.tokens), len(next_one.tokens)) == (4, 0, 30)
    assert not long.reasons and next_one.reasons == ["length"]


def test_a_full_queue_takes_all_of_a_request_or_nothing():
    engine = make_engine(config(), slots=1, waiting=2)
    sampling = Sampling(max_tokens=2, temperature=0)
    submit(engine, [[1], [2]], sampling)
    with pytest.raises(QueueFullError, match="0 requests are running and 2 are waiting"):
        submit(engine, [[3], [4]], sampling)
    (third,) = submit(engine, [[3]], sampling)
    finish(engine)
    assert len(third.tokens) == 2
    submit(engine, [[1], [2], [3]], sampling)


def test_requests_come_from_other_threads_until_the_loop_closes():
    engine = make_engine(config())
    loop = Loop([engine])
    one = Collected([3, 1, 4], Sampling(max_tokens=5, temperature=0))
    one.request.on_end = lambda reason: loop.close()
    thread = threading.Thread(target=lambda: engine.submit([one.request]))
    thread.start()
    loop.run()
    thread.join()
    assert len(one.tokens) == 5


@pytest.mark.parametrize(
    ("prompt", "fields", "words"),
    [
        ([], {}, "has no tokens"),
        ([VOCAB], {}, f"not from 0 to {VOCAB - 1}"),
        ([2**70], {}, f"not from 0 to {VOCAB - 1}"),
        ([1] * 60, {"max_tokens": 6}, "max_tokens=6: the prompt has 60 tokens, and the context 64; at most 5 new"),
        ([1] * 70, {}, "at most 0 new tokens fit"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(prompt, fields, words):
    engine = make_engine(config())
    with pytest.raises(UserError, match=words):
        submit(engine, [[1], prompt], Sampling(**{"max_tokens": 4, **fields}))
    assert not engine.step(), "nothing was queued"


def test_the_whole_context_can_be_used():
    settings = MODELS["learned"]
    graph, params = parts(settings)
    sampling, prompt = Sampling(max_tokens=15, temperature=0), list(range(1, 51))
    engine = make_engine(settings, slots=2)
    (one,) = submit(engine, [prompt], sampling)
    finish(engine)
    assert one.tokens == generate(graph, params, settings, [prompt], sampling, stop_ids=[NO_EOS])[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (EncDecConfig(**SMALL, num_heads=4), "model.family='encdec': an encoder-decoder is not served"),
        (EncoderConfig(**SMALL, num_heads=4), "does not generate text"),
        (dataclasses.replace(config(), num_outputs=2), "does not generate text"),
        (config(positions="learned", max_positions=32), "--context=64: the model has only 32 learned positions"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused(settings, words):
    graph = registry.abstract(settings)[0]
    with pytest.raises(UserError, match=words):
        Engine(graph, {}, settings, slots=1, context=64, waiting=0, stop_ids=[1])
