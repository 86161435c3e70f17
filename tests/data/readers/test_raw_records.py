"""Reading that `prepare` (strict) and `curate` (lenient) share."""

import gzip
import json
from typing import ClassVar

import pytest
import zstandard

from llmjax.curate.config import CurateConfig, InputConfig
from llmjax.curate.readers import documents as lenient, inputs
from llmjax.data.config import SourceConfig
from llmjax.data.readers import documents as strict, raw_records, sources
from llmjax.data.readers.raw_records import Fault, RawRecord, ReadOptions
from llmjax.data.readers.sources import Item
from llmjax.errors import UserError

ODD = "\ttab\r\nCRLF\r\n\n  two spaces  \n\u2581 \0 \u2585 é 😀"


def read(command, path, **fields):
    """(texts, rejects) as `prepare` or `curate` reads them."""
    if command == "prepare":
        units = sources.list_units("main", SourceConfig(path=str(path), **fields))
        records = [record for unit in units for record in strict.read_unit(unit)]
    else:
        units = inputs.list_units("main", InputConfig(path=str(path), **fields))
        records = [record for unit in units for record in lenient.read_unit(unit)]
    rejects = [record for record in records if isinstance(record, strict.Reject)]
    return [record.text for record in records if not isinstance(record, strict.Reject)], rejects


def compress(name, data):
    """The data compressed by the suffix of a file name."""
    suffix = name.lower().rpartition(".")[2]
    return {"gz": gzip.compress, "zst": zstandard.compress}.get(suffix, bytes)(data)


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    """The folder of a TFDS data set `notes` with 40 training and 3 test records."""
    tfds = pytest.importorskip("tensorflow_datasets")

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

    folder = tmp_path_factory.mktemp("tfds")
    Notes(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.mark.parametrize("command", ["prepare", "curate"])
class TestBothCommands:
    @pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a", "a.txt.gz", "A.TXT.GZ", "a.txt.zst"])
    def test_text_is_unchanged(self, tmp_path, command, name):
        (tmp_path / name).write_bytes(compress(name, ODD.encode()))
        assert read(command, tmp_path / name) == ([ODD], [])

    def test_compression_is_detected_by_content(self, tmp_path, command):
        (tmp_path / "a.txt").write_bytes(gzip.compress(b"compressed"))
        (tmp_path / "b.txt.gz").write_bytes(b"plain")
        assert read(command, tmp_path / "*") == (["compressed", "plain"], [])

    @pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson.gz", "a.json.GZ", "a.jsonl.zst"])
    def test_jsonl(self, tmp_path, command, name):
        lines = "".join(json.dumps({"body": f"{i} {ODD}"}) + "\n\n" for i in range(50)).encode()
        (tmp_path / name).write_bytes(compress(name, lines))
        texts, rejects = read(command, tmp_path / name, text_field="body")
        assert texts == [f"{i} {ODD}" for i in range(50)] and not rejects

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (b"{not json", "not JSON"),
            (b"\0\0\0", "not JSON"),
            (b"[" * 100_000, "not JSON"),
            (b'{"text": ' + b"9" * 5000 + b"}", "not JSON"),
            (b"[1, 2]", "not a JSON object"),
            (b'{"other": "x"}', "no field 'text'"),
            (b'{"text": 7}', "field 'text' is not a text"),
            (b'{"text": null}', "field 'text' is not a text"),
            (b'{"text": "  \\n"}', "empty"),
            (b'{"text": "bad \xff byte"}', "not UTF-8"),
        ],
    )
    def test_a_bad_line_is_rejected_with_a_reason(self, tmp_path, command, line, reason):
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "first"}\n' + line + b'\n{"text": "nul \\u0000"}\n')
        texts, (reject,) = read(command, tmp_path / "a.jsonl")
        assert texts == ["first", "nul \0"] and reject.reason == reason
        assert reject.id.endswith("a.jsonl:2" if command == "prepare" else "a.jsonl@18")  # line, or offset

    def test_tfds_without_tensorflow(self, notes, command):
        assert sorted(read(command, f"tfds:notes@{notes}")[0]) == sorted(f"{i} {ODD}" for i in range(40))
        assert len(read(command, f"tfds:notes:1.0.0:test@{notes}")[0]) == 3
        with pytest.raises(UserError, match=r"text_field='body': .* has the columns text"):
            read(command, f"tfds:notes@{notes}", text_field="body")
        for path in (f"tfds:absent@{notes}", f"tfds:notes:dev@{notes}"):
            with pytest.raises(UserError, match="cannot be read"):
                read(command, path)

    def test_a_huge_text_file_becomes_documents_of_bounded_size(self, tmp_path, command, monkeypatch):
        monkeypatch.setattr(raw_records, "MAX_TEXT_BYTES", 1000)
        text = "".join(f"paragraph {i} é\n\n" for i in range(1000))
        (tmp_path / "a.txt").write_text(text)
        texts, _ = read(command, tmp_path / "a.txt")
        assert "".join(texts) == text and len(texts) > 5 and max(map(len, texts)) <= 2000

    @pytest.mark.parametrize("name", ["lines.json", "string_view.parquet"])
    def test_shared_cases(self, shared_data, command, name):
        texts, rejects = read(command, shared_data / "cases" / "corpora" / name)
        assert len(texts) == 100 and not rejects

    def test_a_truncated_file(self, shared_data, command):
        """`prepare` stops. `curate` counts the lost part by bytes, far above max_bad_fraction."""
        path = shared_data / "cases" / "corpora" / "half-lost" / "*"
        if command == "prepare":
            with pytest.raises(
                UserError, match=r"b\.jsonl\.gz is damaged \(the file ends inside a gzip member at byte"
            ):
                read(command, path)
            return
        texts, (reject,) = read(command, path)
        assert len(texts) == 155 and reject.reason == "unreadable"
        assert reject.size > 3 * CurateConfig().max_bad_fraction * sum(map(len, texts))

    def test_csv_that_ends_inside_a_quote_loses_one_row(self, tmp_path, command):
        (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfid,text\r1,one\r2,"two ""2"""\r3,"open\r4,four\r')
        texts, (reject,) = read(command, tmp_path / "a.csv")
        assert texts == ["one", 'two "2"', "four"]
        assert (reject.reason, reject.size) == ("not CSV: the file ends inside a quote", 8)
        assert reject.id.endswith("a.csv:2")

    def test_the_column_of_the_text_is_required(self, tmp_path, command):
        (tmp_path / "a.csv").write_text("id,body\n1,x\n")
        with pytest.raises(UserError, match=r"\.text_field='text': .*a\.csv has the columns id, body; name the one"):
            read(command, tmp_path / "a.csv")

    def test_a_record_limit_below_one_is_refused(self, tmp_path, command):
        (tmp_path / "a.txt").write_text("x")
        with pytest.raises(UserError, match=r"main\.max_record_bytes=0: must be at least 1"):
            read(command, tmp_path / "a.txt", max_record_bytes=0)


def test_strict_and_lenient_text(tmp_path):
    (tmp_path / "a").write_bytes("déjà vu, où ça? ".encode("cp1252") * 9)
    item, options = Item(str(tmp_path / "a")), ReadOptions("data.sources.main")
    ((location, content, size, _, _),) = raw_records.read_item("text", item, options)
    assert isinstance(content, Fault) and (location, content.reason, size) == ("", "not UTF-8", 144)
    options = ReadOptions("curate.inputs.main", is_lenient=True)
    (record,) = raw_records.read_item("text", item, options)
    assert record == RawRecord("", "déjà vu, où ça? " * 9, 144, 0, {"decoded from cp1252": 1})


@pytest.mark.parametrize("text", ["para\n\n" * 500, "para\r\n\r\n" * 500, "line\n" * 500, "é" * 2000, "x", "\n" * 900])
def test_pieces_concatenate_to_the_text(text):
    data = text.encode()
    parts = list(raw_records.cut_at_blank_lines([data], 100))
    assert b"".join(parts) == data
    assert all(100 <= len(part) <= 200 for part in parts[:-1])
    assert "".join(part.decode() for part in parts) == text
    if "para" in text:
        assert all(part.startswith(b"para") and part.endswith(b"\n") for part in parts)
