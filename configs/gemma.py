"""Gemma 2 (Gemma Team, 2024, arXiv 2408.00118) and Gemma 3 (2025, arXiv 2503.19786), and a tiny Gemma 3.

llmjax train --config=gemma --workdir=runs/gemma
llmjax train --config=gemma:3-1B --workdir=runs/gemma --config.data.sources.main.path='/my/texts/**/*.txt'
"""

from ml_collections import ConfigDict

# Fields of the model by size; those of Gemma 2 begin with 2-, those of Gemma 3 with 3-.
SIZES = {
    "tiny": dict(num_layers=6, embed=160, num_heads=4, num_kv_heads=1, head_dim=40, mlp=448, window=64),
    "2-2B": dict(num_layers=26, embed=2304, num_heads=8, num_kv_heads=4, head_dim=256, mlp=9216, window=4096),
    "2-9B": dict(num_layers=42, embed=3584, num_heads=16, num_kv_heads=8, head_dim=256, mlp=14336, window=4096),
    "2-27B": dict(num_layers=46, embed=4608, num_heads=32, num_kv_heads=16, head_dim=128, mlp=36864, window=4096),
    "3-270M": dict(num_layers=18, embed=640, num_heads=4, num_kv_heads=1, head_dim=256, mlp=2048, window=512),
    "3-1B": dict(num_layers=26, embed=1152, num_heads=4, num_kv_heads=1, head_dim=256, mlp=6912, window=512),
    "3-4B": dict(num_layers=34, embed=2560, num_heads=8, num_kv_heads=4, head_dim=256, mlp=10240, window=1024),
    "3-12B": dict(num_layers=48, embed=3840, num_heads=16, num_kv_heads=8, head_dim=256, mlp=15360, window=1024),
    "3-27B": dict(num_layers=62, embed=5376, num_heads=32, num_kv_heads=16, head_dim=128, mlp=21504, window=1024),
}
VOCAB_SIZE = {"2-2B": 256_000, "2-9B": 256_000, "2-27B": 256_000} | dict.fromkeys(
    ("3-270M", "3-1B", "3-4B", "3-12B", "3-27B"), 262_144
)  # of the published models
# Attention scores are divided by the square root of this number instead of that of head_dim.
SCORE_DIVISORS = {"2-27B": 144, "3-27B": 168}

EXPECTED_SCORE = {"tiny": ("bits_per_byte", 1.88)}


def get_config(size: str = "tiny") -> ConfigDict:
    """The language models' shapes as published, without the later extension of the rotary frequencies to longer
    contexts. No recipe was published; this is Llama's."""
    c = ConfigDict()
    c.model = dict(
        family="decoder",
        **SIZES[size],
        embed_multiplier=SIZES[size]["embed"] ** 0.5,
        score_scale=SCORE_DIVISORS[size] ** -0.5 if size in SCORE_DIVISORS else 0.0,
        activation="gelu_tanh",
        norm="rmsnorm1p",
        norm_eps=1e-6,
        norm_position="both",
        tie_embeddings=True,
        dtype="bfloat16",
        remat="attention",
    )
    if size.startswith("2-"):
        c.model.update(attention_pattern="lg", score_softcap=50.0, logit_softcap=30.0)
    else:
        c.model.update(attention_pattern="lllllg", qk_norm="head", rope_base=1e6, rope_local_base=1e4)
    c.data = dict(seq_len=8192, sources=dict(main=dict(path="")))
    c.train = dict(steps=100_000, global_batch=512, loss_chunk=512)
    c.optimizer = dict(name="adamw", learning_rate=3e-4, schedule="cosine", warmup_steps=2_000, weight_decay=0.1)
    c.mesh = dict(fsdp=0, tensor=8 if "27B" in size else 1)
    if size == "tiny":
        c.model.update(dtype="float32", remat="none", scan=False)
        c.data.seq_len = 256
        c.data.sources = dict(python=dict(path="stdlib:"))
        c.data.tokenizer = dict(kind="sentencepiece", algorithm="bpe", vocab_size=4096)
        c.train = dict(steps=600, global_batch=8, log_every=20)
        c.optimizer = dict(name="adamw", learning_rate=3e-3, schedule="wsd", decay_fraction=0.4, end_fraction=0.02)
        c.eval = dict(every=200)
    return c
