"""Qwen3 (Qwen Team, 2025, arXiv 2505.09388), the dense ones from 0.6B to 32B, and a tiny one of the same architecture.

llmjax train --config=qwen3 --workdir=runs/qwen3
llmjax train --config=qwen3:0.6B --workdir=runs/qwen3 --config.data.sources.main.path='/my/texts/**/*.txt'
"""

from ml_collections import ConfigDict

# Fields of the model by size.
SIZES = {
    "tiny": dict(num_layers=4, embed=192, num_heads=6, num_kv_heads=2, head_dim=32, mlp=512, tie_embeddings=True),
    "0.6B": dict(num_layers=28, embed=1024, num_heads=16, num_kv_heads=8, head_dim=128, mlp=3072, tie_embeddings=True),
    "1.7B": dict(num_layers=28, embed=2048, num_heads=16, num_kv_heads=8, head_dim=128, mlp=6144, tie_embeddings=True),
    "4B": dict(num_layers=36, embed=2560, num_heads=32, num_kv_heads=8, head_dim=128, mlp=9728, tie_embeddings=True),
    "8B": dict(num_layers=36, embed=4096, num_heads=32, num_kv_heads=8, head_dim=128, mlp=12288, tie_embeddings=False),
    "14B": dict(num_layers=40, embed=5120, num_heads=40, num_kv_heads=8, head_dim=128, mlp=17408, tie_embeddings=False),
    "32B": dict(num_layers=64, embed=5120, num_heads=64, num_kv_heads=8, head_dim=128, mlp=25600, tie_embeddings=False),
}
VOCAB_SIZE = 151_936  # of the published models

EXPECTED_SCORE = {"tiny": ("bits_per_byte", 1.95)}


def get_config(size: str = "tiny") -> ConfigDict:
    """The shapes as published: queries and keys normed head by head. No recipe was published; this is Llama's."""
    c = ConfigDict()
    c.model = dict(
        family="decoder",
        **SIZES[size],
        qk_norm="head",
        norm_eps=1e-6,
        rope_base=1e6,
        dtype="bfloat16",
        remat="attention",
    )
    c.data = dict(seq_len=4096, sources=dict(main=dict(path="")))
    c.train = dict(steps=100_000, global_batch=1024, loss_chunk=512)
    c.optimizer = dict(name="adamw", learning_rate=3e-4, schedule="cosine", warmup_steps=2_000, weight_decay=0.1)
    c.mesh = dict(fsdp=0, tensor=8 if size == "32B" else 1)
    if size == "tiny":
        c.model.update(dtype="float32", remat="none", scan=False, rope_base=1e4)
        c.data.seq_len = 256
        c.data.sources = dict(python=dict(path="stdlib:"))
        c.data.tokenizer = dict(kind="sentencepiece", algorithm="bpe", vocab_size=4096)
        c.train = dict(steps=600, global_batch=8, log_every=20)
        c.optimizer = dict(name="adamw", learning_rate=3e-3, schedule="wsd", decay_fraction=0.4, end_fraction=0.02)
        c.eval = dict(every=200)
    return c
