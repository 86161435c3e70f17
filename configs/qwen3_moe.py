r"""Qwen3 with experts (Qwen Team, 2025, arXiv 2505.09388), 30B and 235B, and a tiny one of the same architecture.

llmjax train --config=qwen3_moe --workdir=runs/qwen3_moe
llmjax train --config=qwen3_moe:30B --workdir=runs/qwen3_moe \
    --config.data.sources.main.path='/my/texts/**/*.txt'
"""

from ml_collections import ConfigDict

# Fields of the model by size.
SIZES = {
    "tiny": dict(num_layers=4, embed=192, num_heads=6, num_experts=16, experts_per_token=4, expert_mlp=128),
    "30B": dict(num_layers=48, embed=2048, num_heads=32, num_experts=128, experts_per_token=8, expert_mlp=768),
    "235B": dict(num_layers=94, embed=4096, num_heads=64, num_experts=128, experts_per_token=8, expert_mlp=1536),
}
VOCAB_SIZE = 151_936  # of the published models

EXPECTED_SCORE = {"tiny": ("bits_per_byte", 1.94)}


def get_config(size: str = "tiny") -> ConfigDict:
    """The shapes as published. The paper balances over the global batch; here, each row is balanced."""
    c = ConfigDict()
    c.model = dict(
        family="moe",
        **SIZES[size],
        num_kv_heads=4,
        head_dim=128,
        qk_norm="head",
        norm_eps=1e-6,
        rope_base=1e4 if size == "tiny" else 1e6,
        dtype="bfloat16",
        remat="attention",
    )
    c.data = dict(seq_len=4096, sources=dict(main=dict(path="")))
    c.train = dict(steps=100_000, global_batch=512, loss_chunk=512)
    c.optimizer = dict(name="adamw", learning_rate=3e-4, schedule="cosine", warmup_steps=2_000, weight_decay=0.1)
    c.mesh = dict(fsdp=0)
    if size == "tiny":
        c.model.update(dtype="float32", remat="none", scan=False, tie_embeddings=True, num_kv_heads=2, head_dim=32)
        c.data.seq_len = 256
        c.data.sources = dict(python=dict(path="stdlib:"))
        c.data.tokenizer = dict(kind="sentencepiece", algorithm="bpe", vocab_size=4096)
        c.train = dict(steps=600, global_batch=8, log_every=20)
        c.optimizer = dict(name="adamw", learning_rate=3e-3, schedule="wsd", decay_fraction=0.4, end_fraction=0.02)
        c.eval = dict(every=200)
    return c
