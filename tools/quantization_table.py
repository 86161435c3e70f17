"""Print the table of docs/models.md: error of the gradient and loss by `model.quantization`.

python tools/quantization_table.py [--steps=200] [--seeds=2]     # a few minutes on two cores

The last row also quantizes the operands of the weights' gradients to int8, with a scale for each input and each output
over all tokens, which llmjax does not offer.
"""

import argparse
import contextlib
import dataclasses
from unittest import mock

from coord_check import FAMILIES, Run, batch
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import qwix

from llmjax.models import registry
from llmjax.nn import linear, losses, quantized

MODEL = FAMILIES["decoder"](64, vocab_size=256, vocab_multiple=1, num_layers=2)
RATE = 2.0**-8  # the best rate at this width in the sweep of tools/coord_check.py
ALL_INT8 = "int8, weight gradients too"


def int8_weight_gradient(x, cotangent, num_inputs):
    """`linear._weight_gradient` with operands of int8."""
    rows = tuple(range(x.ndim - num_inputs))
    quantize = lambda a: qwix.quantize(a, jnp.int8, channelwise_axes=range(len(rows), a.ndim))
    return qwix.dot_general(quantize(x), quantize(cotangent), ((rows, rows), ((), ())))


def choose(name: str):
    """(config, a context in which it is traced) of a row of the table."""
    if name == ALL_INT8:
        patch = mock.patch.object(linear, "_weight_gradient", int8_weight_gradient)
        return dataclasses.replace(MODEL, quantization="int8"), patch
    return dataclasses.replace(MODEL, quantization=name), contextlib.nullcontext()


def train(name: str, steps: int, seed: int) -> tuple[Run, float]:
    """A trained model, and its mean loss of the last tenth of the steps."""
    config, context = choose(name)
    with context:
        run = Run(config, RATE, steps, seed=seed, schedule="linear")
        return run, float(np.mean(run.train(steps)[-max(1, steps // 10) :]))


def gradient(name: str, params) -> np.ndarray:
    """The gradient of one batch's loss by the weights of linear layers, as one vector."""
    config, context = choose(name)
    rows = batch(MODEL, 10_000)
    graph = registry.abstract(config)[0]

    def loss(params):
        model = nnx.merge(graph, params)
        sums = losses.cross_entropy(model(rows).hidden, model.unembed, rows.targets, rows.weights, chunk=64, z_loss=0.0)
        return sums.nats / jnp.sum(rows.weights)

    with context:
        blocks = jax.jit(jax.grad(loss))(params)["blocks"]
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(blocks) if leaf.ndim > 2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    print(
        f"width 64: relative error of the gradient after {args.steps} steps; loss of their last tenth, seeds 0 to "
        f"{args.seeds - 1}\n"
    )
    print("| model.quantization | error of the gradient | loss by seed | mean |\n|---|---|---|---|")
    params = train("none", args.steps, 0)[0].state.params
    exact = gradient("none", params)
    for name in (*quantized.QUANTIZATIONS, ALL_INT8):
        error = np.linalg.norm(gradient(name, params) - exact) / np.linalg.norm(exact)
        found = [train(name, args.steps, seed)[1] for seed in range(args.seeds)]
        by_seed = ", ".join(f"{loss:.3f}" for loss in found)
        print(f"| {name} | {error:.1%} | {by_seed} | {np.mean(found):.3f} |", flush=True)


if __name__ == "__main__":
    main()
