#!/usr/bin/env python3
"""Measure a training step of the recurrent recipes on CPU: tokens a second, beside torch.nn's layers in the same model.

python tools/bench_recurrent.py                        lstm and rglru of configs/recurrent.py: about 2 minutes
python tools/bench_recurrent.py --size=gru --turns=9   another one, for longer

A step is forward, backward, clip at 1.0 and AdamW in float32. lstm, gru and rnn stand beside the same stack with
torch.nn's layer for the cell (its second bias apart); rglru has no peer there and stands beside itself, its recurrence
run token by token and as a parallel scan. All take turns in this process, so that they see the same machine; the median
turn counts. llmjax resets states where documents end; PyTorch does not.
"""

import argparse
from collections.abc import Callable
import dataclasses
import os
from pathlib import Path
import statistics

import numpy as np
from peers import INSTALL_TORCH, environment

os.environ.update(environment("cpu"))

import jax
from peer_process import llmjax_step, timed

from llmjax import run_config
from llmjax.models.recurrent_config import RecurrentConfig
from llmjax.nn.rglru import RECURRENCES

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "recurrent.py"
SIZES = ("lstm", "gru", "rnn", "rglru")
VOCAB_SIZE = 4096  # the recipes'


@dataclasses.dataclass
class Racer:
    """A step to be timed: `work` starts it, `wait` blocks until what it gave is done."""

    name: str
    work: Callable
    wait: Callable
    parameters: int
    seconds: list[float] = dataclasses.field(default_factory=list)

    def turn(self, seconds: float) -> None:
        """As many steps as fit into `seconds`."""
        self.seconds.append(timed(self.work, self.wait, max(1, round(seconds / timed(self.work, self.wait, 1)))))


def main() -> None:
    options = parse_options()
    for size in options.size or ["lstm", "rglru"]:
        race(size, turns=options.turns, seconds=options.seconds)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{INSTALL_TORCH}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", action="append", choices=SIZES, help="may be given twice (default: lstm and rglru)")
    parser.add_argument("--turns", type=int, default=5, help="timings of each (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3, help="length of each (default: %(default)s)")
    return parser.parse_args()


def race(size: str, *, turns: int, seconds: float) -> None:
    """Print a recipe's tokens a second and its peer's."""
    config = run_config.with_vocabulary(run_config.resolve(f"{CONFIG}:{size}", []), VOCAB_SIZE)
    assert isinstance(config.model, RecurrentConfig)
    rows, seq = config.train.global_batch, config.data.seq_len
    draw = np.random.default_rng(0).integers(0, VOCAB_SIZE, (rows, seq + 1), np.int32)
    batch = np.ascontiguousarray(draw[:, :-1]), np.ascontiguousarray(draw[:, 1:])
    racers = []
    for how in RECURRENCES if size == "rglru" else ("sequential",):
        model = dataclasses.replace(config.model, recurrence=how)
        tree = run_config.to_json(dataclasses.replace(config, model=model))
        work, parameters = llmjax_step(tree, *batch)
        racers.append(Racer(f"llmjax, {how}", work, jax.block_until_ready, parameters))
    if size != "rglru" and (peer := torch_racer(config.model, config.optimizer.resolved().learning_rate, batch)):
        racers.append(peer)
    for _ in range(turns):
        for racer in racers:
            racer.turn(seconds)
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(f"\n{size}: {rows} x {seq} tokens a step, float32, median of {turns} turns; {load}")
    print(f"  {'':22}{'tokens/s':>10}{'step':>10}{'(min - max)':>18}{'parameters':>13}")
    for racer in racers:
        middle, span = statistics.median(racer.seconds), f"({min(racer.seconds):.3f} - {max(racer.seconds):.3f})"
        rate = rows * seq / middle
        print(f"  {racer.name:22}{rate:>10,.0f}{middle:>8.3f} s{span:>18}{racer.parameters:>13,}", flush=True)


def torch_racer(model: RecurrentConfig, learning_rate: float, batch: tuple[np.ndarray, np.ndarray]) -> Racer | None:
    """The same stack in PyTorch, or None where it is not installed."""
    try:
        import torch
        from torch import nn
    except ImportError:
        print(INSTALL_TORCH)
        return None
    layer = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[model.cell]

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            each = range(model.num_layers)
            self.embed = nn.Embedding(model.padded_vocab, model.embed)
            self.norms = nn.ModuleList(nn.RMSNorm(model.embed, eps=model.norm_eps) for _ in range(model.num_layers + 1))
            self.cells = nn.ModuleList(layer(model.embed, model.state_size, batch_first=True) for _ in each)
            self.outs = nn.ModuleList(nn.Linear(model.state_size, model.embed) for _ in each)

        def forward(self, tokens, targets):
            x = self.embed(tokens)
            for norm, cell, out in zip(self.norms, self.cells, self.outs, strict=False):
                x = x + out(cell(norm(x))[0])
            logits = self.norms[-1](x) @ self.embed.weight.T
            return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    torch.manual_seed(0)
    stack = Stack()
    nn.init.normal_(stack.embed.weight, std=0.02)
    adamw = torch.optim.AdamW(stack.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step():
        loss = stack(*(torch.from_numpy(x).long() for x in batch))
        loss.backward()
        nn.utils.clip_grad_norm_(stack.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.detach()

    return Racer(f"torch.nn.{layer.__name__}", step, lambda _: None, sum(p.numel() for p in stack.parameters()))


if __name__ == "__main__":
    main()
