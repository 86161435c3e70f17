"""config.json as published for every model of README's table: the field names are the real ones, the sizes small."""

import json
import pathlib

from etils import epath
import pytest

from llmjax.binding import bind
from llmjax.cli import main
from llmjax.errors import UserError
from llmjax.interop import hf_checkpoint
from llmjax.interop.hf_checkpoint import ARCHITECTURES, FAMILIES, OLD_NAMES
from llmjax.models import registry
from tests.interop import published
from tests.interop.published_decoders import (
    GEMMA2,
    GEMMA3,
    GEMMA3_IMAGES,
    GPT2,
    LLAMA,
    LLAMA3_ROPE,
    MISTRAL,
    OLMO2,
    OLMO3,
    QWEN3,
    SIZES,
)
from tests.interop.published_others import BERT, DEEPSEEK, FLAN, GPT_OSS, MIXTRAL, MODERNBERT, QWEN3_MOE, SMOLLM2, T5
from tests.interop.state_dicts import InMemory

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


def checkpoint(hf: dict, tensors=None) -> hf_checkpoint.Checkpoint:
    name = OLD_NAMES.get(hf["architectures"][0], hf["architectures"][0])
    family = next(family for family, classes in FAMILIES.items() if name in classes)
    return hf_checkpoint.Checkpoint(pathlib.Path("in"), hf, name, family, ARCHITECTURES[name], tensors or Stored())


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
    assert {name for name, architecture in ARCHITECTURES.items() if not architecture.base} <= classes


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
    """A known field cannot be ignored, and neither can an absent one."""
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
