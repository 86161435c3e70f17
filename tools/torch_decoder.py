"""The same decoder and train step in plain PyTorch.

It uses the fastest functions of PyTorch: scaled_dot_product_attention with is_causal (without the packing mask that
llmjax reads), one product for queries, keys and values, fused AdamW, foreach clipping, and autocast if the compute type
is bfloat16.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]  (the extra `bench`)
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

DEVICES = {"cpu": "cpu", "gpu": "cuda"}
ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu, "relu": F.relu}


def norm(model: dict[str, Any]) -> nn.Module:
    if model["norm"] == "rmsnorm":
        return nn.RMSNorm(model["embed"], eps=model["norm_eps"])
    return nn.LayerNorm(model["embed"], eps=model["norm_eps"], bias=model["biases"] == "all")


class Block(nn.Module):
    """Pre-norm attention and feed-forward. `model` is the model section of a config in which every size has a value."""

    def __init__(self, model: dict[str, Any], plain_attention: bool):
        super().__init__()
        self.plain_attention = plain_attention
        embed, self.heads, self.kv_heads = model["embed"], model["num_heads"], model["num_kv_heads"]
        self.head_dim, bias = model["head_dim"], model["biases"] == "all"
        self.attention_norm, self.mlp_norm = norm(model), norm(model)
        self.qkv = nn.Linear(embed, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=bias)
        self.out = nn.Linear(self.heads * self.head_dim, embed, bias=bias)
        self.gate = nn.Linear(embed, model["mlp"], bias=bias) if model["gated"] else None
        self.up = nn.Linear(embed, model["mlp"], bias=bias)
        self.down = nn.Linear(model["mlp"], embed, bias=bias)
        self.activation = ACTIVATIONS[model["activation"]]

    def forward(self, x, angles):
        batch, seq, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        attention = plain_attention if self.plain_attention else F.scaled_dot_product_attention
        y = attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads != self.heads)
        x = x + self.out(y.transpose(1, 2).reshape(batch, seq, -1))
        y = self.mlp_norm(x)
        y = self.activation(self.up(y)) if self.gate is None else self.activation(self.gate(y)) * self.up(y)
        return x + self.down(y)


def plain_attention(q, k, v, *, is_causal, enable_gqa):
    """`scaled_dot_product_attention` as matmul, softmax and matmul, what transformers calls eager attention."""
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if is_causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype, device=q.device).triu(1)
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Decoder(nn.Module):
    """inputs, targets int [batch, seq] -> mean cross-entropy."""

    def __init__(self, model: dict[str, Any], seq_len: int, plain_attention: bool):
        super().__init__()
        vocab = -(-model["vocab_size"] // model["vocab_multiple"]) * model["vocab_multiple"]
        self.embed = nn.Embedding(vocab, model["embed"])
        self.positions = (
            nn.Embedding(model["max_positions"], model["embed"]) if model["positions"] == "learned" else None
        )
        self.blocks = nn.ModuleList(Block(model, plain_attention) for _ in range(model["num_layers"]))
        self.norm = norm(model)
        self.head = nn.Linear(model["embed"], vocab, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        if model["tie_embeddings"]:
            self.head.weight = self.embed.weight
        half = model["head_dim"] // 2
        angle = torch.arange(seq_len)[:, None] * model["rope_base"] ** (-torch.arange(half) / half)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, inputs, targets):
        x, angles = self.embed(inputs), (self.cos, self.sin)
        if self.positions is not None:
            x, angles = x + self.positions.weight[: inputs.shape[1]], None
        for block in self.blocks:
            x = block(x, angles)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


def make_step(
    config: dict[str, Any],
    inputs: np.ndarray,
    targets: np.ndarray,
    *,
    device: str,
    compiled: bool,
    plain_attention: bool = False,
) -> tuple[Callable, int]:
    """(step, number of parameters); `step()` trains on the batch and returns a scalar loss that may still be under way.

    config   a resolved run config as nested dicts
    device   "cpu" or "gpu"
    plain_attention  matmul, softmax and matmul instead of the fused kernel
    """
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    device, model, optimizer = DEVICES[device], config["model"], config["optimizer"]
    decoder = Decoder(model, config["data"]["seq_len"], plain_attention).to(device)
    matrices = [p for p in decoder.parameters() if p.ndim > 1]
    others = [p for p in decoder.parameters() if p.ndim < 2]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=optimizer["learning_rate"],
        betas=(0.9, 0.95),
        fused=True,
    )
    forward = torch.compile(decoder) if compiled else decoder

    def step():
        # From host memory at every step, as training would.
        batch = (torch.from_numpy(x).to(device, torch.long, non_blocking=True) for x in (inputs, targets))
        with torch.autocast(device, torch.bfloat16, enabled=model["dtype"] == "bfloat16"):
            loss = forward(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.detach()

    return step, sum(p.numel() for p in decoder.parameters())


def make_matmul(size: int, *, device: str) -> Callable:
    """A square matrix product: float32 on CPU, bfloat16 on a GPU."""
    a = torch.randn(size, size, device=DEVICES[device], dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    return lambda: a @ a


def wait(result) -> None:
    """Until what was started is done."""
    if result.is_cuda:
        torch.cuda.synchronize()


def kind(device: str) -> str:
    """The name of the device."""
    return "cpu" if device == "cpu" else torch.cuda.get_device_name()
