"""Compare the training steps of several systems: each runs in a process of its own, and only in its turn."""

from collections.abc import Sequence
import contextlib
import dataclasses
import importlib.util
import json
import os
from pathlib import Path
import statistics
import subprocess
import sys
import time
from typing import Any

from llmjax.models.decoder_config import DecoderConfig
from llmjax.parallel.device_facts import peak_flops
from llmjax.run import config as run_config
from llmjax.run.config import RunConfig

SYSTEMS = ("llmjax", "torch eager", "torch compile")
# Against long rows, also with attention as three operations, of which the scores of whole rows are kept.
LONG_ROW_SYSTEMS = ("llmjax", "torch eager", "torch plain", "torch compile")
INSTALL_TORCH = """\
PyTorch is not a dependency. For its rows install its CPU build first (the default package contains CUDA; PyTorch's
install page names the index of CPU wheels), then the extra:
  .venv/bin/pip install -e '.[bench]' -c constraints.txt
"""


class Peer:
    """A process that trains one decoder. It has started and compiled when the constructor returns.

    parameters   number of parameters of its model
    device_kind  name of its device in JAX or PyTorch
    first_step   seconds from the start of the process to the end of its first step
    """

    def __init__(self, system: str, config: dict[str, Any], device: str, document: int):
        self.system, started = system, time.perf_counter()
        program = [sys.executable, str(Path(__file__).with_name("peer_process.py"))]
        self._process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment(device)
        )
        ready = self._ask({"system": system, "config": config, "device": device, "document": document})
        self.parameters, self.device_kind = ready["parameters"], ready["device_kind"]
        self.first_step = time.perf_counter() - started

    def turn(self, seconds: float) -> float:
        """Mean seconds of a step over about `seconds`, after one step that fills the caches."""
        return self._ask({"seconds": seconds})["step"]

    def matmul(self) -> float:
        """Flops per second of this system's fastest square matrix product, an upper limit for every model."""
        return self._ask({"matmul": True})["flops"]

    def memory(self) -> int:
        """Bytes that the steps so far needed at most, beyond those of the imported framework; 0: unknown."""
        return self._ask({"memory": True})["bytes"]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit(f"{self.system} ended with status {self._process.wait()}; see its output above")
        return json.loads(answer)


def environment(device: str) -> dict[str, str]:
    """Environment variables that select the CPU alone, or the first GPU alone.

    On CPU, glibc allocates huge pages for all systems alike: the temporary memory of a step is mapped again each time,
    which takes a fifth of a small step with pages of 4 KiB.
    """
    if device == "cpu":
        tunables = os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
        return {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "GLIBC_TUNABLES": tunables}
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


def resolve_config(file: str, overrides: dict[str, Any], vocab_size: int) -> RunConfig:
    """A config in which every size has a value, as other systems need it."""
    config = run_config.resolve(file, [(field, str(value)) for field, value in overrides.items()])
    model = run_config.with_vocabulary(config, vocab_size).model
    assert isinstance(model, DecoderConfig), "the peers are decoders"
    model = dataclasses.replace(model, num_kv_heads=model.kv_heads, head_dim=model.head_size, mlp=model.mlp_size)
    return dataclasses.replace(config, model=model, optimizer=config.optimizer.resolved())


@dataclasses.dataclass
class Result:
    """Seconds of a step of one system in each turn, its memory in bytes, and the flops per second of its matmul."""

    peer: Peer
    steps: list[float] = dataclasses.field(default_factory=list)
    memory: int = 0
    product: float = 0.0

    def turn(self, seconds: float) -> None:
        self.steps.append(self.peer.turn(seconds))
        self.memory = self.memory or self.peer.memory()  # in the first turn, before the first matrix product
        self.product = max(self.product, self.peer.matmul())


def compare(
    name: str,
    config: RunConfig,
    *,
    turns: int,
    seconds: float,
    device: str,
    document: int = 0,
    systems: Sequence[str] = SYSTEMS,
) -> None:
    """Print the tokens a second of every system that is installed.

    document tokens of the documents in a row, which llmjax does not let see each other; 0: a row is one document
    systems  which of them, llmjax first; "torch plain" is eager PyTorch with attention as matmul, softmax and matmul
    device   "cpu": the processes take turns, since the load of a CPU changes; "gpu": one after the other, for memory
    """
    model, rows, seq = config.model, config.train.global_batch, config.data.seq_len
    shape = f"{model.num_layers} layers x {model.embed}, {rows} x {seq} tokens, {model.dtype}"
    if document:
        shape += f", documents of {document} tokens"
    print(f"\nspeed, {name}: {shape}; {load()}", flush=True)
    installed = systems if importlib.util.find_spec("torch") else systems[:1]
    results: list[Result] = []
    for group in [installed] if device == "cpu" else [(system,) for system in installed]:
        with contextlib.ExitStack() as stack:
            tree, running = run_config.to_json(config), []
            for system in group:  # one after the other, so that no other system slows a first step
                running.append(Result(stack.enter_context(contextlib.closing(Peer(system, tree, device, document)))))
            for _ in range(turns):
                for result in running:
                    result.turn(seconds)
            results += running
    if len({result.peer.parameters for result in results}) > 1:
        sys.exit(f"not the same model: {[(r.peer.system, r.peer.parameters) for r in results]} parameters")
    print_results(results, rows * seq, model.flops_per_token(seq))
    print(f"  {turns} turns of {seconds:g} s each; {load()}", flush=True)
    if len(installed) == 1:
        print(INSTALL_TORCH)


def print_results(results: list[Result], tokens: int, flops: float) -> None:
    """One row a system, for `tokens` in a step and model `flops` a token."""
    limit, reference = max(result.product for result in results), statistics.median(results[0].steps)
    peak = peak_flops(results[0].peer.device_kind)
    columns = f"{'tokens/s':>10}{'step':>10}{'(min - max)':>18}{'of limit':>10}{'MFU' if peak else '':>7}"
    print(f"  {'':14}{columns}{'of llmjax':>10}{'first step':>12}{'memory':>10}")
    for result in results:
        middle = statistics.median(result.steps)
        rate, span = flops * tokens / middle, f"({min(result.steps):.3f} - {max(result.steps):.3f})"
        mfu = f"{rate / peak:.1%}" if peak else ""
        print(
            f"  {result.peer.system:14}{tokens / middle:>10,.0f}{middle:>8.3f} s{span:>18}{rate / limit:>10.0%}{mfu:>7}"
            f"{middle / reference:>9.2f}x{result.peer.first_step:>10.1f} s"
            + (f"{result.memory / 2**20:>7,.0f} MB" if result.memory else "")
        )
    print(
        f"  {'limit':14}{limit / flops:>10,.0f}{tokens * flops / limit:>8.3f} s{'':18}{1:>10.0%}"
        f"{'':{7 if peak else 0}}{tokens * flops / limit / reference:>9.2f}x"
    )
    measured = ", ".join(f"{result.peer.system} {result.product / 1e9:,.0f}" for result in results)
    print(f"  best matrix product in Gflop/s: {measured}; parameters: {results[0].peer.parameters:,}")


def load() -> str:
    """The load of the machine, on which every time depends."""
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
