"""gpt-oss 20B and 120B (OpenAI, 2025, arXiv 2508.10925), and a tiny one of the same architecture.

llmjax train --config=gpt_oss --workdir=runs/gpt_oss
llmjax train --config=gpt_oss:20B --workdir=runs/gpt_oss --config.data.sources.main.path='/my/texts/**/*.txt'
"""

from ml_collections import ConfigDict

# Fields of the model by size.
SIZES = {
    "tiny": dict(num_layers=4, embed=192, num_heads=6, num_kv_heads=2, head_dim=32, num_experts=8, expert_mlp=128),
    "20B": dict(num_layers=24, embed=2880, num_heads=64, num_kv_heads=8, head_dim=64, num_experts=32, expert_mlp=2880),
    "120B": dict(
        num_layers=36, embed=2880, num_heads=64, num_kv_heads=8, head_dim=64, num_experts=128, expert_mlp=2880
    ),
}
VOCAB_SIZE = 201_088  # of the published models

EXPECTED_SCORE = {"tiny": ("bits_per_byte", 1.96)}


def get_config(size: str = "tiny") -> ConfigDict:
    """The shapes as published, without the later extension of the rotary frequencies to longer contexts: windows in
    every other layer, sinks, biases everywhere, 4 experts for each token. No recipe was published; this is Llama's."""
    c = ConfigDict()
    c.model = dict(
        family="moe",
        **SIZES[size],
        window=128,
        attention_pattern="lg",
        attention_sinks=True,
        biases="all",
        experts_per_token=4,
        expert_activation="clamped_swiglu",
        rope_base=1e4 if size == "tiny" else 150_000.0,
        dtype="bfloat16",
        remat="attention",
    )
    c.data = dict(seq_len=4096, sources=dict(main=dict(path="")))
    c.train = dict(steps=100_000, global_batch=512, loss_chunk=512)
    c.optimizer = dict(name="adamw", learning_rate=3e-4, schedule="cosine", warmup_steps=2_000, weight_decay=0.1)
    c.mesh = dict(fsdp=0)
    if size == "tiny":
        c.model.update(dtype="float32", remat="none", scan=False, tie_embeddings=True, window=64)
        c.data.seq_len = 256
        c.data.sources = dict(python=dict(path="stdlib:"))
        c.data.tokenizer = dict(kind="sentencepiece", algorithm="bpe", vocab_size=4096)
        c.train = dict(steps=600, global_batch=8, log_every=20)
        c.optimizer = dict(name="adamw", learning_rate=3e-3, schedule="wsd", decay_fraction=0.4, end_fraction=0.02)
        c.eval = dict(every=200)
    return c
