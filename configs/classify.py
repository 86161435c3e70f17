"""Classify labelled texts, or predict a number for each, with a pretrained model or a small encoder from scratch.

llmjax import --from=/my/model --workdir=runs/sentiment
llmjax train --config=classify --workdir=runs/sentiment --config.data.sources.main.path=/my/reviews.jsonl
llmjax predict --workdir=runs/sentiment --input=texts.jsonl --output=labels.jsonl

A record has the fields `text` and `label`; docs/finetune.md names the settings for other labels.
"""

from ml_collections import ConfigDict

# Objective and classes by kind of label.
SIZES = {
    "classes": dict(objective="classify", classes=("negative", "positive")),
    "number": dict(objective="regress", classes=()),
}


def get_config(size: str = "classes") -> ConfigDict:
    """Fine-tuning as of BERT (Devlin et al., 2018, arXiv 1810.04805, appendix A.3): a few epochs with a small learning
    rate that rises and falls linearly. An imported model and its tokenizer replace those here."""
    c = ConfigDict()
    c.model = dict(family="encoder", num_layers=4, embed=128, num_heads=4, activation="gelu", token_types=2)
    c.data = dict(
        sources=dict(main=dict(path="", text_field="text", label_field="label")),
        classes=SIZES[size]["classes"],
        tokenizer=dict(kind="sentencepiece", vocab_size=4096),
        seq_len=128,
    )
    c.objective = dict(name=SIZES[size]["objective"])
    c.train = dict(steps=400, global_batch=8, log_every=20)
    c.optimizer = dict(
        name="adamw",
        learning_rate=5e-5,
        schedule="linear",
        end_fraction=0.0,
        warmup_steps=40,
        weight_decay=0.01,
        b1=0.9,
        b2=0.999,
        clip_norm=1.0,
    )
    c.eval = dict(every=100)
    c.checkpoint = dict(every=200)
    return c
