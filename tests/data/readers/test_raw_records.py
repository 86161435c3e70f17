"""Raw records: the reading that both commands share, strict and lenient, and the inputs that once went wrong."""

import pytest

from llmjax.curate.config import CurateConfig, InputConfig
from llmjax.curate.readers import documents as lenient, inputs
from llmjax.data.config import SourceConfig
from llmjax.data.readers import documents as strict, raw_records, sources
from llmjax.data.readers.raw_records import Fault, RawRecord, ReadOptions
from llmjax.data.readers.sources import Item
from llmjax.errors import UserError


def read(command, path, **fields):
    """(texts, reasons of rejects) as `prepare` or `curate` reads them."""
    if command == "prepare":
        units = sources.list_units("main", SourceConfig(path=str(path), **fields))
        records = [record for unit in units for record in strict.read_unit(unit)]
    else:
        units = inputs.list_units("main", InputConfig(path=str(path), **fields))
        records = [record for unit in units for record in lenient.read_unit(unit)]
    rejects = [record for record in records if isinstance(record, strict.Reject)]
    return [record.text for record in records if not isinstance(record, strict.Reject)], rejects


@pytest.mark.parametrize("command", ["prepare", "curate"])
class TestBothCommands:
    @pytest.mark.parametrize("name", ["lines.json", "string_view.parquet"])
    def test_inputs_of_earlier_bugs(self, shared_data, command, name):
        texts, rejects = read(command, shared_data / "cases" / "corpora" / name)
        assert len(texts) == 100 and not rejects

    def test_file_that_lost_its_second_half(self, shared_data, command):
        """`prepare` stops. `curate` counts the loss by bytes, far above max_bad_fraction."""
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
        (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfid,text\r1,one\r2,"open\r3,three\r')
        texts, (reject,) = read(command, tmp_path / "a.csv")
        assert texts == ["one", "three"]
        assert (reject.reason, reject.size) == ("not CSV: the file ends inside a quote", 8)
        assert reject.id.endswith("a.csv:1")

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
def test_shards_concatenate_to_the_full_batch(text):
    data = text.encode()
    parts = list(raw_records.cut_at_blank_lines([data], 100))
    assert b"".join(parts) == data
    assert all(100 <= len(part) <= 200 for part in parts[:-1])
    assert "".join(part.decode() for part in parts) == text
    if "para" in text:
        assert all(part.startswith(b"para") and part.endswith(b"\n") for part in parts)
