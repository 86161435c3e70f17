"""Qwen3 (Qwen Team, 2025, arXiv 2505.09388), the dense ones from 0.6B to 32B, and a tiny one of the same architecture.

llmjax train --config=qwen3 --workdir=runs/qwen3
llmjax train --config=qwen3:0.6B --workdir=runs/qwen3 --config.data.sources.main.path='/my/texts/**/*.txt'
"""

from ml_collections import ConfigDict

from llmjax.errors import UserError

# layers, embed, heads, kv heads, head width, mlp, head, tensor axis, sequence length
SIZES = {
    "tiny": (4, 192, 6, 2, 32, 512, True, 1, 256),
    "0.6B": (28, 1024, 16, 8, 128, 3072, True, 1, 4096),
    "1.7B": (28, 2048, 16, 8, 128, 6144, True, 1, 4096),
    "4B": (36, 2560, 32, 8, 128, 9728, True, 1, 4096),
    "8B": (36, 4096, 32, 8, 128, 12288, False, 1, 4096),
    "14B": (40, 5120, 40, 8, 128, 17408, False, 1, 4096),
    "32B": (64, 5120, 64, 8, 128, 25600, False, 8, 4096),
}

EXPECTED_SCORE = {"tiny": ("bits_per_byte", 1.95)}


def get_config(size: str = "tiny") -> ConfigDict:
    """The shapes as published: queries and keys normed head by head. No recipe was published; this is Llama's."""
    if size not in SIZES:
        raise UserError(f"--config=qwen3:{size}: no such size; choose one of {', '.join(SIZES)}")
    layers, embed, heads, kv_heads, head_dim, mlp, tied, tensor, seq_len = SIZES[size]
    c = ConfigDict()
    c.model = dict(
        family="decoder",
        num_layers=layers,
        embed=embed,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        qk_norm="head",
        mlp=mlp,
        norm_eps=1e-6,
        rope_base=1e6,
        tie_embeddings=tied,
        dtype="bfloat16",
        remat="attention",
    )
    c.data = dict(seq_len=seq_len, sources=dict(main=dict(path="")))
    c.train = dict(steps=100_000, global_batch=1024)
    c.optimizer = dict(name="adamw", learning_rate=3e-4, schedule="cosine", warmup_steps=2_000, weight_decay=0.1)
    c.mesh = dict(data=1, fsdp=-1, tensor=tensor)
    if size == "tiny":
        c.model.update(dtype="float32", remat="none", scan=False, rope_base=1e4)
        c.data.sources = dict(python=dict(path="stdlib:"))
        c.data.tokenizer = dict(kind="sentencepiece", algorithm="bpe", vocab_size=4096)
        c.train = dict(steps=600, global_batch=8, log_every=20)
        c.optimizer = dict(name="adamw", learning_rate=3e-3, schedule="wsd", decay_fraction=0.4, end_fraction=0.02)
        c.eval = dict(every=200)
    return c
