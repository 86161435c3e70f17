"""Sources: their files in order, as units that together hold every record."""

import json

import pytest

from llmjax.data.config import SourceConfig
from llmjax.data.readers import documents as readers, sources, streams
from llmjax.errors import UserError


def read(path, **fields):
    units = sources.list_units("main", SourceConfig(path=str(path), **fields))
    return [record for unit in units for record in readers.read_unit(unit)]


def texts(records):
    return [record.text for record in records if isinstance(record, readers.Document)]


def test_glob_crosses_folders_in_order_of_names(tmp_path):
    for name in ("b/2.txt", "a/1.txt", "c.txt", "c.log"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(read(tmp_path / "**/*.txt")) == ["a/1.txt", "b/2.txt", "c.txt"]


def test_a_large_jsonl_is_shared_by_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MIN_UNIT_BYTES", 100)
    (tmp_path / "a.jsonl").write_bytes(
        b"".join(json.dumps({"text": f"{i} " + "é" * (i % 70)}).encode() + b"\n" for i in range(500))
    )
    units = sources.list_units("main", SourceConfig(path=str(tmp_path / "a.jsonl")))
    assert len(units) > 20
    documents = [record.text.split()[0] for unit in units for record in readers.read_unit(unit)]
    assert documents == [str(i) for i in range(500)]


def test_stdlib_is_its_code_without_tests():
    units = sources.list_units("main", SourceConfig(path="stdlib:"))
    paths = [item.path for unit in units for item in unit.items]
    assert any(path.endswith("/json/decoder.py") for path in paths)
    assert not any("/test" in path.rpartition("/")[0] or "site-packages" in path for path in paths)
    assert len(paths) > 300 and paths == [i.path for u in sources.list_units("x", SourceConfig()) for i in u.items]


@pytest.mark.parametrize(("path", "message"), [("absent.txt", "no such file"), ("*.rst", "no file matches")])
def test_missing_file(tmp_path, path, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path / path)


def test_error_for_a_folder_suggests_a_glob(tmp_path):
    with pytest.raises(UserError, match=r"this is a folder; give a glob such as '.*/\*\*/\*\.txt'"):
        read(tmp_path)


def test_files_are_described_by_how_they_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.json").write_text('{"text": "x"}\n')
    (tmp_path / "c.jsonl").write_text('{"text": "x"}\n')
    units = sources.list_units("main", SourceConfig(path=f"{tmp_path}/*"))
    assert sources.describe_formats(units) == "reads files: 2 as JSON lines, 1 as text"


def test_spans_of_one_long_line_are_searched_once(tmp_path, monkeypatch):
    """Each span stops at its end: all together read the file once, not each of them up to the end of the line."""
    monkeypatch.setattr(sources, "MIN_UNIT_BYTES", 1000)
    monkeypatch.setattr("llmjax.data.readers.streams.BLOCK_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "' + b"x" * 100_000 + b'"}\n{"text": "b"}\n')
    blocks, num_bytes = streams.read_blocks, 0

    def count(*arguments):
        nonlocal num_bytes
        for block in blocks(*arguments):
            num_bytes += len(block)
            yield block

    monkeypatch.setattr(streams, "read_blocks", count)
    units = sources.list_units("main", SourceConfig(path=str(path), max_record_bytes=5000))
    assert len(units) > 50
    documents = [record for unit in units for record in readers.read_unit(unit)]
    assert texts(documents) == ["a", "b"] and len(documents) == 3
    assert num_bytes < 3 * path.stat().st_size
