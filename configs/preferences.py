"""Train a language model on preferences between two answers to a prompt: by DPO, or as a reward model.

llmjax import --from=/my/model --workdir=runs/dpo
llmjax train --config=preferences --workdir=runs/dpo --config.data.sources.main.path=/my/preferences.jsonl
llmjax generate --workdir=runs/dpo --prompt='A question'

A record has the fields `prompt`, `chosen` and `rejected`; docs/finetune.md says how to give messages.
"""

from ml_collections import ConfigDict

# The kinds of training.
SIZES = ("dpo", "reward")


def get_config(size: str = "dpo") -> ConfigDict:
    """DPO as of Rafailov et al. (2023, arXiv 2305.18290, appendix B), or a reward model with the same optimizer. An
    imported model and its tokenizer replace those here."""
    c = ConfigDict()
    c.model = dict(family="decoder", num_layers=4, embed=128, num_heads=4)
    c.data = dict(
        sources=dict(main=dict(path="", text_field="prompt", chosen_field="chosen", rejected_field="rejected")),
        tokenizer=dict(kind="sentencepiece", vocab_size=4096),
        seq_len=1024,
        packing="none",
    )
    c.objective = dict(name=size)
    c.train = dict(steps=400, global_batch=8, log_every=10)
    c.optimizer = dict(name="adamw", schedule="linear", end_fraction=0.0, warmup_steps=40, weight_decay=0.0, b2=0.999)
    c.eval = dict(every=100)
    c.checkpoint = dict(every=100)
    return c
