"""OLMo 2 (OLMo Team, 2024, arXiv 2501.00656) and OLMo 3 (2025, arXiv 2512.13961), and a tiny OLMo 3.

llmjax train --config=olmo --workdir=runs/olmo
llmjax train --config=olmo:2-1B --workdir=runs/olmo --config.data.sources.main.path='/my/texts/**/*.txt'
"""

from ml_collections import ConfigDict

# Fields of the model by size; those of OLMo 2 begin with 2-, those of OLMo 3 with 3-.
SIZES = {
    "tiny": dict(num_layers=4, embed=192, num_heads=6, num_kv_heads=6, mlp=512),
    "2-1B": dict(num_layers=16, embed=2048, num_heads=16, num_kv_heads=16, mlp=8192),
    "2-7B": dict(num_layers=32, embed=4096, num_heads=32, num_kv_heads=32, mlp=11008),
    "2-13B": dict(num_layers=40, embed=5120, num_heads=40, num_kv_heads=40, mlp=13824),
    "2-32B": dict(num_layers=64, embed=5120, num_heads=40, num_kv_heads=8, mlp=27648),
    "3-7B": dict(num_layers=32, embed=4096, num_heads=32, num_kv_heads=32, mlp=11008),
    "3-32B": dict(num_layers=64, embed=5120, num_heads=40, num_kv_heads=8, mlp=27648),
}
VOCAB_SIZE = 100_352  # of the published models
# Sequences per step and peak learning rate.
RECIPES = {
    "tiny": dict(global_batch=8, learning_rate=3e-3),
    "2-1B": dict(global_batch=512, learning_rate=4e-4),
    "2-7B": dict(global_batch=1024, learning_rate=3e-4),
    "2-13B": dict(global_batch=2048, learning_rate=9e-4),
    "2-32B": dict(global_batch=2048, learning_rate=6e-4),
    "3-7B": dict(global_batch=512, learning_rate=3e-4),
    "3-32B": dict(global_batch=1024, learning_rate=6e-4),
}

EXPECTED_SCORE = {"tiny": ("bits_per_byte", 1.89)}


def get_config(size: str = "tiny") -> ConfigDict:
    """Shapes and pretraining recipes as published, without the later extension of the rotary frequencies to longer
    contexts; norms inside the residual, one norm over all queries and one over all keys of a layer."""
    recipe, is_olmo_2 = RECIPES[size], size.startswith("2-")
    c = ConfigDict()
    c.model = dict(
        family="decoder",
        **SIZES[size],
        qk_norm="all",
        norm_eps=1e-6,
        norm_position="inner",
        rope_base=5e5,
        tie_embeddings=False,
        dtype="bfloat16",
        remat="attention",
    )
    if not is_olmo_2:
        c.model.update(window=4096, attention_pattern="lllg")
    c.data = dict(seq_len=4096 if is_olmo_2 else 8192, sources=dict(main=dict(path="")))
    c.train = dict(steps=100_000, global_batch=recipe["global_batch"], loss_chunk=512, z_loss=1e-5)
    c.optimizer = dict(
        name="adamw", learning_rate=recipe["learning_rate"], schedule="cosine", warmup_steps=2_000, weight_decay=0.1
    )
    c.mesh = dict(fsdp=0, tensor=8 if "32B" in size else 1)
    if size == "tiny":
        c.model.update(dtype="float32", remat="none", scan=False, tie_embeddings=True, window=64, rope_base=1e4)
        c.data.seq_len = 256
        c.data.sources = dict(python=dict(path="stdlib:"))
        c.data.tokenizer = dict(kind="sentencepiece", algorithm="bpe", vocab_size=4096)
        c.train = dict(steps=600, global_batch=recipe["global_batch"], log_every=20)
        c.optimizer = dict(
            name="adamw", learning_rate=recipe["learning_rate"], schedule="wsd", decay_fraction=0.4, end_fraction=0.02
        )
        c.eval = dict(every=200)
    return c
