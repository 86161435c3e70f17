"""Train a pretrained model, or a small encoder from scratch, to embed texts, from pairs of texts.

llmjax import --from=/my/encoder --workdir=runs/embed
llmjax train --config=embed --workdir=runs/embed --config.data.sources.main.path=/my/pairs.jsonl
llmjax embed --workdir=runs/embed --input=texts.jsonl --output=vectors.npy

A record has the fields `text` and `pair`, and for `embed:similarity` also `score`; docs/finetune.md says how to add
hard negatives.
"""

from ml_collections import ConfigDict

# Fields of a record and number of records in a batch, by objective.
SIZES = {
    "contrastive": dict(fields=dict(pair_field="pair"), batch=64),
    "similarity": dict(fields=dict(pair_field="pair", score_field="score"), batch=16),
}


def get_config(size: str = "contrastive") -> ConfigDict:
    """Contrastive training with the other pairs of the batch as negatives, as SimCSE trains on labelled pairs (Gao et
    al., 2021, arXiv 2104.08821), or cosines that equal scores, as of Sentence-BERT (Reimers and Gurevych, 2019, arXiv
    1908.10084). An imported model and its tokenizer replace those here."""
    c = ConfigDict()
    c.model = dict(family="encoder", num_layers=4, embed=128, num_heads=4, activation="gelu")
    c.data = dict(
        sources=dict(main=dict(path="", text_field="text", **SIZES[size]["fields"])),
        tokenizer=dict(kind="sentencepiece", vocab_size=4096),
        seq_len=128,
        packing="none",
    )
    c.objective = dict(name=size)
    c.train = dict(steps=200, global_batch=SIZES[size]["batch"], log_every=20)
    c.optimizer = dict(
        name="adamw",
        learning_rate=5e-5,
        schedule="linear",
        end_fraction=0.0,
        warmup_steps=20,
        weight_decay=0.01,
        b1=0.9,
        b2=0.999,
        clip_norm=1.0,
    )
    c.eval = dict(every=100)
    c.checkpoint = dict(every=100)
    return c
