"""OLMo 2 (OLMo Team, 2024, arXiv 2501.00656) and OLMo 3 (2025, arXiv 2512.13961), and a tiny OLMo 3.

llmjax train --config=olmo --workdir=runs/olmo
llmjax train --config=olmo:2-1B --workdir=runs/olmo --config.data.sources.main.path='/my/texts/**/*.txt'
"""

from ml_collections import ConfigDict

from llmjax.errors import UserError

# generation, layers, embed, heads, kv heads, mlp, tensor axis, sequence length, sequences a step, peak learning rate
SIZES = {
    "tiny": (3, 4, 192, 6, 6, 512, 1, 256, 8, 3e-3),
    "2-1B": (2, 16, 2048, 16, 16, 8192, 1, 4096, 512, 4e-4),
    "2-7B": (2, 32, 4096, 32, 32, 11008, 1, 4096, 1024, 3e-4),
    "2-13B": (2, 40, 5120, 40, 40, 13824, 1, 4096, 2048, 9e-4),
    "2-32B": (2, 64, 5120, 40, 8, 27648, 8, 4096, 2048, 6e-4),
    "3-7B": (3, 32, 4096, 32, 32, 11008, 1, 8192, 512, 3e-4),
    "3-32B": (3, 64, 5120, 40, 8, 27648, 8, 8192, 1024, 6e-4),
}

EXPECTED_SCORE = {"tiny": ("bits_per_byte", 1.89)}


def get_config(size: str = "tiny") -> ConfigDict:
    """Shapes and pretraining recipes as published, without the later extension of the rotary frequencies to longer
    contexts; norms inside the residual, one norm over all queries and one over all keys of a layer."""
    if size not in SIZES:
        raise UserError(f"--config=olmo:{size}: no such size; choose one of {', '.join(SIZES)}")
    generation, layers, embed, heads, kv_heads, mlp, tensor, seq_len, batch, learning_rate = SIZES[size]
    c = ConfigDict()
    c.model = dict(
        family="decoder",
        num_layers=layers,
        embed=embed,
        num_heads=heads,
        num_kv_heads=kv_heads,
        qk_norm="all",
        mlp=mlp,
        norm_eps=1e-6,
        norm_position="inner",
        rope_base=5e5,
        tie_embeddings=False,
        dtype="bfloat16",
        remat="attention",
    )
    if generation == 3:
        c.model.update(window=4096, attention_pattern="lllg")
    c.data = dict(seq_len=seq_len, sources=dict(main=dict(path="")))
    c.train = dict(steps=100_000, global_batch=batch, z_loss=1e-5)
    c.optimizer = dict(
        name="adamw", learning_rate=learning_rate, schedule="cosine", warmup_steps=2_000, weight_decay=0.1
    )
    c.mesh = dict(data=1, fsdp=-1, tensor=tensor)
    if size == "tiny":
        c.model.update(dtype="float32", remat="none", scan=False, tie_embeddings=True, window=64, rope_base=1e4)
        c.data.sources = dict(python=dict(path="stdlib:"))
        c.data.tokenizer = dict(kind="sentencepiece", algorithm="bpe", vocab_size=4096)
        c.train = dict(steps=600, global_batch=8, log_every=20)
        c.optimizer = dict(
            name="adamw", learning_rate=learning_rate, schedule="wsd", decay_fraction=0.4, end_fraction=0.02
        )
        c.eval = dict(every=200)
    return c
