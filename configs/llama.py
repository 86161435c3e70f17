"""Llama 3 (Llama Team, 2024, arXiv 2407.21783) from 1B to 405B, and a tiny one of the same architecture.

llmjax train --config=llama --workdir=runs/llama
llmjax train --config=llama:1B --workdir=runs/llama --config.data.sources.main.path='/my/texts/**/*.txt'
"""

from ml_collections import ConfigDict

from llmjax.errors import UserError

# layers, embed, heads, kv heads, mlp, head, tensor axis, sequence length, sequences a step, peak learning rate
# (table 3 of the paper)
SIZES = {
    "tiny": (4, 192, 6, 2, 512, True, 1, 256, 8, 3e-3),
    "1B": (16, 2048, 32, 8, 8192, True, 1, 8192, 512, 3e-4),
    "8B": (32, 4096, 32, 8, 14336, False, 1, 8192, 512, 3e-4),
    "70B": (80, 8192, 64, 8, 28672, False, 8, 8192, 1024, 1.5e-4),
    "405B": (126, 16384, 128, 8, 53248, False, 8, 8192, 2048, 8e-5),
}

EXPECTED_SCORE = {"tiny": ("bits_per_byte", 1.97)}


def get_config(size: str = "tiny") -> ConfigDict:
    """The shapes as published, without the later extension of the rotary frequencies to longer contexts."""
    if size not in SIZES:
        raise UserError(f"--config=llama:{size}: no such size; choose one of {', '.join(SIZES)}")
    layers, embed, heads, kv_heads, mlp, tied, tensor, seq_len, batch, learning_rate = SIZES[size]
    c = ConfigDict()
    c.model = dict(
        family="decoder",
        num_layers=layers,
        embed=embed,
        num_heads=heads,
        num_kv_heads=kv_heads,
        mlp=mlp,
        activation="silu",
        gated=True,
        norm="rmsnorm",
        positions="rotary",
        rope_base=500_000.0,
        tie_embeddings=tied,
        biases="none",
        dtype="bfloat16",
        remat="attention",
    )
    c.data = dict(seq_len=seq_len, sources=dict(main=dict(path="")))
    c.train = dict(steps=100_000, global_batch=batch)
    c.optimizer = dict(
        name="adamw",
        learning_rate=learning_rate,
        schedule="cosine",
        warmup_steps=2_000,
        weight_decay=0.1,
    )
    c.mesh = dict(data=1, fsdp=-1, tensor=tensor)
    if size == "tiny":
        c.model.update(dtype="float32", remat="none", scan=False, rope_base=1e4)
        c.data.sources = dict(python=dict(path="stdlib:"))
        c.data.tokenizer = dict(kind="sentencepiece", algorithm="bpe", vocab_size=4096)
        c.train = dict(steps=600, global_batch=8, log_every=20)
        c.optimizer = dict(
            name="adamw", learning_rate=learning_rate, schedule="wsd", decay_fraction=0.4, end_fraction=0.02
        )
        c.eval = dict(every=200)
    return c
