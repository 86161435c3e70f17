"""Mixtures of experts, set up by config, against each model of transformers that they support."""

import copy
import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs `make parity`")
transformers = pytest.importorskip("transformers", reason="parity needs `make parity`")

from llmjax.binding import bind
from llmjax.interop import files
from llmjax.interop.moe import ARCHITECTURES
from llmjax.models import registry
from llmjax.models.moe import MoeConfig
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
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts_per_tok=2,
    pad_token_id=0,
)
LATENT = dict(
    kv_lora_rank=16,
    q_lora_rank=24,
    qk_rope_head_dim=8,
    qk_nope_head_dim=12,
    v_head_dim=20,
    moe_intermediate_size=32,
    n_routed_experts=8,
    first_k_dense_replace=1,
    num_key_value_heads=4,
)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)

# name -> (class of transformers, its config, fields that our config must have)
CASES = {
    "mixtral": ("Mixtral", SIZES | dict(num_local_experts=4), dict(renormalise=True, num_experts=4)),
    "mixtral-window": (
        "Mixtral",
        SIZES | dict(num_local_experts=5, sliding_window=5, tie_word_embeddings=True),
        dict(window=5, tie_embeddings=True),
    ),
    "qwen3": (
        "Qwen3Moe",
        SIZES | dict(num_experts=8, moe_intermediate_size=32, norm_topk_prob=True, head_dim=16),
        dict(qk_norm="head", expert_mlp=32, head_dim=16),
    ),
    "qwen3-dense": (
        "Qwen3Moe",
        SIZES
        | dict(
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=32,
            norm_topk_prob=False,
            num_hidden_layers=3,
            mlp_only_layers=[0],
            attention_bias=True,
        ),
        dict(renormalise=False, dense_layers=1, biases="attention"),
    ),
    "gpt_oss": (
        "GptOss",
        SIZES | dict(num_local_experts=6, num_experts_per_tok=3, head_dim=16, sliding_window=5),
        dict(
            window=5,
            attention_pattern="lg",
            attention_sinks=True,
            rope_scaling="yarn",
            rope_truncate=False,
            biases="all",
        ),
    ),
    "gpt_oss-whole": (
        "GptOss",
        SIZES | dict(num_local_experts=6, head_dim=16, layer_types=["full_attention"] * 2),
        dict(window=0),
    ),
    "deepseek": (
        "DeepseekV3",
        SIZES
        | LATENT
        | dict(
            num_hidden_layers=3,
            n_group=4,
            topk_group=2,
            n_shared_experts=2,
            rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.8),
        ),
        dict(latent=16, query_latent=24, router_groups=4, shared_experts=2, dense_layers=1, rope_scaling="yarn"),
    ),
    "deepseek-plain": (
        "DeepseekV3",
        SIZES | LATENT | dict(q_lora_rank=None, n_group=1, topk_group=1, norm_topk_prob=False),
        dict(query_latent=0, router_groups=1, renormalise=False, score_scale=0.0),
    ),
}


@functools.cache
def reference(name: str):
    """A small random model of transformers."""
    torch.manual_seed(0)
    kind, fields, _ = copy.deepcopy(CASES[name])
    config = getattr(transformers, f"{kind}Config")(
        **fields, attn_implementation="eager", experts_implementation="eager"
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    return add_noise(model)


@functools.cache
def on_disk(name: str, folder) -> dict[str, np.ndarray]:
    """The tensors under the names that they are published by, which are not those that the model has in memory."""
    reference(name).save_pretrained(folder)
    return {key: entry.read() for key, entry in files.read_folder(folder).items()}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """name -> (architecture, our config, tensors on disk, our parameters)"""

    @functools.cache
    def read(name: str):
        model = reference(name)
        architecture = ARCHITECTURES[type(model).__name__]
        config = bind(MoeConfig, architecture.read_config(model.config.to_dict()), "model")
        state = on_disk(name, tmp_path_factory.mktemp(name))
        return architecture, config, state, state_dicts.load(architecture.rules(config), state, config)

    return read


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients(name, imported, tmp_path):
    model = reference(name)
    architecture, config, _, params = imported(name)
    is_token, batch = padded_rows()
    twin = copy.deepcopy(model)
    expected_output = score_reference(twin)
    (loss, logits), grads = loss_logits_and_grads(registry.abstract(config)[0], params, batch)
    expected = expected_output.logits.detach().numpy()[is_token]
    difference = np.abs(np.asarray(logits)[is_token][:, :VOCAB] - expected).max()
    print(f"{name}: logits {np.abs(expected).max():.2f}, differ by {difference:.1e}", end="")
    assert difference <= 5e-4
    assert abs(float(loss) - expected_output.loss.item()) <= 1e-5
    # Saved in place of the weights, their gradients get the published names too.
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(parameter.grad)
    twin.save_pretrained(tmp_path)
    found, worst = state_dicts.dump(architecture.rules(config), grads, config), 0.0
    for key, entry in files.read_folder(tmp_path).items():
        if "correction" not in key:  # a buffer: it has no gradient in either implementation
            gradient = entry.read()
            worst = max(worst, np.abs(found[key] - gradient).max() / max(np.abs(gradient).max(), 1e-2))
    print(f", gradients by {worst:.1e} of their largest")
    assert worst <= 1e-3


@pytest.mark.parametrize("name", CASES)
def test_tensors_round_trip_bitwise(name, imported):
    architecture, config, state, params = imported(name)
    back = state_dicts.dump(architecture.rules(config), params, config)
    assert set(back) - set(state) <= {"lm_head.weight"}  # a tied head is not saved twice
    for key, value in state.items():
        np.testing.assert_array_equal(back[key].view(np.uint32), value.view(np.uint32), err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_configs_round_trip(name, imported):
    model = reference(name)
    architecture, config, _, _ = imported(name)
    for field, value in CASES[name][2].items():
        assert getattr(config, field) == value, field
    written = architecture.write_config(config)
    assert bind(MoeConfig, architecture.read_config(written), "model") == config
    eager = dict(attn_implementation="eager", experts_implementation="eager")
    again = type(model)(type(model.config)(**written, **eager)).eval()
    again.load_state_dict(model.state_dict())
    tokens = torch.tensor(padded_rows()[1].inputs, dtype=torch.long)
    with torch.no_grad():
        np.testing.assert_allclose(again(tokens).logits, model(tokens).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek"])
def test_greedy_text_equals_transformers(name, imported):
    """Token by token from our cache, of latents for deepseek, against their own generation."""
    _, config, _, params = imported(name)
    assert_same_greedy_text(reference(name), config, params)


@pytest.mark.parametrize(
    "rope_fields",
    [
        {},
        dict(rope_theta=5e4, rope_parameters=None),
        dict(rope_scaling={}),
        dict(rope_parameters={}),
        dict(rope_scaling=dict(rope_type="linear", factor=2.0)),
    ],
)
def test_the_frequencies_of_gpt_oss_where_its_config_says_nothing(rope_fields):
    sizes = SIZES | dict(num_local_experts=6)
    full_config = transformers.GptOssConfig(**sizes, **copy.deepcopy(rope_fields)).to_dict()
    read = ARCHITECTURES["GptOssForCausalLM"].read_config
    assert read(sizes | rope_fields) == read(full_config)


REFUSED = {
    "mlp_only_layers=[1]": ("qwen3", dict(mlp_only_layers=[1])),
    "decoder_sparse_step=2": ("qwen3", dict(decoder_sparse_step=2)),
    "swiglu_limit=8.0": ("gpt_oss", dict(swiglu_limit=8.0)),
    "rope_interleave=False": ("deepseek", dict(rope_interleave=False)),
    "scoring_func='softmax'": ("deepseek", dict(scoring_func="softmax")),
    "attention_bias=True": ("deepseek", dict(attention_bias=True)),
    "no_such_field=3": ("mixtral", dict(no_such_field=3)),
}


@pytest.mark.parametrize("words", REFUSED)
def test_unsupported_fields_are_refused_by_name(words):
    name, fields = REFUSED[words]
    model = reference(name)
    with pytest.raises(ValueError, match=words.replace(".", r"\.").replace("[", r"\[")):
        ARCHITECTURES[type(model).__name__].read_config(model.config.to_dict() | fields)
