"""BERT (Devlin et al., 2018, arXiv 1810.04805) in its two published sizes, and a tiny one of the same architecture.

llmjax train --config=bert --workdir=runs/bert
llmjax fill --workdir=runs/bert --text='import [MASK] as np'
llmjax train --config=bert:base --workdir=runs/base --config.data.sources.main.path='/my/texts/**/*.txt'
"""

from ml_collections import ConfigDict

# Fields of the model by size (section 3 of the paper).
SIZES = {
    "tiny": dict(num_layers=4, embed=128, num_heads=2, dropout=0.0),
    "base": dict(num_layers=12, embed=768, num_heads=12, dropout=0.1),
    "large": dict(num_layers=24, embed=1024, num_heads=16, dropout=0.1),
}
VOCAB_SIZE = 30_522  # of the published models

# On the masked tokens of the validation split, where the majority-class baseline is 3%.
EXPECTED_SCORE = {"tiny": ("accuracy", 0.12)}


def get_config(size: str = "tiny") -> ConfigDict:
    """Model and recipe as published (appendix A.2), but without next-sentence prediction, which later work found
    unhelpful (Liu et al., 2019, arXiv 1907.11692). Tiny reads the standard library in a few minutes. That is too short
    to learn positions well; configs/modernbert.py, with rotary ones, scores better."""
    tiny = size == "tiny"
    c = ConfigDict()
    c.model = dict(
        family="encoder",
        **SIZES[size],
        activation="gelu",
        gated=False,
        norm_position="post",
        norm_eps=1e-12,
        positions="learned",
        max_positions=512,
        token_types=2,
        biases="all",
        scan=not tiny,  # a short stack compiles as fast unrolled, and runs faster
        dtype="float32" if tiny else "bfloat16",
        remat="none" if tiny else "attention",
    )
    c.objective = dict(name="masked", rate=0.15)
    c.mesh = dict(fsdp=0)
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
