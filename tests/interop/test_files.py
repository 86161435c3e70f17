"""Safetensors files: ours are read by the reference library, and its by us."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from llmjax.config import UserError
from llmjax.interop import files
from tests.interop import published

TENSORS = {
    "a": np.arange(24, dtype=np.float32).reshape(4, 6),
    "b": np.arange(10).astype(ml_dtypes.bfloat16).reshape(2, 5),
    "c": np.float16(1.5) * np.ones(3, np.float16),
    "scalar": np.array(3, np.int64),
    "empty": np.zeros((0, 4), np.float32),
}


def test_the_reference_library_reads_ours(tmp_path):
    published.write_tensors(tmp_path, TENSORS)
    back = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert set(back) == set(TENSORS)
    assert all(published.same_bits(back[name], tensor) for name, tensor in TENSORS.items())


def test_we_read_the_reference_librarys(tmp_path):
    safetensors.numpy.save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    entries = files.read_folder(tmp_path)
    assert {name: entry.shape for name, entry in entries.items()} == {n: t.shape for n, t in TENSORS.items()}
    assert all(published.same_bits(entries[name].read(), tensor) for name, tensor in TENSORS.items())
    np.testing.assert_array_equal(entries["a"].read((slice(1, 3), slice(2, 6))), TENSORS["a"][1:3, 2:6])


def test_shards_hold_no_more_than_their_limit(tmp_path):
    tensors = {f"t{i}": np.full(25, i, np.float32) for i in range(10)} | {"large": np.zeros(1000, np.float32)}
    published.write_tensors(tmp_path, tensors, limit=300)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert list(index["weight_map"]) == list(tensors)
    assert sorted(set(index["weight_map"].values())) == [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    back = published.read_tensors(tmp_path)
    assert all(published.same_bits(back[name], tensor) for name, tensor in tensors.items())


BROKEN = {
    "no file": (None, "neither model.safetensors"),
    "empty": (b"", "not a safetensors file"),
    "text": (b"a page of HTML, say, that stands in a file's place", "not a safetensors file"),
    "no JSON": ((8).to_bytes(8, "little") + b"abcdefgh", "not a safetensors file"),
    "unknown type": (
        lambda: json.dumps({"x": {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}}).encode(),
        "tensor x is of type F4",
    ),
    "too short": (
        lambda: json.dumps({"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode(),
        "ends before tensor x",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_such_file_is_refused(tmp_path, case):
    content, message = BROKEN[case]
    if callable(content):
        header = content()
        content = len(header).to_bytes(8, "little") + header
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message):
        files.read_folder(tmp_path)
