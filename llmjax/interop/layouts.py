"""How a tensor lies on disk and with us: pairs of `take` and `give` for rules, views one way and exact the other.

Each function returns keywords for a Rule: `Rule("model.norm.weight", ("norm.scale",))` needs none, a linear map is
`Rule("...q_proj.weight", ("blocks.attention.query.weight",), **matrix((embed,), (heads, head_dim)))`.
"""

from collections.abc import Sequence
import math
from typing import Any


def matrix(inputs: Sequence[int], outputs: Sequence[int]) -> dict[str, Any]:
    """torch's Linear: [product of outputs, product of inputs] on disk, [*inputs, *outputs] here."""
    out = len(outputs)
    forward = (*range(out, out + len(inputs)), *range(out))
    back = (*range(len(inputs), len(inputs) + out), *range(len(inputs)))
    return {
        "take": lambda tensor: (tensor.reshape(*outputs, *inputs).transpose(forward),),
        "give": lambda array: array.transpose(back).reshape(math.prod(outputs), math.prod(inputs)),
    }


def straight(inputs: Sequence[int], outputs: Sequence[int]) -> dict[str, Any]:
    """GPT-2's Conv1D: [product of inputs, product of outputs] on disk, [*inputs, *outputs] here."""
    return {
        "take": lambda tensor: (tensor.reshape(*inputs, *outputs),),
        "give": lambda array: array.reshape(math.prod(inputs), math.prod(outputs)),
    }


def vector(outputs: Sequence[int]) -> dict[str, Any]:
    """A bias: [product of outputs] on disk, [*outputs] here."""
    return {"take": lambda tensor: (tensor.reshape(*outputs),), "give": lambda array: array.reshape(math.prod(outputs))}


def transposed() -> dict[str, Any]:
    """A plain matrix the other way round, such as an untied head: [vocab, embed] on disk, [embed, vocab] here."""
    return {"take": lambda tensor: (tensor.T,), "give": lambda array: array.T}
