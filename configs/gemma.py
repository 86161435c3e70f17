"""Gemma 2 (Gemma Team, 2024, arXiv 2408.00118) and Gemma 3 (2025, arXiv 2503.19786), and a tiny Gemma 3.

llmjax train --config=gemma --workdir=runs/gemma
llmjax train --config=gemma:3-1B --workdir=runs/gemma --config.data.sources.main.path='/my/texts/**/*.txt'
"""

from ml_collections import ConfigDict

from llmjax.errors import UserError

# generation, layers, embed, heads, kv heads, head width, mlp, window, number whose root divides the scores,
# tensor axis, sequence length
SIZES = {
    "tiny": (3, 6, 160, 4, 1, 40, 448, 64, 40, 1, 256),
    "2-2B": (2, 26, 2304, 8, 4, 256, 9216, 4096, 256, 1, 8192),
    "2-9B": (2, 42, 3584, 16, 8, 256, 14336, 4096, 256, 1, 8192),
    "2-27B": (2, 46, 4608, 32, 16, 128, 36864, 4096, 144, 8, 8192),
    "3-270M": (3, 18, 640, 4, 1, 256, 2048, 512, 256, 1, 8192),
    "3-1B": (3, 26, 1152, 4, 1, 256, 6912, 512, 256, 1, 8192),
    "3-4B": (3, 34, 2560, 8, 4, 256, 10240, 1024, 256, 1, 8192),
    "3-12B": (3, 48, 3840, 16, 8, 256, 15360, 1024, 256, 1, 8192),
    "3-27B": (3, 62, 5376, 32, 16, 128, 21504, 1024, 168, 8, 8192),
}

EXPECTED_SCORE = {"tiny": ("bits_per_byte", 1.88)}


def get_config(size: str = "tiny") -> ConfigDict:
    """The language models' shapes as published, without the later extension of the rotary frequencies to longer
    contexts. No recipe was published; this is Llama's."""
    if size not in SIZES:
        raise UserError(f"--config=gemma:{size}: no such size; choose one of {', '.join(SIZES)}")
    generation, layers, embed, heads, kv_heads, head_dim, mlp, window, scalar, tensor, seq_len = SIZES[size]
    c = ConfigDict()
    c.model = dict(
        family="decoder",
        num_layers=layers,
        embed=embed,
        embed_multiplier=embed**0.5,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        score_scale=0.0 if scalar == head_dim else scalar**-0.5,
        window=window,
        mlp=mlp,
        activation="gelu_tanh",
        norm="rmsnorm1p",
        norm_eps=1e-6,
        norm_position="both",
        tie_embeddings=True,
        dtype="bfloat16",
        remat="attention",
    )
    if generation == 2:
        c.model.update(attention_pattern="lg", score_softcap=50.0, logit_softcap=30.0)
    else:
        c.model.update(attention_pattern="lllllg", qk_norm="head", rope_base=1e6, rope_local_base=1e4)
    c.data = dict(seq_len=seq_len, sources=dict(main=dict(path="")))
    c.train = dict(steps=100_000, global_batch=512)
    c.optimizer = dict(name="adamw", learning_rate=3e-4, schedule="cosine", warmup_steps=2_000, weight_decay=0.1)
    c.mesh = dict(data=1, fsdp=-1, tensor=tensor)
    if size == "tiny":
        c.model.update(dtype="float32", remat="none", scan=False)
        c.data.sources = dict(python=dict(path="stdlib:"))
        c.data.tokenizer = dict(kind="sentencepiece", algorithm="bpe", vocab_size=4096)
        c.train = dict(steps=600, global_batch=8, log_every=20)
        c.optimizer = dict(name="adamw", learning_rate=3e-3, schedule="wsd", decay_fraction=0.4, end_fraction=0.02)
        c.eval = dict(every=200)
    return c
