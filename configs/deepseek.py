r"""DeepSeek-V3 (DeepSeek-AI, 2024, arXiv 2412.19437), Moonlight (Liu et al., 2025, arXiv 2502.16982) and a tiny one.

llmjax train --config=deepseek --workdir=runs/deepseek
llmjax train --config=deepseek:16B --workdir=runs/deepseek \
    --config.data.sources.main.path='/my/texts/**/*.txt'
"""

from ml_collections import ConfigDict

from llmjax.errors import UserError

# layers, dense layers, embed, heads, head width without and with position, latents of keys and of queries, mlp;
# experts, shared experts, experts for each token, width of an expert, groups of experts and how many of them, scale,
# rotary base
SIZES = {
    "tiny": (4, 1, 192, 6, 32, 16, 64, 0, 512, 16, 1, 3, 128, 4, 2, 2.5, 1e4),
    "16B": (27, 1, 2048, 16, 128, 64, 512, 0, 11264, 64, 2, 6, 1408, 1, 1, 2.446, 5e4),
    "671B": (61, 3, 7168, 128, 128, 64, 512, 1536, 18432, 256, 1, 8, 2048, 8, 4, 2.5, 1e4),
}
# size -> score on the validation split of the standard library, which `make recipes` checks
EXPECTED_SCORE = {"tiny": ("bits_per_byte", 1.99)}


def get_config(size: str = "tiny") -> ConfigDict:
    """The shapes as published, with load balance as in the paper: by a bias, and by a very small loss per row."""
    if size not in SIZES:
        raise UserError(f"--config=deepseek:{size}: no such size; choose one of {', '.join(SIZES)}")
    layers, dense, embed, heads, head_dim, rope_dim, latent, query, mlp, *rest = SIZES[size]
    experts, shared, chosen, expert_mlp, groups, top_groups, scale, base = rest
    c = ConfigDict()
    c.model = dict(
        family="moe",
        num_layers=layers,
        dense_layers=dense,
        embed=embed,
        num_heads=heads,
        head_dim=head_dim,
        rope_dim=rope_dim,
        latent=latent,
        query_latent=query,
        mlp=mlp,
        num_experts=experts,
        shared_experts=shared,
        experts_per_token=chosen,
        expert_mlp=expert_mlp,
        router="sigmoid",
        router_groups=groups,
        router_top_groups=top_groups,
        router_scale=scale,
        expert_bias=True,
        balance_loss=1e-4,
        router_z_loss=0.0,
        norm_eps=1e-6,
        rope_base=base,
        dtype="bfloat16",
        remat="attention",
    )
    c.data = dict(seq_len=256 if size == "tiny" else 4096, sources=dict(main=dict(path="")))
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
