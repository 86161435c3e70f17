"""Safetensors files: the library safetensors reads our files, and we read its files."""

import errno
import json
import resource
import signal

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from llmjax.errors import UserError
from llmjax.interop import files
from tests.interop import published

TENSORS = {
    "a": np.arange(24, dtype=np.float32).reshape(4, 6),
    "b": np.arange(10).astype(ml_dtypes.bfloat16).reshape(2, 5),
    "c": np.float16(1.5) * np.ones(3, np.float16),
    "scalar": np.array(3, np.int64),
    "empty": np.zeros((0, 4), np.float32),
}


def test_safetensors_reads_our_files(tmp_path):
    published.write_tensors(tmp_path, TENSORS)
    back = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert set(back) == set(TENSORS)
    assert all(published.same_bits(back[name], tensor) for name, tensor in TENSORS.items())


def test_we_read_files_of_safetensors(tmp_path):
    safetensors.numpy.save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    entries = files.read_folder(tmp_path)
    assert {name: entry.shape for name, entry in entries.items()} == {n: t.shape for n, t in TENSORS.items()}
    assert all(published.same_bits(entries[name].read(), tensor) for name, tensor in TENSORS.items())
    np.testing.assert_array_equal(entries["a"].read((slice(1, 3), slice(2, 6))), TENSORS["a"][1:3, 2:6])


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            published.write_tensors(tmp_path, {"large": np.zeros(1000, np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(tmp_path / "model.safetensors"))


def test_shards_are_at_most_as_large_as_the_limit(tmp_path):
    tensors = {f"t{i}": np.full(25, i, np.float32) for i in range(10)} | {"large": np.zeros(1000, np.float32)}
    published.write_tensors(tmp_path, tensors, limit=300)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert list(index["weight_map"]) == list(tensors)
    assert sorted(set(index["weight_map"].values())) == [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    back = published.read_tensors(tmp_path)
    assert all(published.same_bits(back[name], tensor) for name, tensor in tensors.items())


F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
NEXT = {**F32, "data_offsets": [16, 32]}


def file_of(header, data: int = 0) -> bytes:
    """A safetensors file of a header, as JSON text or as an object, and `data` zero bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


DEEP = b"[" * 100_000
BROKEN = {
    "no file": (None, "neither model.safetensors"),
    "empty": (b"", "not a safetensors file"),
    "text": (b"a page of HTML, say, that stands in a file's place", "not a safetensors file"),
    "no JSON": (file_of(b"abcdefgh"), "not a safetensors file"),
    "no object": (file_of([1, 2]), "not a safetensors file"),
    "no UTF-8": (file_of(b'{"\xff":1}'), "not a safetensors file"),
    "nested list": (file_of(DEEP), "nested too deeply"),
    "nested object": (file_of(b'{"a":' * 100_000), "nested too deeply"),
    "header longer than the file": ((1 << 63).to_bytes(8, "little") + b"{}", "header would have 9223372036854775808"),
    "header cut short": (file_of({"x": F32}, 16)[:30], "header would have"),
    "unknown type": (file_of({"x": {**F32, "dtype": "F4"}}, 16), "tensor x is of type F4"),
    "type of another kind": (file_of({"x": {**F32, "dtype": ["F32"]}}, 16), r"tensor x is of type \['F32'\]"),
    "too short": (file_of({"x": F32}, 15), "ends before tensor x"),
    "too long": (file_of({"x": F32}, 17), "1 bytes follow its last tensor"),
    "overlap": (file_of({"x": F32, "y": {**F32, "data_offsets": [8, 24]}}, 24), "tensor y overlaps"),
    "twice the same bytes": (file_of({"x": F32, "y": F32}, 16), "tensor y overlaps"),
    "gap": (file_of({"x": F32, "y": {**F32, "data_offsets": [20, 36]}}, 36), "tensor y leaves a gap of 4 bytes"),
    "gap at the start": (file_of({"x": NEXT}, 32), "tensor x leaves a gap of 16 bytes"),
    "negative offset": (file_of({"x": {**F32, "data_offsets": [-16, 0]}}, 16), r"data_offsets=\[-16, 0\]"),
    "end before begin": (file_of({"x": {**F32, "data_offsets": [16, 0]}}, 16), "tensor x has -16 bytes"),
    "one offset": (file_of({"x": {**F32, "data_offsets": [0]}}, 16), r"data_offsets=\[0\]"),
    "three offsets": (file_of({"x": {**F32, "data_offsets": [0, 16, 16]}}, 16), "data_offsets="),
    "offset that is no integer": (file_of({"x": {**F32, "data_offsets": [0, 16.0]}}, 16), "data_offsets="),
    "bytes that do not fit the shape": (file_of({"x": {**F32, "shape": [5]}}, 16), r"has 16 bytes; F32 \[5\] needs 20"),
    "bytes that do not fit the type": (file_of({"x": {**F32, "dtype": "F64"}}, 16), "has 16 bytes; F64"),
    "negative shape": (file_of({"x": {**F32, "shape": [-2, -2]}}, 16), r"shape=\[-2, -2\]"),
    "true for 1": (file_of({"x": {**F32, "shape": [4, True]}}, 16), "shape="),
    "shape that is no list": (file_of({"x": {**F32, "shape": 4}}, 16), "shape=4"),
    "huge shape": (file_of({"x": {**F32, "shape": [1 << 62, 1 << 62, 1 << 62]}}, 16), "has 16 bytes"),
    "huge number": (file_of(b'{"x":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}"), "not a safetensors file"),
    "no offsets": (file_of({"x": {"dtype": "F32", "shape": [4]}}, 16), "data_offsets=None"),
    "tensor that is no object": (file_of({"x": [0, 16]}, 16), "tensor x has no type"),
    "one name twice": (
        file_of(f'{{"x":{json.dumps(F32)},"x":{json.dumps(NEXT)}}}'.encode(), 32),
        "the key 'x' is repeated",
    ),
    "one field twice": (
        file_of(b'{"x":{"dtype":"F32","shape":[4],"shape":[2],"data_offsets":[0,16]}}', 16),
        "repeated",
    ),
    "metadata of another kind": (file_of({"__metadata__": {"a": 1}}), "__metadata__"),
    "a name of two lines": (file_of({"x\ny": F32}, 16), r"a tensor is named 'x\\ny'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_other_files_are_refused(tmp_path, case):
    content, message = BROKEN[case]
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        files.read_folder(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_tensors_may_be_in_any_order_in_a_header(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(
        file_of({"y": NEXT, "x": F32, "none": {**NEXT, "shape": [0], "data_offsets": [16, 16]}}, 32)
    )
    assert {name: entry.shape for name, entry in files.read_folder(tmp_path).items()} == {
        "y": (4,),
        "x": (4,),
        "none": (0,),
    }


BAD_INDEX = {
    "cut short": (b'{"weight_map": {"x": "mo', "not JSON"),
    "nested": (DEEP, "nested too deeply"),
    "no object": (b"[]", "not a JSON object"),
    "no map": (b"{}", "weight_map=None"),
    "a list": (b'{"weight_map": ["x"]}', "weight_map="),
    "no file name": (b'{"weight_map": {"x": 3}}', "weight_map="),
    "a file elsewhere": (b'{"weight_map": {"x": "../shard.safetensors"}}', "is missing"),
    "NUL in a name": (b'{"weight_map": {"x": "a\\u0000b"}}', "is missing"),
    "no such file": (b'{"weight_map": {"x": "model-00001-of-00001.safetensors"}}', "is missing"),
    "one tensor twice": (b'{"weight_map": {"x": "shard.safetensors", "x": "shard.safetensors"}}', "repeated"),
}


@pytest.mark.parametrize("case", BAD_INDEX)
def test_an_index_that_is_wrong_is_refused(tmp_path, case):
    content, message = BAD_INDEX[case]
    (tmp_path / "shard.safetensors").write_bytes(file_of({"x": F32}, 16))
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        files.read_folder(tmp_path)
    assert "\n" not in str(error.value)


def test_a_single_file_is_preferred_to_an_index(tmp_path):
    """As transformers does; and the index alone gives the tensors that its shards hold."""
    (tmp_path / "shard.safetensors").write_bytes(file_of({"x": F32}, 16))
    named = {"x": "shard.safetensors", "lm_head.weight": "shard.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    assert set(files.read_folder(tmp_path)) == {"x"}
    (tmp_path / "model.safetensors").write_bytes(file_of({"y": F32}, 16))
    assert set(files.read_folder(tmp_path)) == {"y"}


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"vocab_size": 3', b"[]", b"3", b"\xff\xfe", DEEP, b'{"a":1,"a":2}', b"9" * 5000]
)
def test_a_json_file_that_is_wrong_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json: not (JSON|a JSON object)") as error:
        files.read_json(tmp_path / "config.json")
    assert "\n" not in str(error.value)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"give the folder of a checkpoint with config\.json"):
        files.read_json(tmp_path / "model.safetensors" / "config.json")


def test_a_json_file_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        files.read_json(tmp_path / "config.json")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        files.read_json(tmp_path / "config.json")
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="too many"):
        files.read_json(tmp_path / "large.json")
