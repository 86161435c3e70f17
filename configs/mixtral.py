r"""Mixtral 8x7B and 8x22B (Jiang et al., 2024, arXiv 2401.04088), and a tiny one of the same architecture.

llmjax train --config=mixtral --workdir=runs/mixtral
llmjax train --config=mixtral:8x7B --workdir=runs/mixtral \
    --config.data.sources.main.path='/my/texts/**/*.txt'
"""

from ml_collections import ConfigDict

# Fields of the model by size.
SIZES = {
    "tiny": dict(num_layers=4, embed=192, num_heads=6, num_kv_heads=2, head_dim=32, mlp=256),
    "8x7B": dict(num_layers=32, embed=4096, num_heads=32, num_kv_heads=8, head_dim=128, mlp=14336),
    "8x22B": dict(num_layers=56, embed=6144, num_heads=48, num_kv_heads=8, head_dim=128, mlp=16384),
}
VOCAB_SIZE = 32_000  # of the published models
# size -> score on the validation split of the standard library, which `make recipes` checks
EXPECTED_SCORE = {"tiny": ("bits_per_byte", 1.96)}


def get_config(size: str = "tiny") -> ConfigDict:
    """The shapes as published: 8 experts a layer, 2 for each token. No recipe was published; this is Llama's."""
    c = ConfigDict()
    c.model = dict(
        family="moe",
        **SIZES[size],
        num_experts=8,
        experts_per_token=2,
        rope_base=1e4 if size == "tiny" else 1e6,
        dtype="bfloat16",
        remat="attention",
    )
    c.data = dict(seq_len=8192, sources=dict(main=dict(path="")))
    c.train = dict(steps=100_000, global_batch=512, loss_chunk=512)
    c.optimizer = dict(name="adamw", learning_rate=3e-4, schedule="cosine", warmup_steps=2_000, weight_decay=0.1)
    c.mesh = dict(fsdp=0)
    if size == "tiny":
        c.model.update(dtype="float32", remat="none", scan=False, tie_embeddings=True)
        c.data.seq_len = 256
        c.data.sources = dict(python=dict(path="stdlib:"))
        c.data.tokenizer = dict(kind="sentencepiece", algorithm="bpe", vocab_size=4096)
        c.train = dict(steps=600, global_batch=8, log_every=20)
        c.optimizer = dict(name="adamw", learning_rate=3e-3, schedule="wsd", decay_fraction=0.4, end_fraction=0.02)
        c.eval = dict(every=200)
    return c
