"""Recurrent language models: four cells that train on the text that every Python carries, and two published shapes.

llmjax train --config=configs/recurrent.py --workdir=runs/lstm
llmjax train --config=configs/recurrent.py:rglru --workdir=runs/rglru
llmjax train --config=configs/recurrent.py:zaremba --workdir=runs/ptb --config.data.sources.main.path='/my/texts/*.txt'
"""

from ml_collections import ConfigDict

# what differs in the model, peak learning rate
SMALL = {
    "lstm": (dict(cell="lstm", embed=256, hidden=384), 6e-3),
    "gru": (dict(cell="gru", embed=256, hidden=448), 6e-3),
    "rnn": (dict(cell="rnn", embed=256, hidden=512), 3e-3),
    "rglru": (dict(cell="rglru", num_layers=3, embed=224, hidden=288, mlp=512, gate_blocks=4), 3e-3),
}


def get_config(size: str = "lstm") -> ConfigDict:
    c = ConfigDict()
    c.data = dict(
        sources=dict(python=dict(path="stdlib:")),
        tokenizer=dict(kind="sentencepiece", algorithm="bpe", vocab_size=4096),
        seq_len=256,
    )
    model, learning_rate = SMALL[size]
    c.model = dict(family="recurrent", tied="tied", scan=False, **model)
    c.optimizer = dict(name="adamw", learning_rate=learning_rate, schedule="wsd", decay_fraction=0.4, end_fraction=0.02)
    c.train = dict(steps=600, global_batch=8, log_every=20)
    c.checkpoint = dict(every=200)
    c.eval = dict(every=200)
    c.sample = dict(prompts=("def main(", "import os\n", "class Stack:\n"))
    return c
