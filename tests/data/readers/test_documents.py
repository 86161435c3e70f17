"""Strict reading: every kind of file gives its documents unchanged; records that are not text are rejected."""

import bz2
import gzip
import json
import lzma
import random
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from llmjax.data.config import SourceConfig
from llmjax.data.readers import documents as readers, sources
from llmjax.data.readers.documents import Document, Reject
from llmjax.errors import UserError

ODD = "\ttab\r\nCRLF\r\n\n  two spaces  \n\u2581 \0 \u2585 é 😀"


def read(path, **fields):
    units = sources.list_units("main", SourceConfig(path=str(path), **fields))
    return [record for unit in units for record in readers.read_unit(unit)]


def texts(records):
    return [record.text for record in records if isinstance(record, Document)]


def reasons(records):
    return [record.reason for record in records if isinstance(record, Reject)]


def test_several_zstd_frames(tmp_path):
    parts = [zstandard.compress(json.dumps({"text": f"{i}"}).encode() + b"\n") for i in range(3)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(parts))
    assert texts(read(tmp_path / "a.jsonl.zst")) == ["0", "1", "2"]


def test_a_lone_surrogate_is_rejected(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n{"text": "\\ud800"}')
    records = read(tmp_path / "a.jsonl")
    assert texts(records) == ["good"] and reasons(records) == ["lone surrogate"]
    assert records[1].id.endswith("a.jsonl:2")


def test_a_text_file_that_is_not_utf8_is_one_reject(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "b.txt").write_text("good")
    records = read(tmp_path / "*.txt")
    assert reasons(records) == ["not UTF-8"] and texts(records) == ["good"] and "caf" in records[0].excerpt


PACKERS = {"gz": gzip.compress, "zst": zstandard.compress, "xz": lzma.compress, "bz2": bz2.compress}


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_truncated_file_is_an_error_unless_accepted(tmp_path, suffix):
    content = b"".join(
        json.dumps({"text": random.Random(i).randbytes(40).hex()}).encode() + b"\n" for i in range(20000)
    )
    path, data = tmp_path / f"a.jsonl.{suffix}", PACKERS[suffix](content)
    path.write_bytes(data)
    assert len(texts(read(path))) == 20000
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"a\.jsonl.*ends inside.*at byte.*accept_truncated=true"):
        read(path)
    records = read(path, accept_truncated=True)
    assert reasons(records) == ["truncated"] and 2000 < len(texts(records)) < 20000


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl.zst", "a.json.zstd", "a", "a.txt.xz"])
@pytest.mark.parametrize("form", ["lines", "array", "element a line", "indented"])
def test_json_is_recognised_by_its_content(tmp_path, name, form):
    records = [{"text": f'{i} ]}}"\\ é'} for i in range(100)]
    data = json.dumps(records, indent=1 if form == "indented" else None).encode()
    if form == "element a line":
        data = b"[\n" + b",\n".join(json.dumps(record).encode() for record in records) + b"\n]"
    if form == "lines":
        data = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    pack = {"gz": gzip.compress, "zst": zstandard.compress, "zstd": zstandard.compress, "xz": lzma.compress}
    (tmp_path / name).write_bytes(pack.get(name.rpartition(".")[2], bytes)(b"\xef\xbb\xbf" + data))
    assert texts(read(tmp_path / name)) == [record["text"] for record in records]
    assert texts(read(tmp_path / name, format="text"))[0].startswith(data[:5].decode())


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_the_csv_delimiter_is_the_one_that_gives_the_text_column(tmp_path, delimiter):
    rows = (("id", "text"), ("1", '"a, b' + delimiter + '\nc"'), ("2", "d"))
    (tmp_path / "a.csv").write_text("".join(delimiter.join(row) + "\n" for row in rows))
    assert texts(read(tmp_path / "a.csv")) == [f"a, b{delimiter}\nc", "d"]


def test_an_archive_is_a_reject_that_names_it(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(__file__, "a.txt")
    (tmp_path / "b.txt").write_text("good")
    found = read(tmp_path / "*")
    assert texts(found) == ["good"] and reasons(found) == ["not text: a tar archive; unpack it"]
    assert [record.size for record in found if isinstance(record, Reject)] == [(tmp_path / "a.tar.gz").stat().st_size]


@pytest.mark.parametrize("kind", [pa.string_view(), pa.binary_view(), pa.large_string(), pa.json_()])
def test_parquet_types_of_text(tmp_path, kind):
    pq.write_table(pa.table({"text": pa.array(["a", "é"], pa.string()).cast(kind)}), tmp_path / "a.parquet")
    assert texts(read(tmp_path / "a.parquet")) == ["a", "é"]


def test_parquet(tmp_path):
    values = [f"{i} {ODD}" for i in range(100)]
    pq.write_table(pa.table({"text": values, "n": range(100)}), tmp_path / "a.parquet", row_group_size=7)
    assert texts(read(tmp_path / "a.parquet")) == values
    mixed = pa.array([b"good", None, b"\xff", b""], pa.binary())
    pq.write_table(pa.table({"text": mixed}), tmp_path / "b.parquet")
    assert reasons(read(tmp_path / "b.parquet")) == ["field 'text' is not a text", "not UTF-8", "empty"]
    pq.write_table(pa.table({"text": pa.array(["x", "y", "x"]).dictionary_encode()}), tmp_path / "c.parquet")
    assert texts(read(tmp_path / "c.parquet")) == ["x", "y", "x"]
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="is damaged"):
        read(tmp_path / "d.parquet")


@pytest.mark.parametrize(("field", "message"), [("body", "has the columns text, n"), ("n", "holds int64")])
def test_parquet_without_the_text(tmp_path, field, message):
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.parquet", text_field=field)
