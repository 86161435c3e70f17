"""Which parameters are trained, and the tree of parameters split by it.

A tree of some of the parameters has None in place of the others, which JAX treats as an empty subtree: no gradient and
no optimizer state exists for them.
"""

from typing import Any

import jax

from llmjax import patterns
from llmjax.batch import Params
from llmjax.checkpoint.fingerprint import leaf_name
from llmjax.errors import UserError
from llmjax.optim.config import OptimizerConfig


def choose_trainable(config: OptimizerConfig, shapes: Params) -> Params:
    """For each parameter whether it is trained: a tree of booleans.

    Trained are adapters and what optimizer.trainable selects; where there is neither, all; in every case without what
    optimizer.frozen selects. Raises UserError for a pattern that matches no parameter, for weights of 8 bits, which
    cannot be trained, and where nothing would be.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    names = [leaf_name(path) for path, _ in leaves]
    for field in ("trainable", "frozen"):
        patterns.check(f"optimizer.{field}", getattr(config, field), names, "parameter")
    is_adapter = [".adapter." in name for name in names]
    by_default = not any(is_adapter) and not config.trainable
    chosen = [
        (by_default or adapter or patterns.matches(name, config.trainable))
        and not patterns.matches(name, config.frozen)
        for name, adapter in zip(names, is_adapter, strict=True)
    ]
    for name, (_, leaf), trained in zip(names, leaves, chosen, strict=True):
        if trained and leaf.dtype.itemsize == 1:
            raise UserError(
                f"optimizer.trainable={config.trainable}: {name} is stored in 8 bits, which cannot be trained; set "
                "model.lora.int8_base=false, or name other parameters"
            )
    if not any(chosen):
        raise UserError(f"optimizer.frozen={config.frozen}: no parameter is left to train; remove a pattern")
    return tree.unflatten(chosen)


def split(params: Params, trainable: Params) -> tuple[Params, Params]:
    """(trained, frozen): two trees like `params`, each with None in place of the other's leaves."""
    choose = lambda kept: jax.tree.map(
        lambda is_trained, leaf: leaf if is_trained == kept else None,
        trainable,
        params,
    )
    return choose(True), choose(False)


def merge(trained: Params, frozen: Params) -> dict[str, Any]:
    """The inverse of `split`."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda node: node is None)
