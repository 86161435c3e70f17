"""Files of embeddings: vectors as NumPy array or Parquet."""

from pathlib import Path

import numpy as np

from llmjax import atomic
from llmjax.errors import UserError

_SUFFIXES = (".npy", ".parquet")


def check_output(path: Path) -> None:
    """UserError for an unknown kind of file, and for one that exists."""
    if path.suffix not in _SUFFIXES:
        raise UserError(f"--output={path}: the name must end in {' or '.join(_SUFFIXES)}")
    if path.exists():
        raise UserError(f"--output={path}: already exists; give a new file")
    if not path.parent.is_dir():
        raise UserError(f"--output={path}: there is no folder {path.parent}; create it")


def write_vectors(path: Path, texts: list[str], vectors: np.ndarray) -> None:
    """Vectors float32 [texts, dimensions]; Parquet holds the texts, too."""
    with atomic.atomic_write(path) as file:
        if path.suffix == ".npy":
            np.save(file, vectors)
            return
        import pyarrow
        from pyarrow import parquet

        column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.reshape(-1)), vectors.shape[1])
        parquet.write_table(pyarrow.table({"text": texts, "embedding": column}), file)
