"""Configs of the four small models that tools/finetune_recipes.py pretrains on sentences about films.

llmjax train --config=tools/finetune_pretrain.py:bert --workdir=runs/bert --config.data.sources.text.path=sentences.txt
"""

from pathlib import Path

from ml_collections import ConfigDict

from llmjax.binding import load_module

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# Config file, its size, and what differs from it: fields of the model, steps, rows of a step and learning rate.
MODELS = {
    "bert": ("bert", "tiny", dict(max_positions=128), dict(steps=600, global_batch=16), 2e-3),
    "gpt": ("gpt2", "tiny", dict(num_layers=3, embed=128, num_heads=4), dict(steps=400, global_batch=16), 4e-3),
    "t5": ("t5", "tiny", dict(embed=128, num_heads=4, mlp=336), dict(steps=400, global_batch=16), 4e-2),
    "lstm": ("recurrent", "lstm", dict(num_layers=1, embed=192, hidden=256), dict(steps=400, global_batch=16), 6e-3),
}
SEQ_LEN = 128


def get_config(name: str) -> ConfigDict:
    """The tiny size of configs/, smaller, on one sentence a line."""
    file, size, model, train, learning_rate = MODELS[name]
    c = load_module(CONFIGS / f"{file}.py").get_config(size)
    c.model.update(model)
    c.data = dict(
        sources=dict(text=dict(path="", text_field="text")),
        tokenizer=dict(kind="sentencepiece", algorithm="bpe", vocab_size=4096),
        seq_len=SEQ_LEN,
    )
    c.train = dict(log_every=50, **train)
    c.optimizer.learning_rate = learning_rate
    c.eval = dict(every=0)
    c.checkpoint = dict(every=200)
    c.sample = dict(prompts=())
    return c
