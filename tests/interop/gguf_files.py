"""Small GGUF files as llama.cpp's converter writes them, and tokenizers as their metadata hold them."""

import io
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.interop import published

TOKENIZER = "tokenizer.ggml."


def byte_level(
    special: tuple[str, ...] = ("<unk>", "<s>", "</s>"), pre: str = "gpt-2", folder: Any = None
) -> dict[str, Any]:
    """The metadata of the byte-level BPE of `published.write_tokenizer`, whose special tokens come first."""
    import json

    published.write_tokenizer(folder, special)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    types = [3 if token in special else 1 for token in tokens]
    merges = [" ".join(merge) for merge in model["merges"]]
    fields = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": merges}
    return {f"{TOKENIZER}{name}": value for name, value in fields.items()}


def sentencepiece(kind: str) -> tuple[bytes, dict[str, Any]]:
    """(a SentencePiece model with a dummy prefix, its metadata): BPE for llama, Unigram for t5."""
    import sentencepiece as library
    from sentencepiece import sentencepiece_model_pb2

    message: Any = sentencepiece_model_pb2
    model = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter([published.TEXT, "Ünï cödé text, and numbers 1234"]),
        model_writer=model,
        model_type={"llama": "bpe", "t5": "unigram"}[kind],
        vocab_size=published.VOCAB,
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=["<user>"],
        minloglevel=2,
    )
    proto = message.ModelProto.FromString(model.getvalue())
    fields = {
        "model": kind,
        "tokens": [piece.piece for piece in proto.pieces],
        "scores": [piece.score for piece in proto.pieces],
        "token_type": [piece.type for piece in proto.pieces],
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "remove_extra_whitespaces": proto.normalizer_spec.remove_extra_whitespaces,
        "precompiled_charsmap": list(proto.normalizer_spec.precompiled_charsmap),
    }
    return model.getvalue(), {f"{TOKENIZER}{name}": value for name, value in fields.items()}


def write(path: Path, arch: str, metadata: dict[str, Any], tensors: dict[str, np.ndarray], kinds: Any = None) -> Path:
    """Write a file; `kinds` names the quantization of tensors by name."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            types = gguf.GGUFValueType
            kind = {bool: types.BOOL, int: types.UINT32, float: types.FLOAT32, str: types.STRING}[type(value)]
            writer.add_key_value(key, value, kind)
    for name, tensor in tensors.items():
        kind = (kinds or {}).get(name)
        writer.add_tensor(name, tensor if kind is None else gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LLAMA = {
    "llama.block_count": published.LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": published.EMBED,
    "llama.feed_forward_length": published.MLP,
    "llama.attention.head_count": published.HEADS,
    "llama.attention.head_count_kv": published.KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10_000.0,
    "llama.rope.dimension_count": published.HEAD_DIM,
    "llama.vocab_size": published.VOCAB,
}
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def store_llama(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a Llama by their names in GGUF, with the rows of queries and keys in llama.cpp's order."""
    stored = {}
    for name, tensor in tensors.items():
        parts = name.removesuffix(".weight").split(".", 3)
        if len(parts) == 4:
            tensor = _interleave(tensor) if parts[3] in ("self_attn.q_proj", "self_attn.k_proj") else tensor
            stored[f"blk.{parts[2]}.{_NAMES[parts[3]]}.weight"] = tensor
        else:
            names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
            stored[f"{names[name.removesuffix('.weight')]}.weight"] = tensor
    return stored


def _interleave(weight: np.ndarray) -> np.ndarray:
    """Row by row: row i of the first half of a head goes to 2 i, and row i of the second half to 2 i + 1."""
    out, half = np.empty_like(weight), published.HEAD_DIM // 2
    for head in range(len(weight) // published.HEAD_DIM):
        first = head * published.HEAD_DIM
        for i in range(half):
            out[first + 2 * i] = weight[first + i]
            out[first + 2 * i + 1] = weight[first + half + i]
    return out
