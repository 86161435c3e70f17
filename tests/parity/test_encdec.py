"""T5 and T5 v1.1 against transformers: logits, loss, gradients, greedy text, and names on disk."""

import dataclasses
import functools

import pytest

torch = pytest.importorskip("torch", reason="parity needs `make parity`")
transformers = pytest.importorskip("transformers", reason="parity needs `make parity`")

import numpy as np

from llmjax.batch import Batch
from llmjax.binding import bind
from llmjax.errors import UserError
from llmjax.evals.requests import LanguageModel
from llmjax.inference.generate import generate
from llmjax.inference.sampling import Sampling
from llmjax.interop.encdec import ARCHITECTURES
from llmjax.models import registry
from llmjax.models.encdec import EncDecConfig
from llmjax.parallel import axes
from llmjax.run import config as run_config
from tests.evals.tasks.models import wrap
from tests.interop import state_dicts
from tests.parity.reference import loss_logits_and_grads
from tests.train.trainer import one_device

VOCAB = 67
T5 = ARCHITECTURES["T5ForConditionalGeneration"]
VARIANTS = {
    "v1.0": {"feed_forward_proj": "relu"},
    "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}


@functools.cache
def make_reference(variant: str):
    """A small random model, moved off its start so that no norm's scale is 1 and distances count."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=48,
        d_kv=12,
        d_ff=80,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=5,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        decoder_start_token_id=0,
        attn_implementation="eager",
        **VARIANTS[variant],
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    if variant == "v1.1":  # transformers ties what it builds, and unties what it reads
        model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, 48) / 7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if variant == "v1.0":  # a tied head that hears little but the last token repeats it for ever
            model.shared.weight.mul_(0.3)
    return model


@functools.cache
def load_params(variant: str):
    """Config, graph and parameters, from the names and numbers that transformers writes."""
    hf = make_reference(variant).config.to_dict()
    if variant == "v1.1":
        assert hf["scale_decoder_outputs"] is False
    config = bind(EncDecConfig, T5.read_config(hf) | {"vocab_multiple": 16})
    params = state_dicts.load(T5.rules(config), tensors(make_reference(variant).state_dict()), config)
    return config, registry.abstract(config)[0], params


def tensors(state: dict) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in state.items()}


def batch() -> Batch:
    """Sources longer than the last bucket's edge, targets, and padding at the end of both."""
    rng = np.random.default_rng(3)
    source, target = (rng.integers(2, VOCAB, shape).astype(np.int32) for shape in ((3, 30), (3, 26)))
    is_target, is_source = (
        np.arange(n) < np.array(lengths)[:, None] for n, lengths in ((26, (26, 9, 17)), (30, (30, 21, 4)))
    )
    positions = lambda mask: np.where(mask, np.arange(mask.shape[1]), 0).astype(np.int32)
    return Batch(
        inputs=np.where(is_target, np.c_[np.zeros(3, np.int32), target[:, :-1]], 0),
        targets=np.where(is_target, target, 0),
        weights=is_target.astype(np.float32),
        segments=is_target.astype(np.int32),
        positions=positions(is_target),
        sample=np.zeros((3, 2), np.uint32),
        source=np.where(is_source, source, 0),
        source_segments=is_source.astype(np.int32),
        source_positions=positions(is_source),
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_gradients(variant):
    config, graph, params = load_params(variant)
    rows, model = batch(), make_reference(variant)
    real = rows.weights > 0
    labels = np.where(real, rows.targets, -100)
    give = lambda array: torch.from_numpy(np.asarray(array, np.int64))
    model.zero_grad()
    expected = model(
        input_ids=give(rows.source), attention_mask=give(rows.source_segments), labels=give(labels), use_cache=False
    )
    expected.loss.backward()
    (loss, logits), grads = loss_logits_and_grads(graph, params, rows)
    scores = expected.logits.detach().numpy()
    np.testing.assert_allclose(np.asarray(logits)[real][:, :VOCAB], scores[real], rtol=0, atol=5e-4)
    assert np.abs(scores[real]).max() > 1, "logits of a size that differences show in"
    assert abs(float(loss) - expected.loss.item()) < 1e-5
    actual = state_dicts.dump(T5.rules(config), grads, config)
    for name in (
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "decoder.block.2.layer.1.EncDecAttention.k.weight",
        "encoder.block.1.layer.1.DenseReluDense.wo.weight",
        "shared.weight",
    ):
        grad = model.get_parameter(name).grad.numpy()
        assert np.abs(grad).max() > 1e-4
        np.testing.assert_allclose(actual[name], grad, rtol=0, atol=1e-4 * max(1.0, np.abs(grad).max()), err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_text(variant):
    config, graph, params = load_params(variant)
    rows, model = batch(), make_reference(variant)
    lengths = rows.source_segments.sum(1)
    prompts = [row[:length] for row, length in zip(rows.source, lengths, strict=True)]
    give = lambda array: torch.from_numpy(np.asarray(array, np.int64))
    expected = model.generate(
        give(rows.source),
        attention_mask=give(rows.source_segments),
        max_new_tokens=15,
        do_sample=False,
        num_beams=1,
        eos_token_id=VOCAB + 1,
        use_cache=False,  # transformers sizes its cache by the encoder's layers, and here the decoder has more
    ).numpy()
    actual = generate(graph, params, config, prompts, Sampling(max_tokens=15, temperature=0), stop_ids=[-1])
    assert actual == expected[:, 1:].tolist()
    assert len({tuple(row) for row in actual}) == 3 and max(len(set(row)) for row in actual) > 2


def test_likelihoods_of_answers_to_a_source():
    """As lm-eval's hf backend computes them: the source is read by the encoder, the answer alone is scored."""
    config, _, params = load_params("v1.1")
    rng = np.random.default_rng(1)
    lengths = [(30, 4), (5, 20), (17, 1), (3, 9)]
    pairs = [tuple(rng.integers(2, VOCAB, length).tolist() for length in each) for each in lengths]
    expected = []
    for source, answer in pairs:
        with torch.no_grad():
            scores = make_reference("v1.1")(input_ids=torch.tensor([source]), labels=torch.tensor([answer])).logits[0]
        scores = scores.double().log_softmax(-1)
        expected.append(scores[range(len(answer)), answer].sum().item())
    tree = {"objective": {"name": "span", "prompt_form": "plain"}, "data": {"tokenizer": {"kind": "bytes"}}}
    run = run_config.apply_overrides({"model": {"family": "encdec"}, **tree}, [])
    run = dataclasses.replace(run, model=dataclasses.replace(config, start_id=0))
    with axes.use_mesh(one_device(), run.parallel.rules):
        scores = LanguageModel(wrap(run, params), 2).loglikelihoods(pairs)
    np.testing.assert_allclose([score for score, _ in scores], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_mapping_round_trip_is_the_identity(variant, tmp_path):
    config, _, params = load_params(variant)
    state = tensors(make_reference(variant).state_dict())
    back = state_dicts.dump(T5.rules(config), params, config)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)
    # What transformers reads of our config.json is the model that it wrote.
    written = T5.write_config(config)
    assert bind(EncDecConfig, T5.read_config(written) | {"vocab_multiple": 16}) == config
    make_reference(variant).save_pretrained(tmp_path)
    again = transformers.T5Config(**{k: v for k, v in written.items() if k != "model_type"})
    for field, value in again.to_dict().items():
        if field not in ("architectures", "dtype", "transformers_version", "_name_or_path", "tie_word_embeddings"):
            assert getattr(make_reference(variant).config, field) == value, field
    model = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path, config=again, attn_implementation="eager"
    ).eval()
    rows = batch()
    give = lambda array: torch.from_numpy(np.asarray(array, np.int64))
    fields = {"input_ids": give(rows.source), "decoder_input_ids": give(rows.inputs)}
    with torch.no_grad():
        np.testing.assert_array_equal(model(**fields).logits, make_reference(variant)(**fields).logits)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"feed_forward_proj": "gated-tanh"}, r"feed_forward_proj='gated-tanh' is not supported"),
        ({"is_decoder": True}, r"is_decoder=True"),
        ({"dense_act_fn": "gelu"}, r"dense_act_fn='gelu'"),
        ({"scale_decoder_outputs": True, "tie_word_embeddings": False}, r"scale_decoder_outputs=True"),
        ({"rope_theta": 1e4}, r"rope_theta=10000.0"),
    ],
)
def test_unsupported_settings_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        T5.read_config(make_reference("v1.1").config.to_dict() | change)
