#!/usr/bin/env python3
"""Measure a training step of the recurrent recipes on CPU: tokens a second, beside torch.nn's layers in the same model.

python tools/bench_recurrent.py                    lstm, gru and rglru of configs/recurrent.py: about 3 minutes
python tools/bench_recurrent.py --size=lstm        one of them
python tools/bench_recurrent.py --turns=9          more timings of each

A step is forward, backward, clip at 1.0 and AdamW in float32. lstm, gru and rnn are compared with the same
stack of torch.nn's layers, which have a second bias. rglru is compared with the quickstart's decoder, and its two
recurrences, token by token and as a parallel scan, with each other. llmjax resets states where documents end;
PyTorch does not.

All run on one core, in turns, and are timed by processor time, so that other work on the machine does not count. The
median turn counts.
"""

import argparse
from collections.abc import Callable
import dataclasses
import os
from pathlib import Path
import statistics
import time

import numpy as np
from peers import INSTALL_TORCH, environment

os.environ.update(environment("cpu"))
# Before JAX starts one thread for each core.
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax
from peer_process import llmjax_step

from llmjax.models.recurrent import RecurrentConfig
from llmjax.nn.rglru import RECURRENCES
from llmjax.run import config as run_config
from llmjax.run.config import RunConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CELLS = ("lstm", "gru", "rnn", "rglru")
VOCAB_SIZE = 4096  # the recipes'


@dataclasses.dataclass
class TimedStep:
    """A step to be timed: `work` runs it, and returns when it has finished."""

    name: str
    work: Callable
    parameters: int
    seconds: list[float] = dataclasses.field(default_factory=list)

    def turn(self, steps: int) -> None:
        """Time `steps` steps in a row."""
        began = time.process_time()
        for _ in range(steps):
            self.work()
        self.seconds.append((time.process_time() - began) / steps)


def main() -> None:
    options = parse_options()
    timed_steps, shapes = [], set()
    for cell in options.size or ("lstm", "gru", "rglru"):
        for timed_step, shape in steps_to_compare(cell):
            timed_step.work()  # compiles
            timed_steps.append(timed_step)
            shapes.add(shape)
    ((rows, seq),) = shapes
    for _ in range(options.turns):
        for timed_step in timed_steps:
            timed_step.turn(options.steps)
    print(f"{rows} x {seq} tokens a step, float32, one core, median of {options.turns} turns by processor time")
    print(f"  {'':30}{'tokens/s':>10}{'step':>10}{'(min - max)':>18}{'parameters':>13}")
    for timed_step in timed_steps:
        middle, span = (
            statistics.median(timed_step.seconds),
            f"({min(timed_step.seconds):.3f} - {max(timed_step.seconds):.3f})",
        )
        print(
            f"  {timed_step.name:30}{rows * seq / middle:>10,.0f}{middle:>8.3f} s{span:>18}{timed_step.parameters:>13,}"
        )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{INSTALL_TORCH}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", action="append", choices=CELLS, help="may be given twice (default: lstm, gru, rglru)")
    parser.add_argument("--turns", type=int, default=5, help="timings of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="steps in each (default: %(default)s)")
    return parser.parse_args()


def steps_to_compare(cell: str) -> list[tuple[TimedStep, tuple[int, int]]]:
    """A recipe and its peers, each with its rows and tokens per row."""
    config = recipe(f"recurrent.py:{cell}")
    assert isinstance(config.model, RecurrentConfig)
    if cell != "rglru":
        peer = torch_step(config)
        return [llmjax_timed_step(f"llmjax {cell}", config), *([peer] if peer else [])]
    models = {name: dataclasses.replace(config.model, recurrence=name) for name in RECURRENCES}
    configs = {f"llmjax rglru, {name}": dataclasses.replace(config, model=model) for name, model in models.items()}
    configs["llmjax decoder, quickstart"] = recipe("quickstart.py")
    return [llmjax_timed_step(name, config) for name, config in configs.items()]


def recipe(name: str) -> RunConfig:
    return run_config.with_vocabulary(run_config.resolve(str(CONFIGS / name), []), VOCAB_SIZE)


def random_batch(config: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of a batch."""
    shape = config.train.global_batch, config.data.seq_len + 1
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, shape, np.int32)
    return np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])


def llmjax_timed_step(name: str, config: RunConfig) -> tuple[TimedStep, tuple[int, int]]:
    batch = random_batch(config)
    step, parameters = llmjax_step(run_config.to_json(config), *batch)
    return TimedStep(name, lambda: jax.block_until_ready(step()), parameters), batch[0].shape


def torch_step(config: RunConfig) -> tuple[TimedStep, tuple[int, int]] | None:
    """The same stack in PyTorch, or None where it is not installed."""
    try:
        import torch  # pyright: ignore[reportMissingImports]  (the extra `bench`)
        from torch import nn  # pyright: ignore[reportMissingImports]
    except ImportError:
        print(INSTALL_TORCH)
        return None
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, batch = config.model, random_batch(config)
    assert isinstance(model, RecurrentConfig)
    layer = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[model.cell]

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            layers = range(model.num_layers)
            self.embed = nn.Embedding(model.padded_vocab, model.embed)
            self.norms = nn.ModuleList(nn.RMSNorm(model.embed, eps=model.norm_eps) for _ in range(model.num_layers + 1))
            self.cells = nn.ModuleList(layer(model.embed, model.state_size, batch_first=True) for _ in layers)
            self.outs = nn.ModuleList(nn.Linear(model.state_size, model.embed) for _ in layers)

        def forward(self, tokens, targets):
            x = self.embed(tokens)
            for norm, cell, out in zip(self.norms, self.cells, self.outs, strict=False):
                x = x + out(cell(norm(x))[0])
            logits = self.norms[-1](x) @ self.embed.weight.T
            return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    stack, rate = Stack(), config.optimizer.resolved().learning_rate
    nn.init.normal_(stack.embed.weight, std=0.02)
    adamw = torch.optim.AdamW(stack.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step():
        loss = stack(*(torch.from_numpy(x).long() for x in batch))
        loss.backward()
        nn.utils.clip_grad_norm_(stack.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    return TimedStep(f"torch.nn.{layer.__name__}", step, sum(p.numel() for p in stack.parameters())), batch[0].shape


if __name__ == "__main__":
    main()
