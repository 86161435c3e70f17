#!/usr/bin/env python3
"""Measure training on one GPU: tokens a second and MFU of decoders in bfloat16, beside PyTorch on the same card.

python tools/bench_gpu.py                 124M and 1.3B parameters
python tools/bench_gpu.py --size=124M     one of them
python tools/bench_gpu.py --size=tiny     a smoke test of this program that runs on a CPU too; its figures mean nothing

The decoders have the architecture of GPT-2 and rows of 1,024 tokens; 1.3B has the shape of GPT-3 XL. PyTorch runs
them under autocast with scaled_dot_product_attention and fused AdamW, eager and compiled. Each system uses the card
alone, in a process of its own. MFU is the flops that the model needs over the card's peak by its data sheet; the limit
is the fastest bfloat16 matrix product that a system reached.
"""

import argparse
from pathlib import Path
import sys

import jax
from peers import INSTALL_TORCH, compare, resolve_config

from llmjax.errors import UserError

CONFIG = f"{Path(__file__).resolve().parent.parent / 'configs' / 'gpt2.py'}:124M"
# Overrides of that config; remat "none" keeps all activations, "attention" computes most of them again.
SIZES = {
    "124M": {"train.global_batch": 16, "model.remat": "none"},
    "1.3B": {
        "train.global_batch": 8,
        "model.num_layers": 24,
        "model.embed": 2048,
        "model.num_heads": 16,
        "model.remat": "attention",
    },
    "tiny": {
        "train.global_batch": 2,
        "data.seq_len": 64,
        "model.num_layers": 2,
        "model.embed": 64,
        "model.num_heads": 2,
        "model.remat": "none",
    },
}


def main() -> None:
    options = parse_options()
    device = "gpu" if jax.default_backend() == "gpu" else "cpu"
    sizes = options.size or ["124M", "1.3B"]
    if device == "cpu" and set(sizes) - {"tiny"}:
        sys.exit("bench_gpu: JAX sees no GPU; where there is one: pip install -e '.[cuda]' (--size=tiny runs anywhere)")
    for size in sizes:
        overrides = SIZES[size] | ({"train.global_batch": options.batch} if options.batch else {})
        overrides |= {"model.remat": options.remat} if options.remat else {}
        try:
            config = resolve_config(CONFIG, overrides, 50_257)
        except UserError as error:
            sys.exit(f"bench_gpu: {error}")
        compare(size, config, turns=options.turns, seconds=options.seconds, device=device)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{INSTALL_TORCH}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", action="append", choices=SIZES, help="may be given twice (default: 124M and 1.3B)")
    parser.add_argument("--batch", type=int, help="rows in a step (default: 16 for 124M, 8 for 1.3B: for 80 GB)")
    parser.add_argument("--remat", help="model.remat of llmjax (default: none for 124M, attention for 1.3B)")
    parser.add_argument("--turns", type=int, default=5, help="timings of each system (default: 5)")
    parser.add_argument("--seconds", type=float, default=5, help="length of each (default: 5)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
