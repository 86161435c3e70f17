r"""DeepSeek-V3 (DeepSeek-AI, 2024, arXiv 2412.19437), Moonlight (Liu et al., 2025, arXiv 2502.16982) and a tiny one.

llmjax train --config=deepseek --workdir=runs/deepseek
llmjax train --config=deepseek:16B --workdir=runs/deepseek \
    --config.data.sources.main.path='/my/texts/**/*.txt'
"""

from ml_collections import ConfigDict

# Fields of the model by size.
SIZES = {
    "tiny": dict(
        num_layers=4,
        dense_layers=1,
        embed=192,
        num_heads=6,
        head_dim=32,
        rope_dim=16,
        latent=64,
        query_latent=0,
        mlp=512,
        num_experts=16,
        shared_experts=1,
        experts_per_token=3,
        expert_mlp=128,
        router_groups=4,
        router_top_groups=2,
        router_scale=2.5,
        rope_base=1e4,
    ),
    "16B": dict(
        num_layers=27,
        dense_layers=1,
        embed=2048,
        num_heads=16,
        head_dim=128,
        rope_dim=64,
        latent=512,
        query_latent=0,
        mlp=11264,
        num_experts=64,
        shared_experts=2,
        experts_per_token=6,
        expert_mlp=1408,
        router_groups=1,
        router_top_groups=1,
        router_scale=2.446,
        rope_base=5e4,
    ),
    "671B": dict(
        num_layers=61,
        dense_layers=3,
        embed=7168,
        num_heads=128,
        head_dim=128,
        rope_dim=64,
        latent=512,
        query_latent=1536,
        mlp=18432,
        num_experts=256,
        shared_experts=1,
        experts_per_token=8,
        expert_mlp=2048,
        router_groups=8,
        router_top_groups=4,
        router_scale=2.5,
        rope_base=1e4,
    ),
}
VOCAB_SIZE = {"16B": 163_840, "671B": 129_280}  # of the published models
# size -> score on the validation split of the standard library, which `make recipes` checks
EXPECTED_SCORE = {"tiny": ("bits_per_byte", 1.99)}


def get_config(size: str = "tiny") -> ConfigDict:
    """The shapes as published, with load balance as in the paper: by a bias, and by a very small loss per row."""
    c = ConfigDict()
    c.model = dict(
        family="moe",
        **SIZES[size],
        router="sigmoid",
        expert_bias=True,
        balance_loss=1e-4,
        router_z_loss=0.0,
        norm_eps=1e-6,
        dtype="bfloat16",
        remat="attention",
    )
    c.data = dict(seq_len=256 if size == "tiny" else 4096, sources=dict(main=dict(path="")))
    c.train = dict(steps=100_000, global_batch=512, loss_chunk=512)
    c.optimizer = dict(name="adamw", learning_rate=3e-4, schedule="cosine", warmup_steps=2_000, weight_decay=0.1)
    c.mesh = dict(fsdp=0)
    if size == "tiny":
        c.model.update(dtype="float32", remat="none", scan=False, tie_embeddings=True)
        c.data.sources = dict(python=dict(path="stdlib:"))
        c.data.tokenizer = dict(kind="sentencepiece", algorithm="bpe", vocab_size=4096)
        c.train = dict(steps=600, global_batch=8, log_every=20)
        c.optimizer = dict(name="adamw", learning_rate=3e-3, schedule="wsd", decay_fraction=0.4, end_fraction=0.02)
        c.eval = dict(every=200)
    return c
