"""Log-likelihoods of preferences under the reference model of DPO: computed once, and kept in the workdir."""

from collections.abc import Callable, Iterator, Mapping
import io
import logging
import pathlib
from typing import Any
import zipfile

from etils import epath
from flax import nnx
import jax
import numpy as np

from llmjax import atomic
from llmjax.batch import Batch, Graph, Params
from llmjax.checkpoint.fingerprint import digests
from llmjax.data.batches.pipeline import EvalData
from llmjax.data.objectives.objective import Objective
from llmjax.data.store.split import SPLITS
from llmjax.data.store.token_store import compute_fingerprint
from llmjax.errors import UserError
from llmjax.nn.preference_losses import answer_log_likelihoods
from llmjax.parallel import backends, hosts
from llmjax.run import workdir as workdirs
from llmjax.run.config import RunConfig

logger = logging.getLogger(__name__)

# (source, split) -> float32 [records, 2], of the chosen and of the rejected answer
Reference = Mapping[tuple[str, str], np.ndarray]


def compute_reference(
    graph: Graph,
    params: Params,
    config: RunConfig,
    objective: Objective,
    store: pathlib.Path,
    manifest: dict[str, Any],
    workdir: epath.Path,
    *,
    enter: Callable[[], None] = lambda: None,
) -> Reference:
    """The log-likelihoods of all answers of the store under `params`, and write them to the workdir.

    Those that an earlier start wrote for the same parameters and data are read instead.
    enter   called before each batch
    A collective: all processes call it.
    """
    parameters = digests({"params": params})["params"]
    identity: dict[str, Any] = {"data": _fingerprint_data(config, manifest), "parameters": parameters}
    path = workdir / workdirs.REFERENCE
    saved = _read(path)
    if hosts.agree(saved is not None and saved[1] == identity, "reference"):
        assert saved is not None
        return saved[0]
    logger.info("computing the log-likelihoods of the answers under the reference model")
    score = _make_score(graph, config)
    reference = {}
    for source, record in manifest["sources"].items():
        for split in SPLITS:
            if record[split]["documents"]:
                values = _score_split(score, params, config, objective, store, source, split, enter)
                reference[source, split] = np.concatenate(list(values))[: record[split]["documents"]]
    if hosts.is_primary():
        content = io.BytesIO()
        arrays: dict[str, Any] = {f"{source}/{split}": array for (source, split), array in reference.items()}
        np.savez(content, **arrays, **identity)
        atomic.write_bytes(path, content.getvalue())
    hosts.barrier("reference written")
    return reference


def read_reference(config: RunConfig, manifest: dict[str, Any], workdir: epath.Path) -> Reference:
    """What `compute_reference` wrote at the start of the run. Raises UserError if it is gone, or is of other data."""
    path = workdir / workdirs.REFERENCE
    saved = _read(path)
    if saved is None or saved[1]["data"] != _fingerprint_data(config, manifest):
        problem = "is missing or damaged" if saved is None else "is of other data"
        raise UserError(
            f"{path}: {problem}, and the reference model of a run is that of its start; restore the file and the data, "
            "or start a new workdir"
        )
    return saved[0]


def _read(path: epath.Path) -> tuple[Reference, dict[str, str]] | None:
    """(log-likelihoods, of which data and parameters they are) in a file; None if it is missing or damaged."""
    try:
        with np.load(io.BytesIO(path.read_bytes())) as arrays:
            reference = {tuple(name.rsplit("/", 1)): arrays[name] for name in arrays.files if "/" in name}
            return reference, {name: str(arrays[name]) for name in ("data", "parameters")}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _fingerprint_data(config: RunConfig, manifest: dict[str, Any]) -> str:
    """Of everything besides the parameters that decides the log-likelihoods."""
    return compute_fingerprint({"store": manifest["fingerprint"], "seq_len": config.data.seq_len})


def _make_score(graph: Graph, config: RunConfig) -> Callable[[Params, Batch], jax.Array]:
    """A compiled function (params, batch) -> float32 [batch, 2]."""

    def score(params: Params, batch: Batch) -> jax.Array:
        model = nnx.merge(graph, params)
        return answer_log_likelihoods(model(batch).hidden, model.unembed, batch, chunk=config.train.loss_chunk)

    replicated = jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.sharding.PartitionSpec())
    return jax.jit(score, out_shardings=replicated)


def _score_split(
    score: Callable,
    params: Params,
    config: RunConfig,
    objective: Objective,
    store: pathlib.Path,
    source: str,
    split: str,
    enter: Callable[[], None],
) -> Iterator[np.ndarray]:
    """Yield the log-likelihoods of the records of a split, batch by batch; rows of padding follow the last record."""
    size = config.train.global_batch
    data = EvalData(store, config.data, split=split, source=source, batch=size, objective=objective)
    sharding = backends.batch_sharding()
    rows = hosts.local_rows(sharding, size)
    for local in data.batches(rows):
        enter()
        yield jax.device_get(score(params, hosts.global_batch(sharding, local, rows, size)))
