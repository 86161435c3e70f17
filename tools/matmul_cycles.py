"""Compare matmuls of bfloat16, int8 and float8 by the TPU compiler's cycles.

    python tools/matmul_cycles.py                          # v5e, v5p and v6e: a minute
    python tools/matmul_cycles.py --shape=8192x4096x14336 --chips=v6e

No TPU is needed (extra `plan`). A matmul [rows, inputs] x [inputs, outputs] is compiled alone; its result is scaled and
has type bfloat16, as in a quantized linear layer. A chip that does not compute in float8 takes about as many cycles as
in bfloat16.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
TYPES = ("bfloat16", "int8", "float8_e4m3fn")


def compile_alone(chip: str, dtype: str, shape: tuple[int, int, int]) -> None:
    """Compile the matmul; XLA's dump has the program. Runs in a process of its own, since XLA reads its flags once."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from llmjax.plan import topology as topologies

    device = topologies.devices(topologies.parse(TOPOLOGIES[chip]))[0]
    rows, inputs, outputs = shape
    abstract = lambda dtype, *dims: jax.ShapeDtypeStruct(dims, dtype, sharding=SingleDeviceSharding(device))

    def matmul(x, weight, scale):
        product = jnp.matmul(x, weight, preferred_element_type=jnp.int32 if dtype == "int8" else jnp.float32)
        return (product * scale).astype(jnp.bfloat16)

    operands = abstract(dtype, rows, inputs), abstract(dtype, inputs, outputs), abstract("float32", 1, outputs)
    jax.jit(matmul).lower(*operands).compile()


def cycles(chip: str, dtype: str, shape: str) -> int:
    """The compiler's cycles of the whole program."""
    with tempfile.TemporaryDirectory(prefix="llmjax-matmul-") as folder:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
        environment["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
        command = [sys.executable, __file__, f"--alone={dtype}", f"--chips={chip}", f"--shape={shape}"]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        (program,) = pathlib.Path(folder).glob("*matmul*after_codegen.txt")
        return sum(int(number) for number in re.findall(r'"estimated_cycles":"(\d+)"', program.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default=",".join(TOPOLOGIES))
    parser.add_argument("--shape", default="8192x4096x14336", help="rows x inputs x outputs")
    parser.add_argument("--alone", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        rows, inputs, outputs = (int(size) for size in args.shape.split("x"))
        compile_alone(args.chips, args.alone, (rows, inputs, outputs))
        return
    print(f"{args.shape}, million cycles (speed beside bfloat16)\n")
    print("| chip | " + " | ".join(TYPES) + " |\n| --- " + "| --- " * len(TYPES) + "|")
    for chip in args.chips.split(","):
        found = {dtype: cycles(chip, dtype, args.shape) for dtype in TYPES}
        parts = (f"{count / 1e6:.2f} ({found['bfloat16'] / count:.2f})" for count in found.values())
        print(f"| {chip} | {' | '.join(parts)} |", flush=True)


if __name__ == "__main__":
    main()
