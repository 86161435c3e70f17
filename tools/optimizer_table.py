"""Print the table of docs/optimizers.md: bytes per parameter of the state of each optimizer.

python tools/optimizer_table.py [--config=configs/gpt2.py:124M] [--vocab_size=50257]
"""

import argparse
import math

import jax

from llmjax.models import registry
from llmjax.optim.config import DEFAULTS, OptimizerConfig
from llmjax.optim.optimizer import make_optimizer
from llmjax.run import config as run_config


def state_bytes(shapes: dict, axes: dict, **settings) -> int:
    """Bytes of the optimizer's state, counted on abstract arrays: nothing is allocated."""
    optimizer = make_optimizer(OptimizerConfig(**settings), horizon=1_000, axes=axes)
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(optimizer.init, shapes))
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/gpt2.py:124M")
    parser.add_argument("--vocab_size", type=int, default=50_257, help="tokens, which a run takes from its tokenizer")
    args = parser.parse_args()
    config = run_config.with_vocabulary(run_config.resolve(args.config, []), args.vocab_size)
    _, shapes, axes = registry.abstract(config.model)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    print(f"{args.config}: {count:,} parameters, float32\n")
    print("| optimizer | state, bytes per parameter | with parameters and gradients |")
    print("|---|---|---|")
    for name in DEFAULTS:
        state = state_bytes(shapes, axes, name=name) / count
        print(f"| {name} | {state:.2f} | {state + 8:.2f} |")
    average = state_bytes(shapes, axes, name="sgd", ema_decay=0.999) - state_bytes(shapes, axes, name="sgd")
    print(f"| ema_decay above 0 | +{average / count:.2f} | +{average / count:.2f} |")


if __name__ == "__main__":
    main()
