"""Mistral 7B (Jiang et al., 2023, arXiv 2310.06825) and NeMo 12B, and a tiny one of the same architecture.

llmjax train --config=mistral --workdir=runs/mistral
llmjax train --config=mistral:7B --workdir=runs/mistral --config.data.sources.main.path='/my/texts/**/*.txt'
"""

from ml_collections import ConfigDict

from llmjax.errors import UserError

# layers, embed, heads, kv heads, head width, mlp, window, rotary base, sequence length
SIZES = {
    "tiny": (4, 192, 6, 2, 32, 512, 64, 1e4, 256),
    "7B": (32, 4096, 32, 8, 128, 14336, 4096, 1e4, 8192),
    "12B": (40, 5120, 32, 8, 128, 14336, 0, 1e6, 8192),
}

EXPECTED_SCORE = {"tiny": ("bits_per_byte", 1.93)}


def get_config(size: str = "tiny") -> ConfigDict:
    """Llama's shapes with a window in every layer of the 7B, as published. No recipe was published; this is Llama's."""
    if size not in SIZES:
        raise UserError(f"--config=mistral:{size}: no such size; choose one of {', '.join(SIZES)}")
    layers, embed, heads, kv_heads, head_dim, mlp, window, base, seq_len = SIZES[size]
    c = ConfigDict()
    c.model = dict(
        family="decoder",
        num_layers=layers,
        embed=embed,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=mlp,
        window=window,
        attention_pattern="l",
        rope_base=base,
        tie_embeddings=size == "tiny",
        dtype="bfloat16",
        remat="attention",
    )
    c.data = dict(seq_len=seq_len, sources=dict(main=dict(path="")))
    c.train = dict(steps=100_000, global_batch=512)
    c.optimizer = dict(name="adamw", learning_rate=3e-4, schedule="cosine", warmup_steps=2_000, weight_decay=0.1)
    c.mesh = dict(data=1, fsdp=-1, tensor=1)
    if size == "tiny":
        c.model.update(dtype="float32", remat="none", scan=False)
        c.data.sources = dict(python=dict(path="stdlib:"))
        c.data.tokenizer = dict(kind="sentencepiece", algorithm="bpe", vocab_size=4096)
        c.train = dict(steps=600, global_batch=8, log_every=20)
        c.optimizer = dict(name="adamw", learning_rate=3e-3, schedule="wsd", decay_fraction=0.4, end_fraction=0.02)
        c.eval = dict(every=200)
    return c
