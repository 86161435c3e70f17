"""Strict reading: every kind of file gives its documents unchanged; records that are not text are rejected."""

import bz2
import gzip
import json
import lzma
import random
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from llmjax.data.config import SourceConfig
from llmjax.data.readers import documents as readers, raw_records, sources
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


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a", "a.txt.gz", "A.TXT.GZ", "a.txt.zst"])
def test_text_round_trips_unchanged(tmp_path, name):
    data = ODD.encode()
    data = gzip.compress(data) if name.lower().endswith(".gz") else data
    data = zstandard.compress(data) if name.endswith(".zst") else data
    (tmp_path / name).write_bytes(data)
    assert texts(read(tmp_path / name)) == [ODD]


@pytest.mark.parametrize("suffix", ["", ".gz", ".GZ", ".zst"])
def test_jsonl(tmp_path, suffix):
    lines = "".join(json.dumps({"body": f"{i} {ODD}"}) + "\n\n" for i in range(50)).encode()
    data = {"": bytes, ".gz": gzip.compress, ".GZ": gzip.compress, ".zst": zstandard.compress}[suffix](lines)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(data)
    records = read(tmp_path / f"a.jsonl{suffix}", text_field="body")
    assert texts(records) == [f"{i} {ODD}" for i in range(50)]
    assert records[3].id.endswith(":7")  # the line


def test_several_zstd_frames(tmp_path):
    parts = [zstandard.compress(json.dumps({"text": f"{i}"}).encode() + b"\n") for i in range(3)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(parts))
    assert texts(read(tmp_path / "a.jsonl.zst")) == ["0", "1", "2"]


def test_bad_records_are_named(tmp_path):
    lines = [
        b'{"text": "good"}',
        b"\xff\xfe",
        b"{not json",
        b"[1, 2]",
        b'{"other": "x"}',
        b'{"text": 7}',
        b'{"text": null}',
        b'{"text": "\\ud800"}',
        b'{"text": "  \\n"}',
        b"[" * 100_000,
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    records = read(tmp_path / "a.jsonl")
    assert texts(records) == ["good"]
    assert reasons(records) == [
        "not UTF-8",
        "not JSON",
        "not a JSON object",
        "no field 'text'",
        "field 'text' is not a text",
        "field 'text' is not a text",
        "lone surrogate",
        "empty",
        "not JSON",
    ]
    assert records[2].id.endswith("a.jsonl:3") and records[2].excerpt == "{not json"


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


def test_csv(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfid,text\r1,one\r2,"two ""2"""\r3,"open\r4,four\r')
    documents = read(tmp_path / "a.csv")
    assert texts(documents) == ["one", 'two "2"', "four"] and reasons(documents) == [
        "not CSV: the file ends inside a quote"
    ]
    with pytest.raises(UserError, match="has the columns id, text; name the one"):
        read(tmp_path / "a.csv", text_field="body")


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


def test_tfds_without_tensorflow(tmp_path):
    import tensorflow_datasets as tfds

    class Notes(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        url_infos: ClassVar = {}  # nothing to download

        def _info(self):
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(40), "test": self._generate_examples(3)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"text": f"{i} {ODD}"}

    Notes(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    assert sorted(texts(read(f"tfds:notes@{tmp_path}"))) == sorted(f"{i} {ODD}" for i in range(40))
    assert len(texts(read(f"tfds:notes:1.0.0:test@{tmp_path}"))) == 3
    with pytest.raises(UserError, match="has the columns text"):
        read(f"tfds:notes@{tmp_path}", text_field="body")
    for path in (f"tfds:absent@{tmp_path}", f"tfds:notes:dev@{tmp_path}"):
        with pytest.raises(UserError, match="cannot be read"):
            read(path)


def test_a_huge_text_file_becomes_documents_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(raw_records, "MAX_TEXT_BYTES", 1000)
    text = "".join(f"paragraph {i} é\n\n" for i in range(1000))
    (tmp_path / "a.txt").write_text(text)
    documents = texts(read(tmp_path / "a.txt"))
    assert "".join(documents) == text and len(documents) > 5 and max(map(len, documents)) <= 2000
