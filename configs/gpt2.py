"""GPT-2 (Radford et al., 2019) in its four published sizes, and a tiny one of the same architecture.

llmjax train --config=gpt2 --workdir=runs/gpt2
llmjax train --config=gpt2:124M --workdir=runs/gpt2 --config.data.sources.main.path='/my/texts/**/*.txt'
"""

from ml_collections import ConfigDict

# Fields of the model by size.
SIZES = {
    "tiny": dict(num_layers=4, embed=192, num_heads=6),
    "124M": dict(num_layers=12, embed=768, num_heads=12),
    "355M": dict(num_layers=24, embed=1024, num_heads=16),
    "774M": dict(num_layers=36, embed=1280, num_heads=20),
    "1.5B": dict(num_layers=48, embed=1600, num_heads=25),
}
VOCAB_SIZE = 50_257  # of the published models
# Peak learning rates, after GPT-3's table 2.1 (arXiv 2005.14165).
LEARNING_RATES = {"tiny": 4e-3, "124M": 6e-4, "355M": 3e-4, "774M": 2.5e-4, "1.5B": 2e-4}

# On the validation documents. Learned positions need more steps than rotary ones.
EXPECTED_SCORE = {"tiny": ("bits_per_byte", 2.11)}


def get_config(size: str = "tiny") -> ConfigDict:
    """The model as published; the recipe (AdamW, cosine, half a million tokens a step) is GPT-3's for its size."""
    learning_rate, seq_len = LEARNING_RATES[size], 256 if size == "tiny" else 1024
    c = ConfigDict()
    c.model = dict(
        family="decoder",
        **SIZES[size],
        activation="gelu_tanh",
        gated=False,
        norm="layernorm",
        positions="learned",
        max_positions=seq_len,
        tie_embeddings=True,
        biases="all",
        dtype="bfloat16",
        remat="attention",
    )
    c.data = dict(seq_len=seq_len, sources=dict(main=dict(path="")))
    c.train = dict(steps=100_000, global_batch=512)
    c.optimizer = dict(
        name="adamw", learning_rate=learning_rate, schedule="cosine", warmup_steps=2_000, weight_decay=0.1
    )
    c.mesh = dict(fsdp=0)
    if size == "tiny":
        c.model.update(dtype="float32", remat="none", scan=False)
        c.data.sources = dict(python=dict(path="stdlib:"))
        c.data.tokenizer = dict(kind="sentencepiece", algorithm="bpe", vocab_size=4096)
        c.train = dict(steps=800, global_batch=8, log_every=20)
        c.optimizer = dict(
            name="adamw", learning_rate=learning_rate, schedule="wsd", decay_fraction=0.4, end_fraction=0.02
        )
        c.eval = dict(every=200)
    return c
