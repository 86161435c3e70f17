"""Persistent compilation cache that every process of a job can read and write."""

import importlib
import logging
import os
import types
from typing import Any

import jax

logger = logging.getLogger(__name__)
# Programs that compile faster are not worth a file, which may be an object of a bucket. JAX reads this variable, too.
_MIN_COMPILE_SECONDS = 0.2
_MIN_COMPILE_VARIABLE = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def enable(folder: str, cpu_threads: int) -> None:
    """Read and write compiled programs in a subfolder of `folder` from now on; "off": do not.

    The subfolder is named after `cpu_threads` (parallel.cpu_threads), which decides how XLA:CPU splits matrix products
    but is not part of JAX's cache key: a program compiled for 2 threads would be loaded for 8.
    """
    if folder == "off":
        return
    if jax.process_count() > 1 and jax.default_backend() == "cpu" and not _write_on_every_process():
        logger.warning("no compilation cache: the process index of jax %s was not found", jax.__version__)
        return
    jax.config.update("jax_compilation_cache_dir", f"{folder}/cpu_threads_{cpu_threads}")
    if _MIN_COMPILE_VARIABLE not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)


def _write_on_every_process() -> bool:
    """Make JAX write the programs of every process, not of process 0 alone. False where that is not possible.

    On GPU and TPU all processes share one cache key, so one writer is enough. On CPU the key contains a fingerprint of
    the topology as the process sees it. So other processes never find what process 0 wrote, and would compile again at
    each start, and two processes never write the same file. JAX has no public switch, so this replaces the process
    index that its compiler module reads.
    """
    try:
        compiler: Any = importlib.import_module("jax._src.compiler")
        client, _ = compiler.distributed.global_state.client, compiler.distributed.global_state.process_id
    except (ImportError, AttributeError):
        return False
    compiler.distributed = types.SimpleNamespace(global_state=types.SimpleNamespace(process_id=0, client=client))
    return True
