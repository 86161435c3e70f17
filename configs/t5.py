"""T5 v1.1 (Raffel et al., 2020, arXiv 1910.10683) in its published sizes, and one that learns spans in a few minutes.

llmjax train --config=t5 --workdir=runs/t5
llmjax train --config=t5:base --workdir=runs/t5 --config.data.sources.main.path='/my/texts/**/*.txt'
"""

from ml_collections import ConfigDict

# Fields of the model by size; num_layers is that of each stack.
SIZES = {
    "tiny": dict(num_layers=2, embed=160, num_heads=5, head_dim=32, mlp=432),
    "small": dict(num_layers=8, embed=512, num_heads=6, head_dim=64, mlp=1024),
    "base": dict(num_layers=12, embed=768, num_heads=12, head_dim=64, mlp=2048),
    "large": dict(num_layers=24, embed=1024, num_heads=16, head_dim=64, mlp=2816),
    "xl": dict(num_layers=24, embed=2048, num_heads=32, head_dim=64, mlp=5120),
    "xxl": dict(num_layers=24, embed=4096, num_heads=64, head_dim=64, mlp=10240),
}
VOCAB_SIZE = 32_128  # of the published models

# On the validation split of the standard library, including sentinels, which are a quarter of the targets.
EXPECTED_SCORE = {"tiny": ("accuracy", 0.25)}


def get_config(size: str = "tiny") -> ConfigDict:
    """The published models and the paper's baseline recipe (Adafactor, 2^19 steps of 128 rows), or "tiny", in which
    half of the text is masked instead of 15%, so that a small corpus has more targets."""
    c = ConfigDict()
    c.model = dict(
        family="encdec",
        **SIZES[size],
        dtype="bfloat16",
        remat="attention",
    )
    c.objective = dict(name="span")
    c.data = dict(seq_len=512, sources=dict(main=dict(path="")))
    c.train = dict(steps=2**19, global_batch=128)
    c.optimizer = dict(name="adafactor", learning_rate=1e-2, schedule="inverse_sqrt", warmup_steps=10_000)
    c.mesh = dict(fsdp=0)
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
