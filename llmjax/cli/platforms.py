"""Which platforms JAX starts: not TPU where only its compiler is installed."""

import importlib.metadata
import importlib.util
import os

from llmjax.parallel import cluster


def skip_absent_tpu() -> None:
    """Let JAX use the CPU alone where the TPU compiler is installed for `llmjax plan` and there is no accelerator.

    Must run before jax is imported. JAX would start the compiler's runtime, which prints errors and looks for the
    metadata of a cloud. A user's JAX_PLATFORMS stays as it is.
    """
    if os.environ.get("JAX_PLATFORMS") or importlib.util.find_spec("libtpu") is None:
        return
    if not cluster.has_tpu() and not importlib.metadata.entry_points(group="jax_plugins"):
        os.environ["JAX_PLATFORMS"] = "cpu"
