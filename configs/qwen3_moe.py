r"""Qwen3 with experts (Qwen Team, 2025, arXiv 2505.09388), 30B and 235B, and a tiny one of the same architecture.

llmjax train --config=qwen3_moe --workdir=runs/qwen3_moe
llmjax train --config=qwen3_moe:30B --workdir=runs/qwen3_moe \
    --config.data.sources.main.path='/my/texts/**/*.txt'
"""

from ml_collections import ConfigDict

from llmjax.errors import UserError

# layers, embed, heads, kv heads, head width, experts, experts for each token, width of an expert, sequence length
SIZES = {
    "tiny": (4, 192, 6, 2, 32, 16, 4, 128, 256),
    "30B": (48, 2048, 32, 4, 128, 128, 8, 768, 4096),
    "235B": (94, 4096, 64, 4, 128, 128, 8, 1536, 4096),
}

EXPECTED_SCORE = {"tiny": ("bits_per_byte", 1.94)}


def get_config(size: str = "tiny") -> ConfigDict:
    """The shapes as published. The paper balances over the global batch; here, each row is balanced."""
    if size not in SIZES:
        raise UserError(f"--config=qwen3_moe:{size}: no such size; choose one of {', '.join(SIZES)}")
    layers, embed, heads, kv_heads, head_dim, experts, chosen, mlp, seq_len = SIZES[size]
    c = ConfigDict()
    c.model = dict(
        family="moe",
        num_layers=layers,
        embed=embed,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        qk_norm="head",
        num_experts=experts,
        experts_per_token=chosen,
        expert_mlp=mlp,
        norm_eps=1e-6,
        rope_base=1e4 if size == "tiny" else 1e6,
        dtype="bfloat16",
        remat="attention",
    )
    c.data = dict(seq_len=seq_len, sources=dict(main=dict(path="")))
    c.train = dict(steps=100_000, global_batch=512)
    c.optimizer = dict(name="adamw", learning_rate=3e-4, schedule="cosine", warmup_steps=2_000, weight_decay=0.1)
    c.mesh = dict(data=1, fsdp=-1, tensor=1)
    if size == "tiny":
        c.model.update(dtype="float32", remat="none", scan=False, tie_embeddings=True)
        c.data.sources = dict(python=dict(path="stdlib:"))
        c.data.tokenizer = dict(kind="sentencepiece", algorithm="bpe", vocab_size=4096)
        c.train = dict(steps=600, global_batch=8, log_every=20)
        c.optimizer = dict(name="adamw", learning_rate=3e-3, schedule="wsd", decay_fraction=0.4, end_fraction=0.02)
        c.eval = dict(every=200)
    return c
