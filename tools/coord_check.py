"""Check muP: the change of logits and hidden states after a few steps by width and depth, and the best learning rate.

python tools/coord_check.py                       # the coordinate check of every family, a table and a plot
python tools/coord_check.py --sweep               # the best learning rate by width, standard against muP (15 minutes)

Under muP the change of an activation by a step does not depend on the width. Under the standard parametrization it
grows with the width, so the best rate of a narrow model is too high for a wide one (Yang et al., 2022, arXiv
2203.03466).
"""

import argparse
import dataclasses
import functools
import pathlib
import sysconfig

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
import numpy as np

from llmjax.batch import Batch
from llmjax.models.decoder_config import DecoderConfig
from llmjax.models.encdec import EncDecConfig
from llmjax.models.encoder import EncoderConfig
from llmjax.models.recurrent import RecurrentConfig
from llmjax.optim.config import OptimizerConfig
from llmjax.parallel import axes
from llmjax.run import state as states
from llmjax.train.step import accumulate_gradients, make_loss, train_step

BASE, WIDTHS, DEPTHS = 64, (64, 128, 256, 512), (2, 4, 8)
COMMON = dict(vocab_size=256, vocab_multiple=1, num_layers=2, base_embed=BASE)
# Heads of 16, so that the number of heads grows with the width.
FAMILIES = {
    "decoder": lambda embed, **more: DecoderConfig(embed=embed, num_heads=embed // 16, mlp=2 * embed, **more),
    "encoder": lambda embed, **more: EncoderConfig(embed=embed, num_heads=embed // 16, mlp=2 * embed, **more),
    "encdec": lambda embed, **more: EncDecConfig(embed=embed, num_heads=embed // 16, mlp=2 * embed, **more),
    "lstm": lambda embed, **more: RecurrentConfig(embed=embed, cell="lstm", **more),
}


@functools.cache
def text() -> np.ndarray:
    """Bytes of Python's standard library."""
    files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return np.frombuffer(b"".join(path.read_bytes() for path in files), np.uint8).astype(np.int32)


def batch(config, step: int, rows: int = 8, seq: int = 64) -> Batch:
    """Windows of text for one step; masked for an encoder, with a source for an encoder-decoder."""
    rng = np.random.default_rng(step)
    starts = rng.integers(0, len(text()) - seq - 1, rows)
    windows = np.stack([text()[start : start + seq + 1] for start in starts])
    ones, positions = np.ones((rows, seq), np.int32), np.tile(np.arange(seq, dtype=np.int32), (rows, 1))
    sample = np.stack([np.zeros(rows), step * rows + np.arange(rows)], axis=1).astype(np.uint32)
    batch = Batch(
        inputs=windows[:, :-1],
        targets=windows[:, 1:],
        weights=ones.astype(np.float32),
        segments=ones,
        positions=positions,
        sample=sample,
    )
    if config.family == "encoder":
        hidden = rng.random((rows, seq)) < 0.15
        inputs = np.where(hidden, 0, windows[:, 1:]).astype(np.int32)
        return dataclasses.replace(batch, inputs=inputs, weights=hidden.astype(np.float32))
    if config.family == "encdec":
        return dataclasses.replace(
            batch, source=windows[:, :-1][:, ::-1].copy(), source_segments=ones, source_positions=positions
        )
    return batch


class Run:
    """A model that is trained a few steps on one device."""

    def __init__(
        self, config, learning_rate: float, steps: int, optimizer: str = "adamw", *, seed: int = 0, **settings
    ):
        mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)
        settings = {"schedule": "constant", "warmup_steps": 0, **settings}
        optimizer_config = OptimizerConfig(name=optimizer, learning_rate=learning_rate, **settings)
        with axes.use_mesh(mesh):
            spec = states.make_state_spec(config, optimizer_config, horizon=steps)
            self.state = states.init_state(spec, config, seed)
        loss = make_loss(spec.graph, seed=0, chunk=64, z_loss=0.0)
        self.config = config
        gradients = functools.partial(accumulate_gradients, loss)
        self.step = jax.jit(functools.partial(train_step, gradients=gradients, update=spec.optimizer.update))
        self.activations = jax.jit(lambda params, batch: self._activations(spec.graph, params, batch))

    @staticmethod
    def _activations(graph, params, batch) -> dict[str, jax.Array]:
        model = nnx.merge(graph, params)
        hidden = model(batch).hidden
        return {"hidden": hidden.astype(jnp.float32), "logits": model.unembed(hidden)}

    def train(self, steps: int) -> list[float]:
        """The loss of each step."""
        losses = []
        for step in range(steps):
            self.state, metrics = self.step(self.state, batch(self.config, step))
            losses.append(float(metrics["loss"]))
        return losses


def change_after(config, *, steps: int = 4, learning_rate: float = 5e-3, optimizer: str = "adamw") -> dict[str, float]:
    """Root mean square of the change of hidden states and logits of one batch by `steps` steps."""
    run, probe = Run(config, learning_rate, steps, optimizer), batch(config, 10_000)
    before = run.activations(run.state.params, probe)
    run.train(steps)
    after = run.activations(run.state.params, probe)
    return {name: float(jnp.sqrt(jnp.mean((after[name] - before[name]) ** 2))) for name in before}


def check(svg: pathlib.Path) -> None:
    """Print the table and write the plot."""
    curves = {}
    for family, make in FAMILIES.items():
        print(
            f"\n{family}: root mean square of what 4 steps of AdamW at 5e-3 do, over that of width {BASE} in brackets"
        )
        for parametrization in ("standard", "mup"):
            configs = {width: make(width, **COMMON, parametrization=parametrization) for width in WIDTHS}
            logits = _print_table(parametrization, configs)
            curves[family, parametrization] = [value / logits[0] for value in logits]
    print(f"\ndecoder of width {BASE}, by depth (muP is about widths; depth is for comparison)")
    for parametrization in ("standard", "mup"):
        shapes = {depth: COMMON | {"num_layers": depth, "parametrization": parametrization} for depth in DEPTHS}
        _print_table(parametrization, {depth: FAMILIES["decoder"](BASE, **shape) for depth, shape in shapes.items()})
    _draw(curves, svg)
    print(f"\nplot: {svg}")


def _draw(curves: dict[tuple[str, str], list[float]], path: pathlib.Path) -> None:
    """How far logits move, over the base width, by width: flat under muP."""
    import matplotlib  # pyright: ignore[reportMissingImports]  (the extra `bench`)

    matplotlib.use("svg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for number, family in enumerate(FAMILIES):
        for parametrization, style in (("standard", "--"), ("mup", "-")):
            label = f"{family}, {parametrization}"
            axes.plot(WIDTHS, curves[family, parametrization], style, color=f"C{number}", marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="width", ylabel=f"move of the logits in 4 steps, over width {BASE}")
    axes.set_xticks(WIDTHS, [str(width) for width in WIDTHS])
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)


def _print_table(parametrization: str, configs: dict) -> list[float]:
    """Print a line for hidden states and one for logits; returns the changes of the logits."""
    values = [change_after(config) for config in configs.values()]
    for name in ("hidden", "logits"):
        row = "  ".join(
            f"{size:4}: {value[name]:7.3f} ({value[name] / values[0][name]:5.2f})"
            for size, value in zip(configs, values, strict=True)
        )
        print(f"  {parametrization:9} {name:7} {row}", flush=True)
    return [value["logits"] for value in values]


def sweep(steps: int) -> None:
    """Print the loss by learning rate for each width, and the best rate."""
    rates = [2.0**power for power in range(-10, -4)]
    for parametrization in ("standard", "mup"):
        print(f"\n{parametrization}: mean loss of the last tenth of {steps} steps, by learning rate")
        print("  width   " + "".join(f"  2^{int(np.log2(rate)):3}" for rate in rates) + "    best")
        for width in WIDTHS:
            config = FAMILIES["decoder"](width, **COMMON, parametrization=parametrization)
            found = []
            for rate in rates:
                losses = Run(config, rate, steps, schedule="linear").train(steps)
                found.append(float(np.mean(losses[-max(1, steps // 10) :])))
            best = int(np.nanargmin(found))
            row = "".join(f"{value:7.3f}" for value in found)
            print(f"  {width:5}   {row}   2^{int(np.log2(rates[best]))}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="the best learning rate by width instead")
    parser.add_argument("--steps", type=int, default=200, help="of each run of the sweep (default 200)")
    parser.add_argument("--svg", type=pathlib.Path, default=pathlib.Path("coord_check.svg"), help="where the plot goes")
    flags = parser.parse_args()
    sweep(flags.steps) if flags.sweep else check(flags.svg)


if __name__ == "__main__":
    main()
