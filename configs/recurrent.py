"""Recurrent language models: four cells that train on the text that every Python carries, and two published shapes.

llmjax train --config=configs/recurrent.py --workdir=runs/lstm
llmjax train --config=configs/recurrent.py:rglru --workdir=runs/rglru
llmjax train --config=configs/recurrent.py:zaremba --workdir=runs/large --config.data.sources.main.path='/my/*.txt'
"""

from ml_collections import ConfigDict

from llmjax.config import UserError

# what differs in the model, peak learning rate
SMALL = {
    "lstm": (dict(cell="lstm", embed=256, hidden=384, unroll=4), 6e-3),
    "gru": (dict(cell="gru", embed=256, hidden=448, unroll=4), 6e-3),
    "rnn": (dict(cell="rnn", embed=256, hidden=512, unroll=4), 3e-3),
    "rglru": (dict(cell="rglru", num_layers=3, embed=224, hidden=288, mlp=512, gate_blocks=4), 4e-3),
}
# what differs in the model, layers, width, width of the state, sequence length, sequences a step, peak learning rate
PUBLISHED = {
    # the large model of Zaremba et al., 2014, arXiv 1409.2329, with AdamW in place of their SGD
    "zaremba": (dict(cell="lstm", norm="none", residual="none", dropout=0.65), 2, 1500, 1500, 256, 32, 1e-3),
    # Hawk of De et al., 2024, arXiv 2402.19427, table 2
    "hawk-1.3B": (
        dict(cell="rglru", recurrence="associative", mlp=6144, gate_blocks=16, tied="tied", dtype="bfloat16"),
        24,
        2048,
        2560,
        2048,
        512,
        4e-4,
    ),
}


def get_config(size: str = "lstm") -> ConfigDict:
    """A small size or a published one."""
    if size not in SMALL | PUBLISHED:
        known = ", ".join(SMALL | PUBLISHED)
        raise UserError(f"--config=configs/recurrent.py:{size}: no such size; choose one of {known}")
    return _small(*SMALL[size]) if size in SMALL else _published(*PUBLISHED[size])


def _small(model: dict, learning_rate: float) -> ConfigDict:
    c = ConfigDict()
    c.data = dict(
        sources=dict(python=dict(path="stdlib:")),
        tokenizer=dict(kind="sentencepiece", algorithm="bpe", vocab_size=4096),
        seq_len=256,
    )
    c.model = dict(family="recurrent", tied="tied", scan=False) | model
    c.optimizer = dict(name="adamw", learning_rate=learning_rate, schedule="wsd", decay_fraction=0.4, end_fraction=0.02)
    c.train = dict(steps=600, global_batch=8, log_every=20)
    c.checkpoint = dict(every=200)
    c.eval = dict(every=200)
    c.sample = dict(prompts=("def main(", "import os\n", "class Stack:\n"))
    return c


def _published(
    model: dict, layers: int, embed: int, hidden: int, seq_len: int, batch: int, learning_rate: float
) -> ConfigDict:
    c = ConfigDict()
    c.model = dict(family="recurrent", num_layers=layers, embed=embed, hidden=hidden) | model
    c.data = dict(seq_len=seq_len, sources=dict(main=dict(path="")))
    c.train = dict(steps=100_000, global_batch=batch)
    c.optimizer = dict(
        name="adamw", learning_rate=learning_rate, schedule="cosine", warmup_steps=2_000, weight_decay=0.1
    )
    c.mesh = dict(data=1, fsdp=-1, tensor=1)
    return c
