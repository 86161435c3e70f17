"""ModernBERT (Warner et al., 2024, arXiv 2412.13663) in its two published sizes, and a tiny one.

llmjax train --config=modernbert --workdir=runs/modernbert
llmjax fill --workdir=runs/modernbert --text='import [MASK] as np'
llmjax train --config=modernbert:base --workdir=runs/b --config.data.sources.main.path='/my/texts/**/*.txt'
"""

from ml_collections import ConfigDict

# Fields of the model by size (table 3 of the paper).
SIZES = {
    "tiny": dict(num_layers=4, embed=128, num_heads=2, mlp=256, window=17),
    "base": dict(num_layers=22, embed=768, num_heads=12, mlp=1152, window=65),
    "large": dict(num_layers=28, embed=1024, num_heads=16, mlp=2624, window=65),
}
VOCAB_SIZE = 50_368  # of the published models
# Sequences a step, peak learning rate and warmup (table 4 of the paper).
RECIPES = {
    "tiny": dict(global_batch=16, learning_rate=3e-3),
    "base": dict(global_batch=4608, learning_rate=8e-4, warmup_steps=640),
    "large": dict(global_batch=4928, learning_rate=5e-4, warmup_steps=400),
}

# On the masked tokens of the validation split, where the majority-class baseline is 3%.
EXPECTED_SCORE = {"tiny": ("accuracy", 0.33)}


def get_config(size: str = "tiny") -> ConfigDict:
    """The first phase of training as published: 1.7 trillion tokens in rows of 1,024, the rate constant after its
    warmup, 30% of the tokens masked. Tiny reads the standard library in a few minutes."""
    recipe, tiny = RECIPES[size], size == "tiny"
    c = ConfigDict()
    c.model = dict(
        family="encoder",
        **SIZES[size],
        activation="gelu",
        gated=True,
        norm_position="pre",
        norm_eps=1e-5,
        positions="rotary",
        rope_base=160_000.0,
        attention_pattern="gll",
        rope_local_base=10_000.0,
        biases="none",
        scan=not tiny,  # a short stack compiles as fast unrolled, and runs faster
        dtype="float32" if tiny else "bfloat16",
        remat="none" if tiny else "attention",
    )
    c.objective = dict(name="masked", rate=0.3)
    c.mesh = dict(fsdp=0)
    if tiny:
        c.data = dict(
            sources=dict(python=dict(path="stdlib:")),
            tokenizer=dict(kind="sentencepiece", algorithm="bpe", vocab_size=2048),
            seq_len=128,
        )
        c.train = dict(steps=1_000, global_batch=recipe["global_batch"], log_every=50)
        c.optimizer = dict(
            name="adamw", learning_rate=recipe["learning_rate"], schedule="wsd", decay_fraction=0.4, end_fraction=0.02
        )
        return c
    c.data = dict(
        sources=dict(main=dict(path="")), tokenizer=dict(kind="sentencepiece", vocab_size=50_368), seq_len=1024
    )
    c.train = dict(steps=364_000, global_batch=recipe["global_batch"])
    c.optimizer = dict(
        name="adamw",
        learning_rate=recipe["learning_rate"],
        schedule="wsd",
        warmup_steps=recipe["warmup_steps"],
        weight_decay=1e-5,
        b1=0.9,
        b2=0.98,
        eps=1e-6,
    )
    return c
