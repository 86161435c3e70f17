"""Llama 3 (Llama Team, 2024, arXiv 2407.21783) from 1B to 405B, and a tiny one of the same architecture.

llmjax train --config=llama --workdir=runs/llama
llmjax train --config=llama:1B --workdir=runs/llama --config.data.sources.main.path='/my/texts/**/*.txt'
"""

from ml_collections import ConfigDict

# Fields of the model by size.
SIZES = {
    "tiny": dict(num_layers=4, embed=192, num_heads=6, num_kv_heads=2, mlp=512, tie_embeddings=True),
    "1B": dict(num_layers=16, embed=2048, num_heads=32, num_kv_heads=8, mlp=8192, tie_embeddings=True),
    "8B": dict(num_layers=32, embed=4096, num_heads=32, num_kv_heads=8, mlp=14336, tie_embeddings=False),
    "70B": dict(num_layers=80, embed=8192, num_heads=64, num_kv_heads=8, mlp=28672, tie_embeddings=False),
    "405B": dict(num_layers=126, embed=16384, num_heads=128, num_kv_heads=8, mlp=53248, tie_embeddings=False),
}
VOCAB_SIZE = 128_256  # of the published models
# Sequences per step, peak learning rate (table 3 of the paper) and devices on the mesh axis `tensor`.
RECIPES = {
    "tiny": dict(global_batch=8, learning_rate=3e-3, tensor=1),
    "1B": dict(global_batch=512, learning_rate=3e-4, tensor=1),
    "8B": dict(global_batch=512, learning_rate=3e-4, tensor=1),
    "70B": dict(global_batch=1024, learning_rate=1.5e-4, tensor=8),
    "405B": dict(global_batch=2048, learning_rate=8e-5, tensor=8),
}

EXPECTED_SCORE = {"tiny": ("bits_per_byte", 1.97)}


def get_config(size: str = "tiny") -> ConfigDict:
    """The shapes as published, without the later extension of the rotary frequencies to longer contexts."""
    recipe = RECIPES[size]
    c = ConfigDict()
    c.model = dict(
        family="decoder",
        **SIZES[size],
        activation="silu",
        gated=True,
        norm="rmsnorm",
        positions="rotary",
        rope_base=500_000.0,
        biases="none",
        dtype="bfloat16",
        remat="attention",
    )
    c.data = dict(seq_len=8192, sources=dict(main=dict(path="")))
    c.train = dict(steps=100_000, global_batch=recipe["global_batch"], loss_chunk=512)
    c.optimizer = dict(
        name="adamw",
        learning_rate=recipe["learning_rate"],
        schedule="cosine",
        warmup_steps=2_000,
        weight_decay=0.1,
    )
    c.mesh = dict(fsdp=0, tensor=recipe["tensor"])
    if size == "tiny":
        c.model.update(dtype="float32", remat="none", scan=False, rope_base=1e4)
        c.data.seq_len = 256
        c.data.sources = dict(python=dict(path="stdlib:"))
        c.data.tokenizer = dict(kind="sentencepiece", algorithm="bpe", vocab_size=4096)
        c.train = dict(steps=600, global_batch=recipe["global_batch"], log_every=20)
        c.optimizer = dict(
            name="adamw", learning_rate=recipe["learning_rate"], schedule="wsd", decay_fraction=0.4, end_fraction=0.02
        )
        c.eval = dict(every=200)
    return c
