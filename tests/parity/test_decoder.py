"""The decoder, set up by config, against each model of transformers that it supports."""

import copy
import dataclasses
import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs `make parity`")
transformers = pytest.importorskip("transformers", reason="parity needs `make parity`")

from llmjax.binding import bind
from llmjax.interop.decoder import ARCHITECTURES
from llmjax.models import registry
from llmjax.models.decoder_config import DecoderConfig
from llmjax.nn.rotary import frequencies
from tests.interop import state_dicts
from tests.parity.reference import (
    VOCAB,
    add_noise,
    assert_same_greedy_text,
    loss_logits_and_grads,
    padded_rows,
    score_reference,
)

SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LOCAL, FULL = "sliding_attention", "full_attention"
BY_KIND = {LOCAL: dict(rope_type="default", rope_theta=100.0), FULL: dict(rope_type="linear", factor=8.0)}
OLMO3 = {LOCAL: dict(rope_type="default", rope_theta=5e3), FULL: dict(YARN, rope_theta=5e3, attention_factor=1.3)}
VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)

# name -> (class of transformers, its config, fields that our config must have). Windows are shorter than the rows, and
# caps of the size of the scores, so that they bite.
CASES = {
    "gpt2": ("GPT2", dict(vocab_size=VOCAB, n_embd=48, n_layer=3, n_head=4, n_positions=32), dict(biases="all")),
    "gpt2-untied": (
        "GPT2",
        dict(
            vocab_size=VOCAB,
            n_embd=48,
            n_layer=2,
            n_head=4,
            n_positions=32,
            n_inner=40,
            activation_function="relu",
            tie_word_embeddings=False,
        ),
        dict(tie_embeddings=False, mlp=40, activation="relu"),
    ),
    "llama": ("Llama", SIZES, dict(tie_embeddings=False)),
    "llama-tied": (
        "Llama",
        SIZES | dict(tie_word_embeddings=True, rope_parameters=LLAMA3, head_dim=16),
        dict(tie_embeddings=True, rope_scaling="llama3", rope_factor=8.0, head_dim=16),
    ),
    "llama-linear": (
        "Llama",
        SIZES | dict(rope_parameters=dict(rope_type="linear", factor=4.0), attention_bias=True),
        dict(rope_scaling="linear", biases="attention"),
    ),
    "llama-yarn": (
        "Llama",
        SIZES | dict(rope_parameters=YARN, attention_bias=True, mlp_bias=True),
        dict(rope_scaling="yarn", biases="all"),
    ),
    "llama-yarn-untruncated": (
        "Llama",
        SIZES | dict(rope_parameters=YARN | dict(truncate=False, beta_fast=8.0, mscale=0.7, mscale_all_dim=1.1)),
        dict(rope_truncate=False, rope_high=8.0),
    ),
    "mistral": ("Mistral", SIZES | dict(sliding_window=5), dict(window=5, attention_pattern="l")),
    "mistral-whole": ("Mistral", SIZES | dict(sliding_window=None, tie_word_embeddings=True), dict(window=0)),
    "qwen3": ("Qwen3", SIZES | dict(head_dim=16), dict(qk_norm="head", window=0)),
    "qwen3-tied": (
        "Qwen3",
        SIZES
        | dict(
            head_dim=16,
            tie_word_embeddings=True,
            use_sliding_window=True,
            sliding_window=6,
            max_window_layers=1,
            attention_bias=True,
            rope_parameters=YARN,
        ),
        dict(window=6, attention_pattern="gll", biases="attention"),
    ),
    "gemma2": (
        "Gemma2",
        SIZES
        | dict(
            head_dim=16,
            sliding_window=5,
            query_pre_attn_scalar=10,
            attn_logit_softcapping=0.7,
            final_logit_softcapping=1.5,
        ),
        dict(window=5, attention_pattern="lg", score_softcap=0.7, logit_softcap=1.5, tie_embeddings=True),
    ),
    "gemma2-untied": (
        "Gemma2",
        SIZES
        | dict(
            head_dim=16,
            sliding_window=7,
            query_pre_attn_scalar=16,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            tie_word_embeddings=False,
        ),
        dict(score_softcap=0.0, logit_softcap=0.0, score_scale=0.0, tie_embeddings=False),
    ),
    "gemma3": (
        "Gemma3",
        SIZES
        | dict(
            head_dim=16,
            sliding_window=5,
            query_pre_attn_scalar=12,
            num_hidden_layers=4,
            sliding_window_pattern=3,
            rope_parameters=BY_KIND,
        ),
        dict(window=5, attention_pattern="llg", rope_base=1e6, rope_local_base=100.0, rope_scaling="linear"),
    ),
    "gemma3-untied": (
        "Gemma3",
        SIZES | dict(head_dim=16, sliding_window=4, final_logit_softcapping=2.0, tie_word_embeddings=False),
        dict(window=4, attention_pattern="l", rope_base=1e6, rope_local_base=1e4, logit_softcap=2.0),
    ),
    "gemma3-images": (
        "Gemma3Images",
        SIZES | dict(head_dim=16, sliding_window=5, num_hidden_layers=2, layer_types=[FULL, LOCAL]),
        dict(window=5, attention_pattern="gl"),
    ),
    "olmo2": ("Olmo2", SIZES, dict(qk_norm="all", norm_position="inner")),
    "olmo2-tied": (
        "Olmo2",
        SIZES | dict(tie_word_embeddings=True, attention_bias=True, rope_parameters=LLAMA3),
        dict(tie_embeddings=True, rope_scaling="llama3"),
    ),
    "olmo3": (
        "Olmo3",
        SIZES | dict(num_hidden_layers=4, sliding_window=5, rope_parameters=OLMO3),
        dict(window=5, attention_pattern="lllg", rope_local_base=5e3, rope_scaling="yarn", rope_attention_factor=1.3),
    ),
    "gemma2-whole": ("Gemma2", SIZES | dict(head_dim=16, layer_types=[FULL] * 3), dict(window=0)),
    "gemma3-whole": (
        "Gemma3",
        SIZES | dict(head_dim=16, layer_types=[FULL] * 3, rope_parameters=BY_KIND),
        dict(window=0, rope_local_base=0.0),
    ),
    "olmo3-whole": (
        "Olmo3",
        SIZES | dict(layer_types=[FULL] * 3, rope_parameters=OLMO3),
        dict(window=0, rope_local_base=0.0, rope_scaling="yarn"),
    ),
    "olmo3-tied": (
        "Olmo3",
        SIZES | dict(sliding_window=5, layer_types=[FULL, LOCAL, FULL], tie_word_embeddings=True),
        dict(attention_pattern="gl", rope_base=5e5, rope_local_base=0.0, rope_scaling="none"),
    ),
}


@functools.cache
def reference(name: str):
    """A small random model of transformers."""
    torch.manual_seed(0)
    kind, fields, _ = copy.deepcopy(CASES[name])
    eager = dict(attn_implementation="eager")
    if kind == "Gemma3Images":
        config = transformers.Gemma3Config(text_config=fields, vision_config=VISION, **eager)
        model = transformers.Gemma3ForConditionalGeneration(config)
    else:
        config = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")(**fields, **eager)
        model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config)
    return add_noise(model)


def imported(name: str):
    """(architecture, our config, state dict of numpy arrays without what is not read, our parameters)"""
    model = reference(name)
    architecture = ARCHITECTURES[type(model).__name__]
    config = bind(DecoderConfig, architecture.read_config(model.config.to_dict()), "model")
    renamed = {architecture.rename(key): value.numpy() for key, value in model.state_dict().items()}
    state = {key: value for key, value in renamed.items() if key is not None}
    return architecture, config, state, state_dicts.load(architecture.rules(config), state, config)


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients(name):
    model = reference(name)
    architecture, config, _, params = imported(name)
    is_token, batch = padded_rows()
    expected_output = score_reference(model)
    (loss, logits), grads = loss_logits_and_grads(registry.abstract(config)[0], params, batch)
    expected = expected_output.logits.detach().numpy()[is_token]
    difference = np.abs(np.asarray(logits)[is_token][:, :VOCAB] - expected).max()
    print(f"{name}: logits {np.abs(expected).max():.2f}, differ by {difference:.1e}", end="")
    assert difference <= 2e-4
    assert abs(float(loss) - expected_output.loss.item()) <= 1e-5
    actual = state_dicts.dump(architecture.rules(config), grads, config)
    worst = 0.0
    for key, parameter in model.named_parameters():
        if (key := architecture.rename(key)) is not None:
            gradient = parameter.grad.numpy()
            worst = max(worst, np.abs(actual[key] - gradient).max() / max(np.abs(gradient).max(), 1e-2))
    print(f", gradients by {worst:.1e} of their largest")
    assert worst <= 1e-3


@pytest.mark.parametrize("name", CASES)
def test_tensors_round_trip_bitwise(name):
    architecture, config, state, params = imported(name)
    back = state_dicts.dump(architecture.rules(config), params, config)
    assert set(back) == set(state)
    for key, value in state.items():
        np.testing.assert_array_equal(back[key].view(np.uint32), value.view(np.uint32), err_msg=key)
    assert config.vocab_size < config.padded_vocab, "the padding of the vocabulary is not exported"


@pytest.mark.parametrize("name", [name for name, (kind, _, _) in CASES.items() if kind != "Gemma3Images"])
def test_configs_round_trip(name):
    model = reference(name)
    architecture, config, _, _ = imported(name)
    for field, value in CASES[name][2].items():
        assert getattr(config, field) == value, field
    written = architecture.write_config(config)
    assert bind(DecoderConfig, architecture.read_config(written), "model") == config
    # Their own class reads it, and makes a model of the same logits.
    again = type(model)(type(model.config)(**written, attn_implementation="eager")).eval()
    again.load_state_dict(model.state_dict())
    tokens = torch.tensor(padded_rows()[1].inputs, dtype=torch.long)
    with torch.no_grad():
        np.testing.assert_allclose(again(tokens).logits, model(tokens).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["qwen3-tied", "gemma2", "gemma3", "olmo3"])
def test_greedy_text_equals_transformers(name):
    """Token by token from our cache against their own generation, past the windows."""
    _, config, _, params = imported(name)
    assert_same_greedy_text(reference(name), config, params)


REFUSED = {
    "rope_type='dynamic'": ("llama", dict(rope_parameters=dict(rope_type="dynamic", factor=2.0))),
    "partial_rotary_factor=0.5": ("llama", dict(rope_parameters=dict(partial_rotary_factor=0.5))),
    "hidden_act='swish7'": ("llama", dict(hidden_act="swish7")),
    "no_such_field=3": ("mistral", dict(no_such_field=3)),
    "mlp_bias=True": ("llama", dict(mlp_bias=True)),
    "layer_types holds 'chunked_attention'": ("qwen3", dict(layer_types=["chunked_attention"] * 3)),
    "layer_types has 2 entries for 3 layers": ("olmo3-tied", dict(layer_types=[LOCAL, FULL])),
    "sliding_window=None": ("gemma2", dict(sliding_window=None)),
    "attn_logit_softcapping=5.0": ("gemma3", dict(attn_logit_softcapping=5.0)),
    "use_bidirectional_attention=True": ("gemma3", dict(use_bidirectional_attention=True)),
    "sliding_attention.rope_type='yarn'": ("olmo3", dict(rope_parameters={LOCAL: YARN, FULL: YARN})),
    "scale_attn_by_inverse_layer_idx=True": ("gpt2", dict(scale_attn_by_inverse_layer_idx=True)),
}


@pytest.mark.parametrize("words", REFUSED)
def test_unsupported_fields_are_refused_by_name(words):
    name, fields = REFUSED[words]
    model = reference(name)
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        ARCHITECTURES[type(model).__name__].read_config(model.config.to_dict() | fields)


def test_inexpressible_settings_are_not_exported():
    """Sliding layers whose frequencies are scaled too: in Gemma 3 and OLMo 3 they never are."""
    for name in ("gemma3", "olmo3"):
        architecture, config, _, _ = imported(name)
        with pytest.raises(ValueError, match=r"rope_local_base=0.0: rope_scaling=.* would be lost"):
            architecture.write_config(dataclasses.replace(config, rope_local_base=0.0))


@pytest.mark.parametrize("location", ["nothing", "inner", "beside", "both"])
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Olmo3"])
@pytest.mark.parametrize("scaling", [YARN, LLAMA3], ids=["yarn", "llama3"])
def test_the_length_that_frequencies_are_scaled_from(kind, scaling, location):
    """Which of two fields takes precedence, and the default if both are absent, as in transformers."""
    length = "original_max_position_embeddings"
    inner = {name: value for name, value in scaling.items() if name != length or location in ("inner", "both")}
    hf = SIZES | dict(num_hidden_layers=4, rope_scaling=inner)
    hf |= {length: 64} if location in ("beside", "both") else {}
    name = f"{kind}ForCausalLM"
    config = bind(DecoderConfig, ARCHITECTURES[name].read_config(copy.deepcopy(hf)), "model")
    model = getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**copy.deepcopy(hf)))
    rotary = model.model.rotary_emb
    expected = rotary.full_attention_inv_freq if kind == "Olmo3" else rotary.inv_freq
    actual = frequencies(config.head_size, config.rope_base, config.scaling)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    again = ARCHITECTURES[name].read_config(model.config.to_dict())
    assert bind(DecoderConfig, again, "model").scaling == config.scaling


def test_published_files_of_older_releases_are_read():
    """rope_theta and rope_scaling, rope_local_base_freq and sliding_window_pattern, as on disk for years."""
    read = lambda name, fields: bind(DecoderConfig, ARCHITECTURES[name].read_config(SIZES | fields), "model")
    old = dict(rope_theta=5e5, rope_scaling=LLAMA3, torch_dtype="bfloat16")
    new = dict(rope_parameters=LLAMA3 | dict(rope_theta=5e5))
    assert read("LlamaForCausalLM", old) == read("LlamaForCausalLM", new)
    gemma3 = dict(
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling=dict(rope_type="linear", factor=8.0),
        sliding_window_pattern=6,
        sliding_window=512,
        num_hidden_layers=7,
        cache_implementation="hybrid",
    )
    config = read("Gemma3ForCausalLM", gemma3)
    assert (config.rope_base, config.rope_local_base, config.rope_factor) == (1e6, 1e4, 8.0)
    assert (config.attention_pattern, config.window, config.rope_scaling) == ("lllllg", 512, "linear")
    olmo3 = read("Olmo3ForCausalLM", dict(rope_theta=4e5, rope_scaling=YARN, num_hidden_layers=8))
    old = copy.deepcopy(dict(rope_theta=4e5, rope_scaling=YARN, num_hidden_layers=8))
    olmo3_config = transformers.Olmo3Config(**SIZES | old)
    assert olmo3.rope_base == olmo3_config.rope_parameters[FULL]["rope_theta"] == 4e5
    assert olmo3.rope_local_base == olmo3_config.rope_parameters[LOCAL]["rope_theta"] == 5e5
