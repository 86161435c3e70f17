#!/usr/bin/env python3
"""Measure the attention kernels: milliseconds and temporary memory of one layer's forward and backward pass.

python tools/bench_attention.py                       rows of 512 to 8,192 tokens: about 3 minutes on 2 cores
python tools/bench_attention.py --seq 2048 --heads 12 other shapes

Each line of the table is one row of tokens, float32, with one document or with documents of 512 tokens that do not see
each other. The peer is PyTorch's scaled_dot_product_attention with is_causal=True, which attends across documents; it
is left out where PyTorch is not installed. All kernels take turns, and the median turn counts. Memory is the compiler's
figure.
"""

import argparse
from collections.abc import Callable
import importlib.util
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.nn.kernels import KERNELS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192], help="tokens of a row")
    parser.add_argument("--heads", type=int, default=6, help="heads (default 6)")
    parser.add_argument("--head_dim", type=int, default=64, help="width of a head (default 64)")
    parser.add_argument("--turns", type=int, default=5, help="turns of each kernel (default 5)")
    parser.add_argument("--dot_limit", type=int, default=4096, help="longest row for dot (default 4096)")
    options = parser.parse_args()
    print(f"{'tokens':>8}  {'documents of':>12}  {'blockwise':>16}  {'dot':>16}  {'torch':>9}")
    for seq in options.seq:
        for document in dict.fromkeys((seq, min(seq, 512))):
            times, memory = measure(seq, document, options)
            cells = [format_kernel(times.get(name), memory.get(name)) for name in ("blockwise", "dot")]
            torch = f"{1e3 * times['torch']:5.1f} ms" if "torch" in times else ""
            print(f"{seq:>8,}  {document:>12,}  {cells[0]:>16}  {cells[1]:>16}  {torch:>9}", flush=True)


def format_kernel(seconds: float | None, memory: int | None) -> str:
    """Time and memory of a kernel; empty for one that was left out."""
    return "" if seconds is None or memory is None else f"{1e3 * seconds:7.1f} ms {memory / 2**20:4.0f} MB"


def measure(seq: int, document: int, options: argparse.Namespace) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds of each kernel, and the bytes of temporary memory of ours."""
    shape = (1, seq, options.heads, options.head_dim)
    arrays = [np.random.default_rng(seed).normal(size=shape).astype(np.float32) for seed in range(3)]
    segments, positions = jnp.arange(seq)[None] // document + 1, jnp.arange(seq)[None] % document
    runs: dict[str, Callable[[], None]] = {}
    memory = {}
    for name, kernel in KERNELS.items():
        if "cpu" not in kernel.platforms or (name == "dot" and seq > options.dot_limit):
            continue

        def total(q, k, v, segments, positions, kernel=kernel):
            return jnp.sum(kernel.make_mask(segments, positions, causal=True).attend(q, k, v))

        inputs = (*map(jnp.asarray, arrays), segments, positions)
        compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(*inputs).compile()
        runs[name] = lambda compiled=compiled, inputs=inputs: jax.block_until_ready(compiled(*inputs))
        analysis = compiled.memory_analysis()
        assert analysis is not None
        memory[name] = analysis.temp_size_in_bytes
    if importlib.util.find_spec("torch"):
        runs["torch"] = torch_run(arrays)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(options.turns + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}, memory


def torch_run(arrays: list[np.ndarray]) -> Callable[[], None]:
    """The same forward and backward pass by PyTorch."""
    import torch  # pyright: ignore[reportMissingImports]  (the extra `bench`)

    q, k, v = (torch.from_numpy(x.swapaxes(1, 2).copy()).requires_grad_() for x in arrays)

    def run() -> None:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    return run


if __name__ == "__main__":
    main()
