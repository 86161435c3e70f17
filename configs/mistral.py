"""Mistral 7B (Jiang et al., 2023, arXiv 2310.06825) and NeMo 12B, and a tiny one of the same architecture.

llmjax train --config=mistral --workdir=runs/mistral
llmjax train --config=mistral:7B --workdir=runs/mistral --config.data.sources.main.path='/my/texts/**/*.txt'
"""

from ml_collections import ConfigDict

# Fields of the model by size.
SIZES = {
    "tiny": dict(num_layers=4, embed=192, num_heads=6, num_kv_heads=2, head_dim=32, mlp=512, window=64, rope_base=1e4),
    "7B": dict(
        num_layers=32, embed=4096, num_heads=32, num_kv_heads=8, head_dim=128, mlp=14336, window=4096, rope_base=1e4
    ),
    "12B": dict(
        num_layers=40, embed=5120, num_heads=32, num_kv_heads=8, head_dim=128, mlp=14336, window=0, rope_base=1e6
    ),
}
VOCAB_SIZE = {"7B": 32_000, "12B": 131_072}  # of the published models

EXPECTED_SCORE = {"tiny": ("bits_per_byte", 1.93)}


def get_config(size: str = "tiny") -> ConfigDict:
    """Llama's shapes with a window in every layer of the 7B, as published. No recipe was published; this is Llama's."""
    c = ConfigDict()
    c.model = dict(
        family="decoder",
        **SIZES[size],
        attention_pattern="l",
        tie_embeddings=size == "tiny",
        dtype="bfloat16",
        remat="attention",
    )
    c.data = dict(seq_len=8192, sources=dict(main=dict(path="")))
    c.train = dict(steps=100_000, global_batch=512, loss_chunk=512)
    c.optimizer = dict(name="adamw", learning_rate=3e-4, schedule="cosine", warmup_steps=2_000, weight_decay=0.1)
    c.mesh = dict(fsdp=0)
    if size == "tiny":
        c.model.update(dtype="float32", remat="none", scan=False)
        c.data.seq_len = 256
        c.data.sources = dict(python=dict(path="stdlib:"))
        c.data.tokenizer = dict(kind="sentencepiece", algorithm="bpe", vocab_size=4096)
        c.train = dict(steps=600, global_batch=8, log_every=20)
        c.optimizer = dict(name="adamw", learning_rate=3e-3, schedule="wsd", decay_fraction=0.4, end_fraction=0.02)
        c.eval = dict(every=200)
    return c
