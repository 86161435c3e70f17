"""Measure the memory of `llmjax import`: writes a checkpoint of some hundred megabytes, imports it, prints the peak."""

import argparse
import json
import logging
import os
from pathlib import Path
import subprocess
import sys
import tempfile
import threading
import time

ROOT = Path(__file__).resolve().parents[1]
VOCAB, EMBED, MLP, HEADS = 32_000, 1024, 4096, 16


def write_checkpoint(folder: Path, megabytes: int) -> int:
    """A Llama of about that size in bfloat16, in shards of 100 MB, with a tokenizer of bytes. Returns its bytes."""
    import ml_dtypes
    import numpy as np
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from llmjax.interop import files

    matrices = {"self_attn.q": (EMBED, EMBED), "self_attn.k": (EMBED, EMBED), "self_attn.v": (EMBED, EMBED)}
    matrices |= {"self_attn.o": (EMBED, EMBED), "mlp.gate": (MLP, EMBED), "mlp.up": (MLP, EMBED)}
    matrices |= {"mlp.down": (EMBED, MLP)}
    layer = sum(2 * a * b for a, b in matrices.values())
    layers = max(1, round((megabytes * 1e6 - 4 * VOCAB * EMBED) / layer))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, EMBED), "lm_head.weight": (VOCAB, EMBED)}
    for number in range(layers):
        block = f"model.layers.{number}."
        shapes |= {f"{block}{name}_proj.weight": shape for name, shape in matrices.items()}
        shapes |= {f"{block}{name}.weight": (EMBED,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes["model.norm.weight"] = (EMBED,)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": EMBED,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "intermediate_size": MLP,
        "rms_norm_eps": 1e-5,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    make = lambda name: rng.standard_normal(shapes[name], np.float32).astype(ml_dtypes.bfloat16)
    specs = {name: ("BF16", shape) for name, shape in shapes.items()}
    paths = files.write_folder(folder, specs, make, limit=100_000_000)
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return sum(path.stat().st_size for path in paths)


def measure(folder: Path, workdir: Path) -> dict[str, int]:
    """Bytes in this process: before reading, and the peaks of reading and of saving beyond that."""
    import jax

    from llmjax.interop import importing

    jax.block_until_ready(jax.numpy.ones(8) + 1)
    memory = PeakMemory()
    before, peaks = resident(), {}

    class PeakAtSaving(logging.StreamHandler):  # to stderr
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("writing checkpoint"):
                peaks["reading"] = memory.reset()
                peaks["loaded"] = resident()
            super().emit(record)

    logger = logging.getLogger("llmjax")
    logger.setLevel(logging.INFO)
    logger.addHandler(PeakAtSaving())

    from etils import epath

    imported = importing.import_checkpoint(folder, epath.Path(workdir))
    peaks["saving"] = memory.reset()
    return {"before": before, "parameters": 4 * imported.parameters, **{k: v - before for k, v in peaks.items()}}


class PeakMemory:
    """The highest resident size, measured every 2 ms."""

    def __init__(self):
        self.peak = 0
        threading.Thread(target=self._measure, daemon=True).start()

    def _measure(self) -> None:
        while True:
            self.peak = max(self.peak, resident())
            time.sleep(0.002)

    def reset(self) -> int:
        """The peak since the last call."""
        peak, self.peak = max(self.peak, resident()), 0
        return peak


def resident() -> int:
    """Resident bytes of this process, mapped files included (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=500, help="of the checkpoint, in bfloat16")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--workdir", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.folder:
        print(json.dumps(measure(flags.folder, flags.workdir)))
        return
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(Path(folder) / "in", flags.megabytes)
        command = [sys.executable, __file__, f"--folder={folder}/in", f"--workdir={folder}/run"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        result = json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
    arrays = result["parameters"]
    print(f"checkpoint {size / 1e6:,.0f} MB on disk, {arrays / 1e6:,.0f} MB as float32 arrays, one CPU device")
    for name in ("reading", "loaded", "saving"):
        print(f"  {name:8} {result[name] / 1e6:8,.0f} MB above the {result['before'] / 1e6:,.0f} MB before the import")
    print(f"  limit    {(size + 2 * arrays) / 1e6:8,.0f} MB = checkpoint + twice its arrays")


if __name__ == "__main__":
    main()
