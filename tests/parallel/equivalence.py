"""The equivalence matrix: every mesh axis, pair and useful triple, against one device in float32.

A cell is a mesh and a family. Rows are packed in every cell. The cells of a family go through the variants in turn, and
so do those of a mesh, so that each axis meets each family, and each family and each axis meet each variant.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import numpy as np

from llmjax.batch import Batch
from llmjax.models import registry
from llmjax.models.base import BaseModelConfig
from llmjax.models.decoder_config import DecoderConfig
from llmjax.models.encdec import EncDecConfig
from llmjax.models.encoder import EncoderConfig
from llmjax.models.moe import MoeConfig
from llmjax.models.recurrent import RecurrentConfig
from llmjax.parallel import axes, backends
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.train.step import accumulate_gradients, make_loss
from tests.batches import packed_for, packed_pairs

ROWS, SEQ, VOCAB = 16, 32, 64
TRIPLES = (
    ("slice", "data", "fsdp"),
    ("slice", "fsdp", "tensor"),
    ("slice", "fsdp", "sequence"),
    ("slice", "fsdp", "expert"),
    ("data", "fsdp", "tensor"),
    ("fsdp", "expert", "tensor"),
    ("fsdp", "expert", "sequence"),
    ("fsdp", "sequence", "tensor"),
)
_SMALL = dict(vocab_size=VOCAB, vocab_multiple=16, num_layers=2, embed=16)
_HEADS = dict(num_heads=8, head_dim=4)
FAMILIES: dict[str, BaseModelConfig] = {
    "dense": DecoderConfig(**_SMALL, **_HEADS, mlp=32, window=7, attention_pattern="lg"),
    "MoE": MoeConfig(**_SMALL, **_HEADS, mlp=16, num_experts=8, experts_per_token=2, biases="all"),
    "MLA": MoeConfig(
        **_SMALL,
        **_HEADS,
        mlp=16,
        num_experts=8,
        experts_per_token=3,
        shared_experts=1,
        dense_layers=1,
        router="sigmoid",
        expert_bias=True,
        latent=8,
        rope_dim=4,
    ),
    "encoder": EncoderConfig(**_SMALL, **_HEADS, mlp=32, max_positions=SEQ, attention_pattern="lg", window=5),
    "encoder-decoder": EncDecConfig(
        **_SMALL, **_HEADS, start_id=0, mlp=32, relative_buckets=8, relative_distance=20, tie_embeddings=True
    ),
    "recurrent": RecurrentConfig(**_SMALL, cell="gru", mlp=32, tie_embeddings=True),
}
# Variant -> (changes of the model's config, microbatches of a step). The reference is the plain one.
VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 1),
    "accumulation": ({}, 2),
    "remat": ({"remat": "attention"}, 1),
    "scan off": ({"scan": False}, 1),
    "blockwise": ({"attention": "blockwise"}, 1),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One comparison: mesh axis -> size, family and variant."""

    sizes: tuple[tuple[str, int], ...]
    family: str
    variant: str

    @property
    def mesh(self) -> str:
        """The mesh in words, such as "fsdp 2 x tensor 4"."""
        return " x ".join(f"{axis} {size}" for axis, size in self.sizes)

    def __str__(self) -> str:
        return f"{self.mesh}, {self.family}, {self.variant}"


def cells() -> list[Cell]:
    """Every cell that is not refused, mesh by mesh."""
    meshes = [((axis, 8),) for axis in axes.MESH_AXES]
    meshes += [((a, 2), (b, 4)) for a, b in itertools.combinations(axes.MESH_AXES, 2)]
    meshes += [tuple((axis, 2) for axis in triple) for triple in TRIPLES]
    variants = list(VARIANTS)
    return [
        Cell(sizes, family, variants[(row + column) % len(variants)])
        for row, sizes in enumerate(meshes)
        for column, family in enumerate(FAMILIES)
        if is_supported(family, dict(sizes))
    ]


def representative_cells() -> list[Cell]:
    """One cell of each mesh; the families take turns."""
    by_mesh = [list(group) for _, group in itertools.groupby(cells(), key=lambda cell: cell.mesh)]
    return [group[index % len(group)] for index, group in enumerate(by_mesh)]


def is_supported(family: str, sizes: dict[str, int]) -> bool:
    """Whether the family can use the mesh; tests/models has a test for each refusal."""
    if "sequence" in sizes and family == "recurrent":
        return False
    return "expert" not in sizes or family in ("MoE", "MLA")


@functools.cache
def make_batch(family: str) -> Batch:
    """A packed batch of the family, of lengths that eight devices can share."""
    if FAMILIES[family].reads_source:
        return packed_pairs(ROWS, SEQ, 2 * SEQ, VOCAB - 14)
    return packed_for(FAMILIES[family], ROWS, SEQ, VOCAB - 14)


@functools.cache
def make_params(family: str) -> dict:
    """Random numbers for every leaf, so that no bias is 0 and no scale is 1."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(np.float32), registry.abstract(FAMILIES[family])[1]
    )


def run(family: str, variant: str, mesh: MeshConfig | None) -> tuple[float, dict]:
    """(loss, gradients) of a step, both summed over the batch; `mesh` None: on one device."""
    changes, accumulation = VARIANTS[variant]
    fields = {name: value for name, value in changes.items() if hasattr(FAMILIES[family], name)}
    graph, _, names = registry.abstract(dataclasses.replace(FAMILIES[family], **fields))
    loss = make_loss(graph, seed=0, chunk=8, z_loss=1e-3)
    gradients = functools.partial(accumulate_gradients, loss, accumulation=accumulation)
    devices = jax.devices()[:1] if mesh is None else None
    with axes.use_mesh(make_mesh(mesh or MeshConfig(), devices)):
        params = make_params(family)
        params = jax.device_put(params, axes.shardings(names, params))
        batch = jax.device_put(make_batch(family), backends.batch_sharding())
        grads, (sums, aux_loss, _) = jax.device_get(jax.jit(gradients)(params, batch))
    return sums.nats + sums.z + aux_loss, grads


@functools.cache
def reference(family: str) -> tuple[float, dict]:
    """The loss and gradients of the plain variant on one device."""
    return run(family, "plain", None)


def compare(cell: Cell) -> tuple[float, float]:
    """Relative differences of the loss, and of the gradients: the largest of any leaf.

    That of a leaf is its largest difference over its largest value, or over a thousandth of the largest value of all
    leaves: some gradients are 0 but for rounding.
    """
    loss, grads = run(cell.family, cell.variant, MeshConfig(**{"data": 1, **dict(cell.sizes)}))
    expected_loss, expected = reference(cell.family)
    pairs = list(zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True))
    smallest = 1e-3 * max(np.abs(leaf).max() for _, leaf in pairs)
    differences = [np.abs(a - b).max() / max(np.abs(b).max(), smallest) for a, b in pairs]
    return abs(float(loss) / float(expected_loss) - 1), float(max(differences))
