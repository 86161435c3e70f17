"""Small folders as others publish them: config.json, tensors in their names and layouts, a tokenizer."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from llmjax.interop import files

VOCAB, EMBED, LAYERS, HEADS, KV_HEADS, MLP = 300, 32, 3, 4, 2, 48
HEAD_DIM = EMBED // HEADS
TEXT = "def main(argv):\n    return [argument for argument in argv if argument]\n" * 20

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": EMBED,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": MLP,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": VOCAB,
    "n_embd": EMBED,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 64,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "eos_token_id": 2,
}


def llama_shapes(tied: bool = False) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, EMBED)}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}."
        shapes |= {
            f"{block}input_layernorm.weight": (EMBED,),
            f"{block}self_attn.q_proj.weight": (HEADS * HEAD_DIM, EMBED),
            f"{block}self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, EMBED),
            f"{block}self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, EMBED),
            f"{block}self_attn.o_proj.weight": (EMBED, HEADS * HEAD_DIM),
            f"{block}post_attention_layernorm.weight": (EMBED,),
            f"{block}mlp.gate_proj.weight": (MLP, EMBED),
            f"{block}mlp.up_proj.weight": (MLP, EMBED),
            f"{block}mlp.down_proj.weight": (EMBED, MLP),
        }
    shapes["model.norm.weight"] = (EMBED,)
    return shapes if tied else shapes | {"lm_head.weight": (VOCAB, EMBED)}


def gpt2_shapes() -> dict[str, tuple[int, ...]]:
    """As first published: without the prefix, and with the causal mask as a buffer."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (VOCAB, EMBED), "wpe.weight": (64, EMBED)}
    for layer in range(LAYERS):
        linear = {
            "attn.c_attn": (EMBED, 3 * EMBED),
            "attn.c_proj": (EMBED, EMBED),
            "mlp.c_fc": (EMBED, 4 * EMBED),
            "mlp.c_proj": (4 * EMBED, EMBED),
        }
        for name, shape in linear.items():
            shapes |= {f"h.{layer}.{name}.weight": shape, f"h.{layer}.{name}.bias": shape[1:]}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{layer}.{name}.weight": (EMBED,), f"h.{layer}.{name}.bias": (EMBED,)}
        shapes[f"h.{layer}.attn.bias"] = (1, 1, 64, 64)
    return shapes | {"ln_f.weight": (EMBED,), "ln_f.bias": (EMBED,)}


def random_tensors(shapes: dict[str, tuple[int, ...]], dtype: str = "F32", seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: (0.1 * rng.standard_normal(shape)).astype(files.TYPES[dtype]) for name, shape in shapes.items()}


def write_tensors(folder: Path, tensors: dict[str, np.ndarray], limit: int = 10**9) -> None:
    names = {dtype: name for name, dtype in files.TYPES.items()}
    specs = {name: (names[tensor.dtype], tensor.shape) for name, tensor in tensors.items()}
    files.write_folder(folder, specs, lambda name: tensors[name], limit=limit)


def write_tokenizer(folder: Path, special: tuple[str, ...] = ("<unk>", "<s>", "</s>")) -> None:
    """A byte-level BPE of 300 ids at most, the special ones first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"<s>": "bos_token", "</s>": "eos_token", "<unk>": "unk_token", "<pad>": "pad_token"}
    roles |= {
        "[CLS]": "cls_token",
        "[SEP]": "sep_token",
        "[MASK]": "mask_token",
        "[PAD]": "pad_token",
        "[UNK]": "unk_token",
    }
    names: dict[str, str | bool] = {roles[name]: name for name in special if name in roles}
    if "<extra_id_0>" in special:
        names["add_eos_token"] = True  # as T5's own
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))


def write_folder(folder: Path, hf: dict, tensors: dict[str, np.ndarray], *, limit: int = 10**9) -> Path:
    """Write a complete folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf))
    write_tensors(folder, tensors, limit)
    write_tokenizer(folder)
    return folder


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: entry.read() for name, entry in files.read_folder(folder).items()}


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
