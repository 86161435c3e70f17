"""GPT-2 (Radford et al., 2019) in its four published sizes.

llmjax train --config=configs/gpt2.py:124M --workdir=runs/gpt2 --config.data.sources.main.path='/my/texts/**/*.txt'
"""

from ml_collections import ConfigDict

from llmjax.config import UserError

# layers, embed, heads, peak learning rate (after GPT-3's table 2.1, arXiv 2005.14165)
SIZES = {
    "124M": (12, 768, 12, 6e-4),
    "355M": (24, 1024, 16, 3e-4),
    "774M": (36, 1280, 20, 2.5e-4),
    "1.5B": (48, 1600, 25, 2e-4),
}


def get_config(size: str = "124M") -> ConfigDict:
    """The model as published; the recipe (AdamW, cosine, half a million tokens a step) is GPT-3's for its size."""
    if size not in SIZES:
        raise UserError(f"--config=configs/gpt2.py:{size}: no such size; choose one of {', '.join(SIZES)}")
    layers, embed, heads, learning_rate = SIZES[size]
    c = ConfigDict()
    c.model = dict(
        family="decoder",
        num_layers=layers,
        embed=embed,
        num_heads=heads,
        activation="gelu_tanh",
        gated="plain",
        norm="layernorm",
        positions="learned",
        max_positions=1024,
        tied="tied",
        biases="all",
        dtype="bfloat16",
        remat="attention",
    )
    c.data = dict(seq_len=1024, sources=dict(main=dict(path="")))
    c.train = dict(steps=100_000, global_batch=512)
    c.optimizer = dict(
        name="adamw", learning_rate=learning_rate, schedule="cosine", warmup_steps=2_000, weight_decay=0.1
    )
    c.mesh = dict(data=1, fsdp=-1, tensor=1)
    return c
