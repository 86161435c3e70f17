"""GPT-2 (Radford et al., 2019) in its four published sizes, and a tiny one of the same architecture.

llmjax train --config=gpt2 --workdir=runs/gpt2
llmjax train --config=gpt2:124M --workdir=runs/gpt2 --config.data.sources.main.path='/my/texts/**/*.txt'
"""

from ml_collections import ConfigDict

from llmjax.errors import UserError

# layers, embed, heads, peak learning rate (after GPT-3's table 2.1, arXiv 2005.14165)
SIZES = {
    "tiny": (4, 192, 6, 4e-3),
    "124M": (12, 768, 12, 6e-4),
    "355M": (24, 1024, 16, 3e-4),
    "774M": (36, 1280, 20, 2.5e-4),
    "1.5B": (48, 1600, 25, 2e-4),
}

# On the validation documents. Learned positions need more steps than rotary ones.
EXPECTED_SCORE = {"tiny": ("bits_per_byte", 2.11)}


def get_config(size: str = "tiny") -> ConfigDict:
    """The model as published; the recipe (AdamW, cosine, half a million tokens a step) is GPT-3's for its size."""
    if size not in SIZES:
        raise UserError(f"--config=gpt2:{size}: no such size; choose one of {', '.join(SIZES)}")
    layers, embed, heads, learning_rate = SIZES[size]
    seq_len = 256 if size == "tiny" else 1024
    c = ConfigDict()
    c.model = dict(
        family="decoder",
        num_layers=layers,
        embed=embed,
        num_heads=heads,
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
    c.mesh = dict(data=1, fsdp=-1, tensor=1)
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
