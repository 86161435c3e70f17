r"""Mixtral 8x7B and 8x22B (Jiang et al., 2024, arXiv 2401.04088), and a tiny one of the same architecture.

llmjax train --config=mixtral --workdir=runs/mixtral
llmjax train --config=mixtral:8x7B --workdir=runs/mixtral \
    --config.data.sources.main.path='/my/texts/**/*.txt'
"""

from ml_collections import ConfigDict

from llmjax.errors import UserError

# layers, embed, heads, kv heads, head width, width of an expert, sequence length
SIZES = {
    "tiny": (4, 192, 6, 2, 32, 256, 256),
    "8x7B": (32, 4096, 32, 8, 128, 14336, 8192),
    "8x22B": (56, 6144, 48, 8, 128, 16384, 8192),
}
# size -> score on the validation split of the standard library, which `make recipes` checks
EXPECTED_SCORE = {"tiny": ("bits_per_byte", 1.96)}


def get_config(size: str = "tiny") -> ConfigDict:
    """The shapes as published: 8 experts a layer, 2 for each token. No recipe was published; this is Llama's."""
    if size not in SIZES:
        raise UserError(f"--config=mixtral:{size}: no such size; choose one of {', '.join(SIZES)}")
    layers, embed, heads, kv_heads, head_dim, mlp, seq_len = SIZES[size]
    c = ConfigDict()
    c.model = dict(
        family="moe",
        num_layers=layers,
        embed=embed,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=mlp,
        num_experts=8,
        experts_per_token=2,
        rope_base=1e4 if size == "tiny" else 1e6,
        dtype="bfloat16",
        remat="attention",
    )
    c.data = dict(seq_len=seq_len, sources=dict(main=dict(path="")))
    c.train = dict(steps=100_000, global_batch=512)
    c.optimizer = dict(name="adamw", learning_rate=3e-4, schedule="cosine", warmup_steps=2_000, weight_decay=0.1)
    c.mesh = dict(data=1, fsdp=-1, tensor=1)
    if size == "tiny":
        c.model.update(dtype="float32", remat="none", scan=False, tie_embeddings=True)
        c.data.sources = dict(python=dict(path="stdlib:"))
        c.data.tokenizer = dict(kind="sentencepiece", algorithm="bpe", vocab_size=4096)
        c.train = dict(steps=600, global_batch=8, log_every=20)
        c.optimizer = dict(name="adamw", learning_rate=3e-3, schedule="wsd", decay_fraction=0.4, end_fraction=0.02)
        c.eval = dict(every=200)
    return c
