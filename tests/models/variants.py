"""Small configs of every family; between them, every kind of layer that a config can ask for."""

import dataclasses

from llmjax.models.decoder_config import DecoderConfig
from llmjax.models.encdec import EncDecConfig
from llmjax.models.encoder import EncoderConfig
from llmjax.models.moe import MoeConfig
from llmjax.models.recurrent import RecurrentConfig

VOCAB, SEQ = 50, 24
# A padded vocabulary, and windows shorter than the rows of the tests.
SMALL = dict(vocab_size=VOCAB, vocab_multiple=16, num_layers=2, embed=32)

LLAMA = DecoderConfig(**SMALL, num_heads=4, num_kv_heads=2)
GPT2 = DecoderConfig(
    **SMALL,
    num_heads=4,
    activation="gelu_tanh",
    gated=False,
    norm="layernorm",
    positions="learned",
    max_positions=64,
    tie_embeddings=True,
    biases="all",
)
POST_NORM = dataclasses.replace(
    LLAMA, norm_position="post", activation="relu2", gated=False, num_kv_heads=1, head_dim=10
)
QWEN3 = dataclasses.replace(
    LLAMA, qk_norm="head", head_dim=10, rope_scaling="llama3", rope_factor=8.0, rope_original=24, tie_embeddings=True
)
GEMMA = dataclasses.replace(
    LLAMA,
    num_layers=3,
    embed_multiplier=32**0.5,
    score_scale=0.4,
    score_softcap=0.7,
    qk_norm="head",
    window=3,
    attention_pattern="lg",
    activation="gelu_tanh",
    norm="rmsnorm1p",
    norm_position="both",
    rope_base=1e5,
    rope_local_base=50.0,
    rope_scaling="linear",
    rope_factor=3.0,
    tie_embeddings=True,
    logit_softcap=1.5,
)
OLMO = dataclasses.replace(
    LLAMA,
    norm_position="inner",
    qk_norm="all",
    window=4,
    attention_pattern="gl",
    rope_local_base=1e4,
    rope_scaling="yarn",
    rope_factor=4.0,
    rope_original=16,
)
GPT_OSS_DENSE = dataclasses.replace(
    LLAMA,
    attention_sinks=True,
    biases="attention",
    window=3,
    attention_pattern="l",
    rope_scaling="yarn",
    rope_factor=4.0,
    rope_original=64,
    rope_high=8.0,
    rope_truncate=False,
    rope_attention_factor=1.5,
)

MIXTRAL = MoeConfig(**SMALL, num_heads=4, num_kv_heads=2, mlp=24, num_experts=4)
DEEPSEEK = MoeConfig(
    **SMALL | dict(num_layers=3),
    num_heads=4,
    head_dim=8,
    mlp=48,
    num_experts=8,
    experts_per_token=2,
    expert_mlp=16,
    shared_experts=1,
    dense_layers=1,
    router="sigmoid",
    router_scale=2.5,
    router_groups=4,
    router_top_groups=2,
    expert_bias=True,
    latent=16,
    query_latent=24,
    rope_dim=8,
    value_dim=12,
)
GPT_OSS = dataclasses.replace(
    MIXTRAL,
    expert_activation="clamped_swiglu",
    biases="all",
    attention_sinks=True,
    window=5,
    attention_pattern="lg",
    num_experts=5,
)

BERT = EncoderConfig(**SMALL, num_heads=4, max_positions=40, token_types=3, pooler=True)
MODERNBERT = EncoderConfig(
    **SMALL | dict(num_layers=4),
    num_heads=4,
    mlp=48,
    gated=True,
    norm_eps=1e-5,
    norm_position="pre",
    positions="rotary",
    rope_base=160_000.0,
    window=4,
    attention_pattern="gll",
    rope_local_base=100.0,
    biases="none",
)

T5_V11 = EncDecConfig(
    **SMALL,
    start_id=0,
    num_decoder_layers=3,
    num_heads=4,
    head_dim=6,
    mlp=48,
    relative_buckets=8,
    relative_distance=20,
)
T5_V10 = dataclasses.replace(T5_V11, activation="relu", gated=False, tie_embeddings=True)

LSTM = RecurrentConfig(**SMALL, hidden=48, tie_embeddings=True)
ZAREMBA = dataclasses.replace(LSTM, hidden=0, norm="none", residual=False)
RNN = dataclasses.replace(LSTM, cell="rnn", norm="layernorm", unroll=5, tie_embeddings=False)
GRU = dataclasses.replace(LSTM, cell="gru", mlp=40)
RGLRU = dataclasses.replace(LSTM, cell="rglru", mlp=40, gate_blocks=4, recurrence="associative")

DECODERS = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "post_norm": POST_NORM,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "olmo": OLMO,
    "gpt_oss": GPT_OSS_DENSE,
}
EXPERTS = {"mixtral": MIXTRAL, "deepseek": DEEPSEEK, "gpt_oss": GPT_OSS}
RECURRENT = {"rnn": RNN, "lstm": LSTM, "zaremba": ZAREMBA, "gru": GRU, "rglru": RGLRU}

# One or two of each family, for what every family promises.
FAMILIES = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "gemma": GEMMA,
    "olmo": OLMO,
    "mixtral": MIXTRAL,
    "deepseek": DEEPSEEK,
    "gpt_oss": GPT_OSS,
    "bert": BERT,
    "modernbert": MODERNBERT,
    "t5": T5_V11,
    "rnn": RNN,
    "lstm": LSTM,
    "gru": GRU,
    "rglru": RGLRU,
}
