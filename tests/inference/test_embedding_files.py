"""Vectors are written as NumPy arrays or Parquet."""

import numpy as np
from pyarrow import parquet
import pytest

from llmjax.errors import UserError
from llmjax.inference import embedding_files


def test_vectors(tmp_path):
    vectors = np.arange(6, dtype=np.float32).reshape(2, 3)
    embedding_files.write_vectors(tmp_path / "out.npy", ["a", "b"], vectors)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), vectors)
    embedding_files.write_vectors(tmp_path / "out.parquet", ["a", "b"], vectors)
    table = parquet.read_table(tmp_path / "out.parquet").to_pydict()
    assert table == {"text": ["a", "b"], "embedding": vectors.tolist()}


@pytest.mark.parametrize(
    ("name", "message"),
    [("out.txt", r"must end in \.npy or \.parquet"), ("there.npy", "already exists"), ("no/out.npy", "no folder")],
)
def test_outputs_are_checked_first(tmp_path, name, message):
    (tmp_path / "there.npy").write_bytes(b"")
    with pytest.raises(UserError, match=message):
        embedding_files.check_output(tmp_path / name)
