"""A small decoder trained on the source files of Python's standard library: minutes on a laptop, no download.

llmjax train --config=quickstart --workdir=runs/quickstart
llmjax train --config=quickstart --workdir=runs/mine --config.data.sources.main.path='texts/**/*.txt'
"""

from ml_collections import ConfigDict

EXPECTED_SCORE = {"": ("bits_per_byte", 1.97)}


def get_config() -> ConfigDict:
    """A decoder of 2.5 million parameters; its validation score is EXPECTED_SCORE."""
    c = ConfigDict()
    c.data = dict(
        sources=dict(python=dict(path="stdlib:")),
        tokenizer=dict(kind="sentencepiece", algorithm="bpe", vocab_size=4096),
        seq_len=256,
    )
    # A short stack compiles as fast unrolled, and runs faster.
    c.model = dict(num_layers=4, embed=192, num_heads=6, mlp=512, tie_embeddings=True, scan=False)
    c.optimizer = dict(name="adamw", learning_rate=3e-3, schedule="wsd", decay_fraction=0.4, end_fraction=0.02)
    # Chunks of 8 x 32 positions: their logits stay in the caches of a CPU.
    c.train = dict(steps=600, global_batch=8, log_every=20, loss_chunk=32)
    c.checkpoint = dict(every=200)
    c.eval = dict(every=200)
    c.sample = dict(prompts=("def main(", "import os\n", "class Stack:\n"))
    return c
