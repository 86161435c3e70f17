"""Beam search, repetition penalty and filters against transformers: equal texts and scores on tiny models."""

import pytest

torch = pytest.importorskip("torch", reason="parity needs `make parity`")
transformers = pytest.importorskip("transformers", reason="parity needs `make parity`")

import json

from etils import epath
import jax.numpy as jnp
import numpy as np

from llmjax.cli import main
from llmjax.inference.beams import BeamSearch, search
from llmjax.inference.generate import generate
from llmjax.inference.sampling import Sampling, allow, penalize
from llmjax.interop import importing
from tests.parity import test_encdec, test_interop
from tests.parity.test_encdec import VOCAB, load_params, make_reference

STOPS = {"v1.0": [28, 21, 19], "v1.1": [10, 37, 19]}  # tokens that these models like


def sources() -> list[list[int]]:
    rows = test_encdec.batch()
    return [row[:length].tolist() for row, length in zip(rows.source, rows.source_segments.sum(1), strict=True)]


def search_reference(model, prompts, stop_ids, **options):
    """(ids without start and padding, score) of each output, prompt by prompt."""
    longest = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    is_token = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])
    out = model.generate(
        ids,
        attention_mask=is_token,
        do_sample=False,
        eos_token_id=stop_ids,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
        use_cache=False,  # transformers sizes its cache by the encoder's layers, and here the decoder has more
        **options,
    )
    return out.sequences[:, 1:].tolist(), out.sequences_scores.tolist()


@pytest.mark.parametrize(("variant", "beams", "penalty"), [("v1.0", 4, 1.0), ("v1.0", 3, -1.5), ("v1.1", 6, 2.0)])
def test_beam_search(variant, beams, penalty):
    config, graph, params = load_params(variant)
    prompts, model = sources(), make_reference(variant)
    options = {"num_beams": beams, "num_return_sequences": beams, "length_penalty": penalty, "max_new_tokens": 12}
    sequences, scores = search_reference(model, prompts, STOPS[variant], **options)
    tokens = np.zeros((len(prompts), 32), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    method = BeamSearch(max_tokens=12, beams=beams, length_penalty=penalty)
    found = [best for row in search(graph, params, config, tokens, lengths, method, STOPS[variant]) for best in row]
    for (ids, score), sequence, expected in zip(found, sequences, scores, strict=True):
        ends = [at for at, token in enumerate(sequence) if token in STOPS[variant]]
        assert ids == sequence[: ends[0] if ends else None]
        assert score == pytest.approx(expected, abs=2e-5 * max(1, abs(expected)))
    assert len({tuple(ids) for ids, _ in found}) > beams and len({len(ids) for ids, _ in found}) > 1


def test_repetition_penalty_of_an_encoder_decoder():
    penalty = 1.3
    config, graph, params = load_params("v1.1")
    prompts, model = sources(), make_reference("v1.1")
    sampling = Sampling(max_tokens=12, temperature=0, repetition_penalty=penalty)
    actual = generate(graph, params, config, prompts, sampling, stop_ids=[VOCAB + 1])
    for prompt, tokens in zip(prompts, actual, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=VOCAB + 1,
            use_cache=False,
        )
        assert tokens == expected[0, 1:].tolist()


def test_penalty_and_filters_have_the_same_probabilities():
    rng = np.random.default_rng(0)
    logits, ids = rng.normal(0, 3, (8, 50)).astype(np.float32), rng.integers(0, 50, (8, 12))
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    processors = transformers.generation.logits_process
    for penalty, temperature, top_p, min_p in ((1.4, 0.7, 0.9, 0.0), (0.7, 1.5, 1.0, 0.08), (1.1, 1.2, 0.8, 0.05)):
        expected = torch.tensor(logits)
        chain = [
            processors.RepetitionPenaltyLogitsProcessor(penalty),
            processors.TemperatureLogitsWarper(temperature),
            processors.TopPLogitsWarper(top_p),
            processors.MinPLogitsWarper(min_p),
        ]
        for processor in chain:
            expected = processor(torch.tensor(ids), expected)
        penalized = np.asarray(penalize(jnp.asarray(logits), jnp.asarray(seen), penalty))
        scores = (penalized - penalized.max(1, keepdims=True)) / temperature
        order = np.argsort(-scores, axis=1, kind="stable")
        allowed = np.asarray(allow(jnp.asarray(np.take_along_axis(scores, order, 1)), top_p, min_p))
        filtered = np.full_like(scores, -np.inf)
        np.put_along_axis(filtered, order, np.where(allowed, np.take_along_axis(scores, order, 1), -np.inf), axis=1)
        actual = np.exp(filtered) / np.exp(filtered).sum(1, keepdims=True)
        np.testing.assert_allclose(actual, torch.softmax(expected, -1).numpy(), atol=1e-6)


def test_a_file_of_prompts_is_searched_by_beams(tmp_path):
    settings = {**test_interop.T5, "pad_token_id": 0}
    model = test_interop.build("T5", transformers.AutoModelForSeq2SeqLM, settings)
    source = test_interop.save(model, tmp_path / "in", ("<pad>", "</s>", "<unk>", "<extra_id_0>"))
    importing.import_checkpoint(source, epath.Path(tmp_path / "run"))
    prompts = ["def main", "return [argument for argument in argv]", "x"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    flags = ["--beams=3", "--n=2", "--max_tokens=8", "--batch_size=2", "--length_penalty=0.5"]
    files = [f"--prompts={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"]
    assert main.run(["generate", f"--workdir={tmp_path / 'run'}", *files, *flags]) == 0
    texts = [json.loads(line)["completion"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    for number, prompt in enumerate(prompts):
        out = model.generate(
            torch.tensor([[*tokenizer(prompt, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]]),
            do_sample=False,
            num_beams=3,
            num_return_sequences=2,
            length_penalty=0.5,
            max_new_tokens=8,
            eos_token_id=tokenizer.eos_token_id,
        )
        expected = tokenizer.batch_decode(out, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert texts[2 * number : 2 * number + 2] == expected
