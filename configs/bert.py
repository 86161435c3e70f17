"""BERT (Devlin et al., 2018, arXiv 1810.04805) in its two published sizes, and a tiny one of the same architecture.

llmjax train --config=bert --workdir=runs/bert
llmjax fill --workdir=runs/bert --text='import [MASK] as np'
llmjax train --config=bert:base --workdir=runs/base --config.data.sources.main.path='/my/texts/**/*.txt'
"""

from ml_collections import ConfigDict

from llmjax.errors import UserError

# layers, embed, heads, dropout (section 3 of the paper)
SIZES = {
    "tiny": (4, 128, 2, 0.0),
    "base": (12, 768, 12, 0.1),
    "large": (24, 1024, 16, 0.1),
}

# On the masked tokens of the validation split, where the majority-class baseline is 3%.
EXPECTED_SCORE = {"tiny": ("accuracy", 0.12)}


def get_config(size: str = "tiny") -> ConfigDict:
    """Model and recipe as published (appendix A.2), but without next-sentence prediction, which later work found
    unhelpful (Liu et al., 2019, arXiv 1907.11692). Tiny reads the standard library in a few minutes. That is too short
    to learn positions well; configs/modernbert.py, with rotary ones, scores better."""
    if size not in SIZES:
        raise UserError(f"--config=bert:{size}: no such size; choose one of {', '.join(SIZES)}")
    layers, embed, heads, dropout = SIZES[size]
    tiny = size == "tiny"
    c = ConfigDict()
    c.model = dict(
        family="encoder",
        num_layers=layers,
        embed=embed,
        num_heads=heads,
        activation="gelu",
        gated=False,
        norm_position="post",
        norm_eps=1e-12,
        positions="learned",
        max_positions=512,
        token_types=2,
        biases="all",
        dropout=dropout,
        scan=not tiny,  # a short stack compiles as fast unrolled, and runs faster
        dtype="float32" if tiny else "bfloat16",
        remat="none" if tiny else "attention",
    )
    c.objective = dict(name="masked", rate=0.15)
    c.mesh = dict(data=1, fsdp=-1, tensor=1)
    if tiny:
        c.data = dict(
            sources=dict(python=dict(path="stdlib:")),
            tokenizer=dict(kind="sentencepiece", algorithm="bpe", vocab_size=2048),
            seq_len=64,
        )
        c.train = dict(steps=1_500, global_batch=32, log_every=50)
        c.optimizer = dict(name="adamw", learning_rate=2e-3, schedule="linear", end_fraction=0.0)
        return c
    c.data = dict(
        sources=dict(main=dict(path="")), tokenizer=dict(kind="sentencepiece", vocab_size=30_522), seq_len=512
    )
    c.train = dict(steps=1_000_000, global_batch=256)
    c.optimizer = dict(
        name="adamw",
        learning_rate=1e-4,
        schedule="linear",
        end_fraction=0.0,
        warmup_steps=10_000,
        weight_decay=0.01,
        b1=0.9,
        b2=0.999,
        eps=1e-6,
    )
    return c
