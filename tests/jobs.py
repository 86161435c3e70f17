"""Real jobs for tests: `llmjax` commands in processes of their own, on tiny corpora and tiny models."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
LLMJAX = pathlib.Path(sys.executable).with_name("llmjax")

# A model on bytes that compiles in seconds, with every feature that exactness depends on: packing, dropout, clipping.
TINY = {
    "data.tokenizer.kind": "bytes",
    "data.seq_len": 64,
    "data.split.near_copies": "False",
    "data.workers": 1,
    "model.num_layers": 2,
    "model.embed": 32,
    "model.num_heads": 8,
    "model.num_kv_heads": 4,
    "model.mlp": 64,
    "model.dropout": 0.1,
    "train.steps": 12,
    "train.global_batch": 16,
    "train.log_every": 1,
    "train.loss_chunk": 32,
    "checkpoint.every": 4,
    "checkpoint.keep": 10,
    "sample.prompts": "()",
    "optimizer.warmup_steps": 1,
}


# Starts that share a folder of compiled programs compile nothing again, however fast a program compiles.
CACHE_ALL_PROGRAMS = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

# A model on bytes for tests that train to a score in this process.
ONE_LAYER = {
    "data.tokenizer.kind": "bytes",
    "data.workers": 1,
    "data.split.near_copies": "False",
    "model.num_layers": 1,
    "model.embed": 32,
    "model.num_heads": 2,
    "model.scan": "False",
    "optimizer.warmup_steps": 3,
    "eval.every": 0,
}

# llmjax with a pause after every step beyond SLOW_AFTER. JAX looks for a signal once a second, and then has processes
# agree on a step to stop at: a tiny job would end first.
SLOW_TRAINING = """
import os, time
from llmjax.cli import main
from llmjax.train.logger import MetricsLogger

record = MetricsLogger.record

def record_slowly(logger, step, *arguments):
    record(logger, step, *arguments)
    if step > float(os.environ.get("SLOW_AFTER", "inf")):
        time.sleep(2)

MetricsLogger.record = record_slowly
main.main()
"""


def write_corpus(folder: pathlib.Path, documents: int = 60) -> pathlib.Path:
    """A folder of text files cut from this repository's own tests and sources, with a few thousand bytes each."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted((ROOT / "llmjax").rglob("*.py"))
    text = "".join(path.read_text() for path in sources)
    for number in range(documents):
        # At the start of a line: a piece that begins inside one may begin with the magic bytes of another format.
        start = text.rfind("\n", 0, number * len(text) // documents) + 1
        (folder / f"{number:03d}.txt").write_text(text[start : start + 500 + 37 * number])
    return folder


def command(verb: str, workdir: pathlib.Path, corpus: pathlib.Path | None = None, **changes) -> list[str]:
    """`llmjax VERB` with the tiny settings (and `changes`, dots written as two underscores)."""
    arguments = [str(LLMJAX), verb, f"--workdir={workdir}"]
    if verb not in ("prepare", "train"):
        return arguments
    settings = {**TINY, **{name.replace("__", "."): value for name, value in changes.items()}}
    if corpus is not None:
        settings["data.sources.main.path"] = f"{corpus}/*.txt"
    arguments.append(f"--config={ROOT / 'configs' / 'quickstart.py'}")
    return arguments + [f"--config.{name}={value}" for name, value in settings.items()]


def environment(**more: str) -> dict[str, str]:
    """This environment, on CPU, without a test's own device settings. XLA_FLAGS of the tests compile fast."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLMJAX_")}
    return {**inherited, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", **more}


def launch(arguments: list[str], processes: int = 1, devices: int = 8, *options: str) -> list[str]:
    """The command as a job of several processes with emulated devices, with further options of the launcher."""
    launcher = [sys.executable, str(ROOT / "launch" / "local.py"), f"--processes={processes}", f"--devices={devices}"]
    return [*launcher, *options, "--", *arguments]


def run(arguments: list[str], *, status: int = 0, timeout: float = 240, **env: str) -> str:
    """Run to the end, check the exit status, return what was printed."""
    process = subprocess.run(
        arguments, capture_output=True, text=True, timeout=timeout, env=environment(**env), check=False
    )
    printed, code = process.stdout + process.stderr, process.returncode
    assert code == status, f"exit {code}, expected {status}:\n{' '.join(arguments)}\n{printed}"
    return printed


def kill_after_checkpoint(arguments: list[str], folder: pathlib.Path, **env: str) -> None:
    """Run the command, and kill it by SIGKILL as soon as the folder of a checkpoint is there."""
    job = subprocess.Popen(arguments, env=environment(**env), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not folder.exists():
        assert job.poll() is None, "the job ended before it could be killed"
        time.sleep(0.01)
    os.kill(job.pid, signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL


def metrics(workdir: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def checkpoints(workdir: pathlib.Path) -> dict[int, dict]:
    """The entry of each checkpoint in `llmjax inspect --json`, by step."""
    entries = json.loads(run([str(LLMJAX), "inspect", f"--workdir={workdir}", "--json"]))["checkpoints"]
    assert [entry["step"] for entry in entries] == sorted(entry["step"] for entry in entries)
    return {entry["step"]: entry for entry in entries}


def trace(workdir: pathlib.Path) -> list[tuple]:
    """(step, loss, batch digest, gradient norm) of every step, which must repeat bit for bit."""
    return [(line["step"], line["loss"], line["batch_digest"], line["grad_norm"]) for line in metrics(workdir)]


def final_fingerprint(workdir: pathlib.Path, step: int) -> str:
    """The fingerprint of parameters and optimizer state at the end of a run, which its evaluation records."""
    return json.loads((workdir / "eval" / str(step) / "validation.json").read_text())["fingerprint"]
