"""Print the table of docs/optimizers.md: bytes and loss by the type in which AdamW stores its moments.

python tools/moment_table.py [--steps=200] [--seeds=2]     # a few minutes on two cores
"""

import argparse

from coord_check import FAMILIES, Run
import numpy as np

from llmjax.optim.config import OptimizerConfig
from llmjax.optim.moments import MOMENT_DTYPES
from llmjax.plan import count
from llmjax.run import config as run_config

MODEL = FAMILIES["decoder"](64, vocab_size=256, vocab_multiple=1, num_layers=2)
RATE = 2.0**-8  # the best rate at this width in the sweep of tools/coord_check.py


def final_loss(moment_dtype: str, steps: int, seed: int) -> float:
    """Mean loss of the last tenth of the steps."""
    run = Run(MODEL, RATE, steps, seed=seed, schedule="linear", moment_dtype=moment_dtype)
    return float(np.mean(run.train(steps)[-max(1, steps // 10) :]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    gpt2 = run_config.with_vocabulary(run_config.resolve("gpt2:124M", []), 50_257).model
    print(
        f"bytes of GPT-2 124M; loss of the last tenth of {args.steps} steps at width 64, seeds 0 to {args.seeds - 1}\n"
    )
    print("| moment_dtype | state, bytes per parameter | loss by seed | mean |")
    print("|---|---|---|---|")
    for dtype in MOMENT_DTYPES:
        state = count.state_bytes_per_parameter(gpt2, OptimizerConfig(moment_dtype=dtype)) - 8
        losses = [final_loss(dtype, args.steps, seed) for seed in range(args.seeds)]
        by_seed = ", ".join(f"{loss:.3f}" for loss in losses)
        print(f"| {dtype} | {state:.2f} | {by_seed} | {np.mean(losses):.3f} |", flush=True)


if __name__ == "__main__":
    main()
