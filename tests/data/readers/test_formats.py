"""The format of a file by its content, and by its name where the content leaves it open."""

import gzip

import pytest

from llmjax.data.readers import formats


@pytest.mark.parametrize(
    ("name", "data", "prepared", "curated"),
    [
        ("a.json", b'{"text": "x"}\n{"text": "y"}\n', "jsonl", "jsonl"),
        ("a.txt", b'{"text": "x"}\n{"text": "y"}\n', "jsonl", "jsonl"),
        ("a", b'[{"text": "x"}]', "json", "json"),
        ("a.json", b'{\n "text": "x"\n}', "json", "json"),
        ("a.md", b"[link](x) {y}\n", "text", "text"),
        ("a.csv", b"a,b\n", "csv", "csv"),
        ("a.tsv", b"a\tb\n", "tsv", "tsv"),
        ("a", b"PAR1....", "parquet", "parquet"),
        ("a.pq", b"", "parquet", "parquet"),
        ("a.html", b"<p>x", "text", "html"),
        ("a", b"WARC/1.0\r\n", "unsupported", "warc"),
        ("a", b"filedesc://x 0.0.0.0", "unsupported", "warc"),
        ("a.json", b'[{"text": "x"}]'.decode().encode("utf-16"), "unsupported", "json"),
        ("a.tar", b"a.txt".ljust(257, b"\0") + b"ustar\0", "unsupported", "unsupported"),
        ("a.docx", b"PK\x03\x04", "unsupported", "unsupported"),
        ("a.jsonl", gzip.compress(gzip.compress(b"{}")), "unsupported", "unsupported"),
        ("a.txt", b"Rar! ustar PK %PDF BZh", "text", "text"),
        ("a.wet", b"", "text", "warc"),
        ("a", b"", "text", "text"),
    ],
)
@pytest.mark.parametrize("is_compressed", [False, True])
def test_detection(tmp_path, name, data, prepared, curated, is_compressed):
    if is_compressed and data.startswith(b"PAR1"):  # Parquet cannot be streamed
        prepared = curated = "unsupported"
    path = tmp_path / (f"{name}.gz" if is_compressed else name)
    path.write_bytes(gzip.compress(data) if is_compressed else data)
    assert formats.detect(str(path)) == prepared
    assert formats.detect(str(path), formats.CURATE_FORMATS) == curated


def test_a_file_that_is_no_text_says_why(tmp_path):
    for data, reason in ((b"PK\x03\x04", "an archive; unpack it"), (b"WARC/1.0\r\n", "`llmjax curate`")):
        (tmp_path / "a").write_bytes(data)
        assert reason in formats.explain_unsupported(str(tmp_path / "a"))


def test_a_byte_order_mark_is_not_text():
    for size in (1, 2, 3, 9):
        data = b"\xef\xbb\xbfab"
        blocks = (data[at : at + size] for at in range(0, len(data), size))
        assert b"".join(formats.strip_bom(blocks)) == b"ab"
    assert b"".join(formats.strip_bom(iter([b"\xef"]))) == b"\xef"
