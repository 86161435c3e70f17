"""Pages of archives are returned completely with their type, or refused with a reason."""

import gzip
import random

import pytest
import zstandard

from llmjax.curate.readers import warc
from llmjax.curate.readers.warc import CUT_OFF, DAMAGED, Page

BODY = b"<html><p>" + random.Random(0).randbytes(500).hex().encode() + b"</html>"


def record(body=BODY, head=b"", fields="", url="http://a/", length=None):
    block = b"HTTP/1.1 200 OK\r\n" + head + b"\r\n" + body
    size = len(block) if length is None else length
    return (
        f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {url}\r\n{fields}Content-Length: {size}\r\n\r\n"
    ).encode() + (block + b"\r\n\r\n")


def read(folder, *records):
    (folder / "a.warc").write_bytes(b"".join(records))
    return list(warc.read_pages(str(folder / "a.warc"), 1 << 26))


def reasons(pages):
    return [page.reason for page in pages if not isinstance(page, Page)]


def test_a_body_with_two_transfer_codings(shared_data):
    (page,) = warc.read_pages(str(shared_data / "cases" / "warc" / "gzip-chunked.warc"), 1 << 26)
    assert isinstance(page, Page) and len(page.data) == 677 and page.kind == "html"


def test_repeated_headers_are_one_list_of_codings(tmp_path):
    packed = gzip.compress(BODY[:99]) + gzip.compress(BODY[99:])
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(packed), packed)
    head = b"Transfer-Encoding: gzip\r\nContent-Type: text/html\r\ntransfer-encoding:\r\n chunked\r\n"
    (page,) = read(tmp_path, record(body, head))
    assert isinstance(page, Page) and page.data == BODY


@pytest.mark.parametrize(
    ("values", "kind", "content_type"),
    [
        (["text/html", "text/html; charset=koi8-r"], "html", "text/html; charset=koi8-r"),
        (["text/html; charset=koi8-r", "text/html"], "html", "text/html; charset=koi8-r"),
        (["text/plain; charset=koi8-r", "text/html"], "html", "text/html"),
        (["image/png", "text/html"], "html", "text/html"),
        (["text/html, text/html; charset=utf-8"], "html", "text/html; charset=utf-8"),
        (["text/html", "*/*"], "html", "text/html"),
        (["", "TEXT/HTML;charset=utf-8"], "html", "text/html;charset=utf-8"),
        (["text/html charset=utf-8"], "html", "text/html charset=utf-8"),
        (['text/plain; a="x, y"'], "text", 'text/plain; a="x, y"'),
        (["html"], "html", ""),  # no media type: judged by the body
        ([], "html", ""),
    ],
)
def test_the_last_of_several_content_types_is_used(tmp_path, values, kind, content_type):
    head = b"".join(b"Content-Type: %s\r\n" % value.encode() for value in values)
    (page,) = read(tmp_path, record(head=head))
    assert isinstance(page, Page) and (page.kind, page.content_type) == (kind, content_type)


def test_a_page_with_another_last_type_is_refused(tmp_path):
    head = b"Content-Type: text/html\r\nContent-Type: image/png\r\n"
    assert reasons(read(tmp_path, record(head=head))) == ["content type image/png"]


def test_an_interim_response_precedes_the_page(tmp_path):
    interim = record(b"HTTP/1.1 200 OK\r\n\r\n" + BODY, b"A: b\r\n").replace(b"200", b"100", 1)
    (page,) = read(tmp_path, interim)
    assert isinstance(page, Page) and page.data == BODY


def test_zstd_with_a_dictionary_in_the_first_frame(tmp_path):
    """As the Internet Archive's Archive Team publishes its crawls; the dictionary itself may be compressed."""
    pages = [record(random.Random(number).randbytes(300).hex().encode()) for number in range(200)]
    dictionary = zstandard.train_dictionary(2000, pages)
    compressor = zstandard.ZstdCompressor(dict_data=dictionary)
    for content in (dictionary.as_bytes(), zstandard.compress(dictionary.as_bytes())):
        first = b"\x5d\x2a\x4d\x18" + len(content).to_bytes(4, "little") + content
        found = read(tmp_path, first, *map(compressor.compress, pages[:3]))
        assert len(found) == 3 and not reasons(found)


def test_a_page_truncated_by_the_crawler_is_refused_but_not_damaged(tmp_path):
    (reason,) = reasons(read(tmp_path, record(fields="WARC-Truncated: length\r\n")))
    assert reason.startswith(warc.NO_PAGE)
    assert reasons(read(tmp_path, record(fields="WARC-Segment-Number: 1\r\n"))) == ["segment of a record"]


def test_a_body_below_its_stated_length_needs_the_end_of_a_page(tmp_path):
    head = b"Content-Type: text/html\r\nContent-Length: %d\r\n" % len(BODY)
    assert reasons(read(tmp_path, record(BODY[:400], head))) == [CUT_OFF]
    (page,) = read(tmp_path, record(BODY[:-9] + b"</html>", head))
    assert isinstance(page, Page)


@pytest.mark.parametrize("length", [10, 5000, 10**12])
def test_a_damaged_record_gives_only_a_provably_complete_page(tmp_path, length):
    after = record(url="http://after/")
    sized = b"Content-Length: %d\r\n" % len(BODY)
    for body, head in ((BODY, sized), (gzip.compress(BODY), b"Content-Encoding: gzip\r\n")):
        pages = read(tmp_path, record(body, head, length=length), after)
        assert [page.url for page in pages if isinstance(page, Page)] == ["http://a/", "http://after/"]
    with_gap = BODY[:100] + BODY[200:]
    for body, head in ((BODY, b""), (with_gap, sized), (gzip.compress(BODY)[:-30], b"Content-Encoding: gzip\r\n")):
        pages = read(tmp_path, record(body, head, length=length), after)
        assert [page.url for page in pages if isinstance(page, Page)] == ["http://after/"]
        assert len(reasons(pages)) == 1 and reasons(pages)[0] in (DAMAGED, CUT_OFF, "damaged content encoding")


@pytest.mark.parametrize("packed", [False, True])
def test_the_last_page_of_a_truncated_file_is_refused(tmp_path, packed):
    members = [record(url=f"http://{number}/") for number in range(3)]
    data = b"".join(gzip.compress(member) if packed else member for member in members)
    pages = read(tmp_path, data[:-400])
    assert [page.url for page in pages if isinstance(page, Page)] == ["http://0/", "http://1/"]
    assert reasons(pages) == ([CUT_OFF, "unreadable"] if packed else [CUT_OFF])
