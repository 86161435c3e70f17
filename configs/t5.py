"""T5 v1.1 (Raffel et al., 2020, arXiv 1910.10683) in its published sizes, and one that learns spans in a few minutes.

llmjax train --config=t5 --workdir=runs/t5
llmjax train --config=t5:base --workdir=runs/t5 --config.data.sources.main.path='/my/texts/**/*.txt'
"""

from ml_collections import ConfigDict

from llmjax.errors import UserError

# layers of each stack, embed, heads, head width, feed-forward width
SIZES = {
    "tiny": (2, 160, 5, 32, 432),
    "small": (8, 512, 6, 64, 1024),
    "base": (12, 768, 12, 64, 2048),
    "large": (24, 1024, 16, 64, 2816),
    "xl": (24, 2048, 32, 64, 5120),
    "xxl": (24, 4096, 64, 64, 10240),
}

# On the validation split of the standard library, including sentinels, which are a quarter of the targets.
EXPECTED_SCORE = {"tiny": ("accuracy", 0.25)}


def get_config(size: str = "tiny") -> ConfigDict:
    """The published models and the paper's baseline recipe (Adafactor, 2^19 steps of 128 rows), or "tiny", in which
    half of the text is masked instead of 15%, so that a small corpus has more targets."""
    if size not in SIZES:
        raise UserError(f"--config=t5:{size}: no such size; choose one of {', '.join(SIZES)}")
    layers, embed, heads, head_dim, mlp = SIZES[size]
    c = ConfigDict()
    c.model = dict(
        family="encdec",
        num_layers=layers,
        embed=embed,
        num_heads=heads,
        head_dim=head_dim,
        mlp=mlp,
        dtype="bfloat16",
        remat="attention",
    )
    c.objective = dict(name="span")
    c.data = dict(seq_len=512, sources=dict(main=dict(path="")))
    c.train = dict(steps=2**19, global_batch=128)
    c.optimizer = dict(name="adafactor", learning_rate=1e-2, schedule="inverse_sqrt", warmup_steps=10_000)
    c.mesh = dict(data=1, fsdp=-1, tensor=1)
    if size == "tiny":
        c.model.update(dtype="float32", remat="none", scan=False)
        c.objective.rate = 0.5
        c.data = dict(
            sources=dict(python=dict(path="stdlib:")),
            tokenizer=dict(kind="sentencepiece", algorithm="bpe", vocab_size=2048),
            seq_len=128,
        )
        c.train = dict(steps=500, global_batch=16, log_every=20)
        c.optimizer = dict(name="adafactor", learning_rate=4e-2, schedule="wsd", decay_fraction=0.4, end_fraction=0.02)
        c.checkpoint = dict(every=250)
        c.eval = dict(every=250)
        c.sample = dict(prompts=("import os\n", "def main("), max_tokens=20)
    return c
