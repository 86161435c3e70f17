"""gpt-oss 20B and 120B (OpenAI, 2025, arXiv 2508.10925), and a tiny one of the same architecture.

llmjax train --config=gpt_oss --workdir=runs/gpt_oss
llmjax train --config=gpt_oss:20B --workdir=runs/gpt_oss --config.data.sources.main.path='/my/texts/**/*.txt'
"""

from ml_collections import ConfigDict

from llmjax.errors import UserError

# layers, embed, heads, kv heads, head width, window, experts, width of an expert, sequence length
SIZES = {
    "tiny": (4, 192, 6, 2, 32, 64, 8, 128, 256),
    "20B": (24, 2880, 64, 8, 64, 128, 32, 2880, 4096),
    "120B": (36, 2880, 64, 8, 64, 128, 128, 2880, 4096),
}

EXPECTED_SCORE = {"tiny": ("bits_per_byte", 1.96)}


def get_config(size: str = "tiny") -> ConfigDict:
    """The shapes as published, without the later extension of the rotary frequencies to longer contexts: windows in
    every other layer, sinks, biases everywhere, 4 experts for each token. No recipe was published; this is Llama's."""
    if size not in SIZES:
        raise UserError(f"--config=gpt_oss:{size}: no such size; choose one of {', '.join(SIZES)}")
    layers, embed, heads, kv_heads, head_dim, window, experts, mlp, seq_len = SIZES[size]
    c = ConfigDict()
    c.model = dict(
        family="moe",
        num_layers=layers,
        embed=embed,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        window=window,
        attention_pattern="lg",
        attention_sinks=True,
        biases="all",
        num_experts=experts,
        experts_per_token=4,
        expert_mlp=mlp,
        expert_activation="clamped_swiglu",
        rope_base=1e4 if size == "tiny" else 150_000.0,
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
