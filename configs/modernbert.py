"""ModernBERT (Warner et al., 2024, arXiv 2412.13663) in its two published sizes, and a tiny one.

llmjax train --config=modernbert --workdir=runs/modernbert
llmjax fill --workdir=runs/modernbert --text='import [MASK] as np'
llmjax train --config=modernbert:base --workdir=runs/b --config.data.sources.main.path='/my/texts/**/*.txt'
"""

from ml_collections import ConfigDict

from llmjax.errors import UserError

# layers, embed, heads, mlp, window, sequences a step, peak learning rate, warmup steps (tables 3 and 4 of the paper)
SIZES = {
    "tiny": (4, 128, 2, 256, 17, 16, 3e-3, None),
    "base": (22, 768, 12, 1152, 65, 4608, 8e-4, 640),
    "large": (28, 1024, 16, 2624, 65, 4928, 5e-4, 400),
}

# On the masked tokens of the validation split, where the majority-class baseline is 3%.
EXPECTED_SCORE = {"tiny": ("accuracy", 0.33)}


def get_config(size: str = "tiny") -> ConfigDict:
    """The first phase of training as published: 1.7 trillion tokens in rows of 1,024, the rate constant after its
    warmup, 30% of the tokens masked. Tiny reads the standard library in a few minutes."""
    if size not in SIZES:
        raise UserError(f"--config=modernbert:{size}: no such size; choose one of {', '.join(SIZES)}")
    layers, embed, heads, mlp, window, batch, learning_rate, warmup = SIZES[size]
    tiny = size == "tiny"
    c = ConfigDict()
    c.model = dict(
        family="encoder",
        num_layers=layers,
        embed=embed,
        num_heads=heads,
        mlp=mlp,
        activation="gelu",
        gated=True,
        norm_position="pre",
        norm_eps=1e-5,
        positions="rotary",
        rope_base=160_000.0,
        window=window,
        attention_pattern="gll",
        rope_local_base=10_000.0,
        biases="none",
        scan=not tiny,  # a short stack compiles as fast unrolled, and runs faster
        dtype="float32" if tiny else "bfloat16",
        remat="none" if tiny else "attention",
    )
    c.objective = dict(name="masked", rate=0.3)
    c.mesh = dict(data=1, fsdp=-1, tensor=1)
    if tiny:
        c.data = dict(
            sources=dict(python=dict(path="stdlib:")),
            tokenizer=dict(kind="sentencepiece", algorithm="bpe", vocab_size=2048),
            seq_len=128,
        )
        c.train = dict(steps=1_000, global_batch=batch, log_every=50)
        c.optimizer = dict(
            name="adamw", learning_rate=learning_rate, schedule="wsd", decay_fraction=0.4, end_fraction=0.02
        )
        return c
    c.data = dict(
        sources=dict(main=dict(path="")), tokenizer=dict(kind="sentencepiece", vocab_size=50_368), seq_len=1024
    )
    c.train = dict(steps=364_000, global_batch=batch)
    c.optimizer = dict(
        name="adamw",
        learning_rate=learning_rate,
        schedule="wsd",
        warmup_steps=warmup,
        weight_decay=1e-5,
        b1=0.9,
        b2=0.98,
        eps=1e-6,
    )
    return c
