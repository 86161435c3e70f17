"""Configs of the four small models that tools/finetune_recipes.py pretrains on sentences about films.

llmjax train --config=tools/finetune_pretrain.py:bert --workdir=runs/films --config.data.sources.text.path=films.jsonl
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from llmjax.binding import load_module

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SEQ_LEN = 128
# Config file, its size, and what differs from it.
MODELS: dict[str, tuple[str, str, dict[str, dict[str, Any]]]] = {
    # Norms before sub-blocks and rotary positions: BERT's own learn little more than frequencies of words in 500 steps.
    "bert": (
        "bert",
        "tiny",
        dict(
            model=dict(num_layers=2, norm_position="pre", positions="rotary"),
            objective=dict(rate=0.3),
            train=dict(steps=500),
            optimizer=dict(learning_rate=4e-3),
        ),
    ),
    "gpt": (
        "gpt2",
        "tiny",
        dict(model=dict(num_layers=3, embed=128, num_heads=4), train=dict(steps=400)),
    ),
    "t5": (
        "t5",
        "tiny",
        dict(model=dict(embed=128, num_heads=4, mlp=336), train=dict(steps=400)),
    ),
    "lstm": (
        "recurrent",
        "lstm",
        dict(model=dict(num_layers=1, embed=192, hidden=256), train=dict(steps=400)),
    ),
}


def get_config(name: str) -> ConfigDict:
    """The tiny size of a family in configs/, made smaller, on one sentence a record."""
    file, size, changes = MODELS[name]
    c = load_module(CONFIGS / f"{file}.py").get_config(size)
    c.data = dict(
        sources=dict(text=dict(path="", text_field="text")),
        tokenizer=dict(kind="sentencepiece", algorithm="bpe", vocab_size=4096),
        seq_len=SEQ_LEN,
    )
    c.train = dict(global_batch=16, log_every=50)
    c.eval = dict(every=0)
    c.checkpoint = dict(every=200)
    c.sample = dict(prompts=())
    for section, fields in changes.items():
        c[section].update(fields)
    return c
