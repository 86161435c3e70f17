"""config.json as published for every model of README's table: the field names are the real ones, the sizes small."""

import json
import pathlib

from etils import epath
import pytest

from llmjax.binding import bind
from llmjax.cli import main
from llmjax.errors import UserError
from llmjax.interop import folder
from llmjax.interop.architectures import ARCHITECTURES, FAMILIES, OLD_NAMES
from llmjax.interop.mapping import InMemory
from llmjax.models import registry
from tests.interop import published

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
}
IDS = {"bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    **SIZES,
    **IDS,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5,
    "model_type": "gpt2",
    "n_ctx": 32,
    "n_embd": 16,
    "n_head": 2,
    "n_layer": 2,
    "n_positions": 32,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 64,
}
MISTRAL = {
    **SIZES,
    **IDS,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_act": "silu",
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
}
QWEN3 = {
    **SIZES,
    **IDS,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_window_layers": 28,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
GEMMA2 = {
    **SIZES,
    **IDS,
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 8,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": 16,
}
GEMMA3 = {
    **SIZES,
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 8,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 8,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 16,
    "sliding_window_pattern": 6,
}
GEMMA3_IMAGES = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 16,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "vision_use_head": False},
}
OLMO2 = {
    **LLAMA,
    "_name_or_path": "olmo",
    "architectures": ["Olmo2ForCausalLM"],
    "model_type": "olmo2",
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000,
}
OLMO3 = {
    **OLMO2,
    "architectures": ["Olmo3ForCausalLM"],
    "model_type": "olmo3",
    "layer_types": [*["sliding_attention"] * 3, "full_attention"],
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    "sliding_window": 16,
}
MIXTRAL = {
    **MISTRAL,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "attention_dropout": 0.0,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "output_router_logits": False,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
}
QWEN3_MOE = {
    **QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 8,
    "norm_topk_prob": True,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}
GPT_OSS = {
    **SIZES,
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "initial_context_length": 4096,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {"modules_to_not_convert": ["model.layers.*.self_attn"], "quant_method": "mxfp4"},
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 16,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
}
DEEPSEEK = {
    **SIZES,
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "kv_lora_rank": 8,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 8,
    "moe_layer_freq": 1,
    "n_group": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 8,
}
BERT = {
    **SIZES,
    "architectures": ["BertForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "layer_norm_eps": 1e-12,
    "model_type": "bert",
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
}
MODERNBERT = {
    **SIZES,
    "architectures": ["ModernBertForMaskedLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 50281,
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "classifier_dropout": 0.0,
    "classifier_pooling": "mean",
    "cls_token_id": 50281,
    "decoder_bias": True,
    "deterministic_flash_attn": False,
    "embedding_dropout": 0.0,
    "eos_token_id": 50282,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "gradient_checkpointing": False,
    "hidden_activation": "gelu",
    "initializer_cutoff_factor": 2.0,
    "layer_norm_eps": 1e-5,
    "local_attention": 128,
    "local_rope_theta": 10000.0,
    "mlp_bias": False,
    "mlp_dropout": 0.0,
    "model_type": "modernbert",
    "norm_bias": False,
    "norm_eps": 1e-5,
    "pad_token_id": 50283,
    "position_embedding_type": "absolute",
    "reference_compile": None,
    "repad_logits_with_grad": False,
    "sep_token_id": 50282,
    "sparse_pred_ignore_index": -100,
    "sparse_prediction": False,
    "tie_word_embeddings": True,
}
T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 24,
    "d_kv": 8,
    "d_model": 16,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-6,
    "model_type": "t5",
    "n_positions": 512,
    "num_heads": 2,
    "num_layers": 2,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "task_specific_params": {"summarization": {"early_stopping": True, "num_beams": 4, "prefix": "summarize: "}},
    "vocab_size": 64,
}
FLAN = {
    **T5,
    "feed_forward_proj": "gated-gelu",
    "is_gated_act": True,
    "num_decoder_layers": 2,
    "relative_attention_max_distance": 128,
    "tie_word_embeddings": False,
    "transformers_version": "4.23.1",
    "use_cache": True,
}
SMOLLM2 = {
    **LLAMA,
    "is_llama_config": True,
    "mlp_bias": False,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
}
LABELS = {"_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
PUBLISHED = {
    "GPT-2 124M": GPT2,
    "GPT-2 355M": {**GPT2, "n_special": 0, "predict_special_tokens": True},
    "GPT-2 1.5B": {**GPT2, "output_past": True},
    "DistilGPT-2": {**GPT2, **LABELS, "_name_or_path": "distilgpt2", "gradient_checkpointing": False},
    "Llama 1": {**LLAMA, "max_sequence_length": 2048, "pad_token_id": 0},
    "Llama 2": {**LLAMA, "_name_or_path": "llama", "num_key_value_heads": 1},
    "Llama 3.2": {
        **LLAMA,
        "eos_token_id": [1, 2, 3],
        "head_dim": 8,
        "mlp_bias": False,
        "rope_scaling": LLAMA3_ROPE,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "Llama 3.2, fine-tuned": {**LLAMA, "unsloth_fixed": True, "unsloth_version": "2025.3.3", "pad_token_id": 4},
    "SmolLM2": SMOLLM2,
    "Mistral 7B": MISTRAL,
    "Mistral NeMo": {**MISTRAL, "attention_dropout": 0.0, "head_dim": 8, "sliding_window": None},
    "Qwen3": QWEN3,
    "Gemma 2": GEMMA2,
    "Gemma 2 9B": {**GEMMA2, "sliding_window_size": 16},
    "Gemma 3 1B": GEMMA3,
    "Gemma 3 270M": {
        **{name: value for name, value in GEMMA3.items() if name != "sliding_window_pattern"},
        "_sliding_window_pattern": 6,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "use_bidirectional_attention": False,
    },
    "Gemma 3 4B": GEMMA3_IMAGES,
    "OLMo 2": OLMO2,
    "OLMo 3": OLMO3,
    "Mixtral": MIXTRAL,
    "Qwen3-MoE": QWEN3_MOE,
    "Qwen3-Coder": {**QWEN3_MOE, "qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True},
    "gpt-oss": GPT_OSS,
    "DeepSeek-V3": DEEPSEEK,
    "Moonlight": {
        **{name: value for name, value in DEEPSEEK.items() if name != "quantization_config"},
        "aux_loss_alpha": 0.001,
        "n_group": 1,
        "num_nextn_predict_layers": 0,
        "pretraining_tp": 1,
        "q_lora_rank": None,
        "rope_scaling": None,
        "seq_aux": True,
    },
    "BERT": BERT,
    "BERT, multilingual": {
        **BERT,
        "directionality": "bidi",
        "pooler_fc_size": 768,
        "pooler_num_attention_heads": 12,
        "pooler_num_fc_layers": 3,
        "pooler_size_per_head": 128,
        "pooler_type": "first_token_transform",
    },
    "ModernBERT": MODERNBERT,
    "T5": T5,
    "T5 3B": {**T5, "architectures": ["T5WithLMHeadModel"]},
    "Flan-T5": FLAN,
}
# What save_pretrained of older releases wrote of its base class, whatever the model.
KEPT_BY_THE_BASE_CLASS = {
    "_attn_implementation_autoset": True,
    "_commit_hash": "4e20de36",
    "attn_implementation": "sdpa",
    "bad_words_ids": [[3]],
    "begin_suppress_tokens": [1],
    "diversity_penalty": 0.0,
    "do_sample": True,
    "encoder_no_repeat_ngram_size": 0,
    "finetuning_task": "text",
    "length_penalty": 2.0,
    "max_length": 20,
    "name_or_path": "a/model",
    "num_beams": 4,
    "num_return_sequences": 1,
    "output_scores": False,
    "prefix": "summarize: ",
    "problem_type": "single_label_classification",
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.1,
    "temperature": 0.7,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "top_k": 50,
    "top_p": 0.9,
    "torchscript": False,
    "typical_p": 1.0,
    "use_bfloat16": False,
}


class Stored:
    """A Source that claims to hold as many numbers as any model of this file needs."""

    def shapes(self):
        return {"x": (1 << 24,)}

    def read(self, name, box):
        raise NotImplementedError


def checkpoint(hf: dict, tensors=None) -> folder.Checkpoint:
    name = OLD_NAMES.get(hf["architectures"][0], hf["architectures"][0])
    family = next(family for family, known in FAMILIES.items() if name in known)
    return folder.Checkpoint(pathlib.Path("in"), hf, name, family, ARCHITECTURES[name], tensors or Stored())


def read_config(hf: dict):
    """The model that a config.json describes."""
    found = checkpoint(hf)
    return bind(registry.config_class(found.family), found.architecture.read_config(hf), "model")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_fields_are_accepted(name):
    hf = json.loads(json.dumps(PUBLISHED[name]))
    model = read_config(hf)
    text = hf.get("text_config", hf)
    assert model.embed == text.get("hidden_size", text.get("n_embd", text.get("d_model")))
    assert read_config({**KEPT_BY_THE_BASE_CLASS, **hf}) == model


def test_every_class_has_a_published_config():
    classes = {hf["architectures"][0] for hf in PUBLISHED.values()}
    assert set(ARCHITECTURES) - classes == {"BertForPreTraining"}  # refused on purpose


REFUSED = {
    "is_llama_config=False": {"is_llama_config": False},
    "rope_interleaved=True": {"rope_interleaved": True},
    "pruned_heads={'0': [1]}": {"pruned_heads": {"0": [1]}},
    "tie_encoder_decoder=True": {"tie_encoder_decoder": True},
    "clip_qkv=8.0 is not a known field": {"clip_qkv": 8.0},
    "rope_scaling.new=1 is not a known field": {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "new": 1}},
    r"'new\nfield'=1 is not a known field": {"new\nfield": 1},
}


@pytest.mark.parametrize("words", REFUSED)
def test_fields_that_may_change_numbers_are_refused(words):
    with pytest.raises(UserError) as error:
        read_config({**LLAMA, **REFUSED[words]})
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("base", "field", "change"),
    [
        (LLAMA, "clip_qkv", {"clip_qkv": 8.0}),
        (LLAMA, "a.dotted.name", {"a.dotted.name": 1}),
        (LLAMA, "rope_scaling.new", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "new": 1}}),
        (OLMO3, "rope_scaling.new", {"rope_scaling": {**OLMO3["rope_scaling"], "new": 1}}),
        (GEMMA3_IMAGES, "new", {"new": 1}),
        (GEMMA3_IMAGES, "new", {"text_config": {**GEMMA3_IMAGES["text_config"], "new": 1}}),
    ],
)
def test_an_unknown_field_is_accepted_by_name(base, field, change):
    hf = {**base, **change}
    with pytest.raises(UserError, match=f"--ignore={field}"):
        checkpoint(hf).read_model()
    without = {**base, **{name: value for name, value in change.items() if name in base and field != name}}
    for section in ("rope_scaling", "text_config"):
        if isinstance(without.get(section), dict):
            without[section] = {name: value for name, value in without[section].items() if name != "new"}
    assert checkpoint(hf).read_model([field]) == checkpoint(without).read_model()


@pytest.mark.parametrize("field", ["num_hidden_layers", "mlp_bias", "auto_map", "typo"])
def test_ignore_is_for_unknown_fields_alone(field):
    """A known field cannot be switched off, and a name that is not there is a mistake."""
    with pytest.raises(UserError, match=f"--ignore={field}: config.json has no unknown field of this name"):
        checkpoint({**LLAMA, "mlp_bias": False, "auto_map": {}}).read_model([field])


BAD_NUMBERS = [0, -1, True, 2.5, 1e30, 10**9, 10**400, float("nan"), float("inf"), "8", [8], {}]
SIZE_FIELDS = {
    "Llama 2": [*(name for name in SIZES if "_size" in name or "num_" in name), "num_key_value_heads"],
    "GPT-2 124M": ["vocab_size", "n_embd", "n_head", "n_layer", "n_positions", "n_inner"],
    "Mixtral": ["num_local_experts", "num_experts_per_tok", "sliding_window"],
    "Qwen3-MoE": ["num_experts", "moe_intermediate_size"],
    "DeepSeek-V3": ["kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "n_group", "n_shared_experts"],
    "BERT": ["num_hidden_layers", "max_position_embeddings", "type_vocab_size"],
    "ModernBERT": ["num_hidden_layers", "local_attention", "global_attn_every_n_layers"],
    "T5": ["d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets"],
}


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in SIZE_FIELDS.items() for field in fields])
def test_sizes_are_bounded(name, field):
    """One line that names the field, before anything is allocated; where a size may be absent, 0 is its default."""
    optional = {
        "num_key_value_heads",
        "n_inner",
        "sliding_window",
        "q_lora_rank",
        "n_shared_experts",
        "type_vocab_size",
    }
    for value in BAD_NUMBERS[field in optional :]:
        with pytest.raises(UserError) as error:
            read_config({**PUBLISHED[name], field: value})
        assert str(error.value).startswith(f"config.json: {field}=") and "\n" not in str(error.value)
        assert len(str(error.value)) < 300


@pytest.mark.parametrize("value", [-1.0, True, float("nan"), float("inf"), 1e300, "x"])
@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta"])
def test_numbers_are_finite(field, value):
    with pytest.raises(UserError, match=f"config.json: {field}="):
        read_config({**LLAMA, field: value})


def test_sizes_that_the_files_cannot_fill_are_refused():
    """Each size is within its bounds; together they would need a petabyte."""
    sizes = {"vocab_size": 1 << 23, "hidden_size": 1 << 20, "num_hidden_layers": 4096, "intermediate_size": 1 << 22}
    with pytest.raises(
        UserError, match=r"config.json: its sizes \(vocab_size=8388608, hidden_size=1048576.* the files"
    ):
        checkpoint({**LLAMA, **sizes}, InMemory({})).read_model()


def test_ignored_fields_are_recorded(tmp_path):
    hf = {**published.LLAMA, "clip_qkv": 8.0, "transformers.js_config": {}}
    source = published.write_folder(tmp_path / "in", hf, published.random_tensors(published.llama_shapes()))
    arguments = ["import", f"--from={source}", f"--workdir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match="--ignore=clip_qkv"):
        main.run(arguments)
    assert main.run([*arguments, "--ignore=clip_qkv"]) == 0
    record = json.loads((tmp_path / "run" / "import.json").read_text())
    assert record["ignored"] == ["clip_qkv"] and record["architecture"] == "LlamaForCausalLM"


def test_the_published_cases(tmp_path, shared_data):
    """SmolLM2's folder, and the fields of neutral-fields.json in the config.json of their class."""
    case = shared_data / "cases" / "neutral-fields"
    if not case.is_dir():
        pytest.skip(f"no {case}")
    assert main.run(["import", f"--from={case / 'smollm2'}", f"--workdir={tmp_path / 'run'}"]) == 0
    assert epath.Path(tmp_path / "run" / "import.json").exists()
    bases = {"LlamaForCausalLM": LLAMA, "GPT2LMHeadModel": GPT2, "DeepseekV3ForCausalLM": DEEPSEEK}
    for entry in json.loads((shared_data / "cases" / "neutral-fields.json").read_text()).values():
        base = bases[entry["architecture"]]
        assert read_config({**base, **entry["fields"]}) == read_config(base)
