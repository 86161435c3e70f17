"""Lenient reading: damaged records are repaired or rejected with a reason, and the others are read."""

import gzip
import json
import random
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from llmjax.curate.config import InputConfig
from llmjax.curate.readers import warc
from llmjax.curate.readers.documents import Record, read_unit
from llmjax.curate.readers.inputs import list_units
from llmjax.data.readers import encodings
from llmjax.data.readers.documents import Reject
from llmjax.errors import UserError

# ruff: noqa: RUF001 (letters of other alphabets are intended)
LEGACY = {
    "cp1252": "Ça coûte 5 €; « l’été » déjà passé, où l'on goûtait à tout sans façon.",
    "cp1251": "Все люди рождаются свободными и равными в своём достоинстве и правах.",
    "koi8-r": "Все люди рождаются свободными и равными в своём достоинстве и правах.",
    "cp1250": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw.",
    "cp932": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "gb18030": "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。",
    "cp949": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
}


def read(path, **fields):
    return [record for unit in list_units("main", InputConfig(path=str(path), **fields)) for record in read_unit(unit)]


def texts(records):
    return [record.text for record in records if isinstance(record, Record)]


def rejects(records):
    return [(record.id, record.reason) for record in records if isinstance(record, Reject)]


def write(path, *lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return path


def random_bytes(size, seed=0):
    return random.Random(seed).randbytes(size)


# Formats.


def test_a_text_file_is_one_record(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a text"))
    assert read(tmp_path / "a.txt.gz") == [Record("main:a.txt.gz", "a text", "text", {}, {})]


def test_jsonl_records_have_id_text_and_other_fields(tmp_path):
    fields = {"url": "http://a", "n": {"a": [1, None]}}
    path = write(tmp_path / "a.jsonl", {"body": "text", "key": 7, **fields})
    assert read(path, text_field="body", id_field="key") == [Record("7", "text", "auto", fields, {})]


def test_fields_licence_and_origin_are_copied(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "a", "licence": "MIT", "junk": 1}, {"text": "b"})
    records = read(path, fields=("licence",), licence="CC0", origin="here")
    assert [record.meta for record in records] == [
        {"licence": "MIT", "origin": "here"},
        {"licence": "CC0", "origin": "here"},
    ]


def test_format_lines_reads_a_document_per_line(tmp_path):
    path = write(tmp_path / "a.txt", b"one\r\n\ntwo\n\xe9t\xe9")
    assert texts(read(path, format="lines")) == ["one", "two", "été"]


def test_csv_rows_have_id_text_and_other_columns(tmp_path):
    path = write(tmp_path / "a.csv", b'id,text,label\nx,"two\nlines, ""quoted""",1\n\ny,b\nz,\xc3\xa9,2\n')
    records = read(path)
    assert records[0] == Record("x", 'two\nlines, "quoted"', "auto", {"label": "1"}, {})
    assert rejects(records) == [("main:a.csv:1", "wrong number of columns")]
    assert texts(records)[1:] == ["é"]


def test_csv_without_a_header_line(tmp_path):
    path = write(tmp_path / "a.csv.gz", gzip.compress(b"3,title,body\n4,t,b\n"))
    with pytest.raises(UserError, match=r"text_field='text'.*columns"):
        read(path)
    assert texts(read(path, columns=("class", "title", "text"))) == ["body", "b"]


def test_quotes_in_tsv_are_characters(tmp_path):
    path = write(tmp_path / "a.tsv", b'text\tlabel\n"unclosed\t0\nnext\t1\n')
    assert texts(read(path)) == ['"unclosed', "next"]


def test_csv_in_a_legacy_encoding(tmp_path):
    rows = [f'{i},"{LEGACY["cp1252"]}"' for i in range(20)]
    path = write(tmp_path / "a.csv", "\n".join(["id,text", *rows]).encode("cp1252"))
    assert texts(read(path)) == [LEGACY["cp1252"]] * 20


def test_parquet_rows_have_text_and_other_columns(tmp_path):
    rows = 1000
    table = pa.table({"text": [f"t{i}" for i in range(rows)], "score": [i / 2 for i in range(rows)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    records = read(tmp_path / "a.parquet")
    assert [(r.id, r.text, r.meta) for r in records] == [
        (f"main:a.parquet:{i}", f"t{i}", {"score": i / 2}) for i in range(rows)
    ]


def test_an_html_file_declares_its_encoding(tmp_path):
    page = "<html><head><meta charset=windows-1251></head><body>Привет</body></html>"
    (tmp_path / "a.html").write_bytes(page.encode("cp1251"))
    assert read(tmp_path / "a.html") == [Record("main:a.html", page, "html", {}, {"decoded from cp1251": 1})]


def test_html_in_a_field_keeps_its_markup(tmp_path):
    path = write(tmp_path / "a.jsonl", {"id": "1", "html": "<p>x", "text": "y"})
    assert read(path, text_field="html", content="html") == [Record("1", "<p>x", "html", {"text": "y"}, {})]


def test_stdlib_reads_the_sources_of_python():
    units = list_units("python", InputConfig())
    first = next(read_unit(units[0]))
    assert isinstance(first, Record) and first.id == "python:__future__.py"


# Units and ids.


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_records_and_ids_do_not_depend_on_units(tmp_path, monkeypatch, mark):
    rng = random.Random(0)
    lines = [{"text": f"{i} " + "x" * rng.randrange(200)} for i in range(500)]
    path = write(tmp_path / "a.jsonl", mark, *lines)
    one = read(path)
    assert texts(one) == [line["text"] for line in lines]
    for limit in (50, 997, 4096):
        monkeypatch.setattr("llmjax.data.readers.sources.choose_unit_bytes", lambda total, limit=limit: limit)
        assert len(list_units("main", InputConfig(path=str(path)))) > 10
        assert read(path) == one


def test_a_utf16_file_is_not_divided_into_units(tmp_path, monkeypatch):
    monkeypatch.setattr("llmjax.data.readers.sources.choose_unit_bytes", lambda total: 1000)
    lines = [{"text": f"{i} \u0a00"} for i in range(500)]  # its UTF-16 bytes contain that of a line feed
    (tmp_path / "a.jsonl").write_bytes(
        "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines).encode("utf-16")
    )
    assert texts(read(tmp_path / "a.jsonl")) == [line["text"] for line in lines]


def test_small_files_share_a_unit(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_text(str(i))
    units = list_units("main", InputConfig(path=str(tmp_path / "*.txt")))
    assert len(units) == 1 and len(units[0].items) == 30 and units[0].size == 50


def test_ids_are_relative_to_the_fixed_part_of_a_glob(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / "a.txt").write_text("a")
    assert [r.id for r in read(tmp_path / "x" / "**" / "*.txt")] == ["main:y/a.txt"]


def test_parts_of_a_long_text_have_numbered_ids(tmp_path, monkeypatch):
    monkeypatch.setattr("llmjax.data.readers.raw_records.MAX_TEXT_BYTES", 100)
    text = "\n\n".join(f"paragraph {i}" for i in range(50))
    (tmp_path / "a.txt").write_text(text)
    records = read(tmp_path / "a.txt")
    assert "".join(texts(records)) == text and len(records) > 2
    assert [r.id for r in records] == [f"main:a.txt#{i}" for i in range(len(records))]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "{}"}, "this is a folder; give a glob"),
        ({"path": "{}/none*.txt"}, "no file matches this glob"),
        ({"path": "{}/none.txt"}, "no such file"),
        ({"path": "{}/a.txt", "format": "jsonlines"}, r"format='jsonlines': expected one of"),
        ({"path": "{}/a.txt", "content": "htm"}, r"content='htm'.*did you mean 'html'"),
        ({"path": "{}/a.txt", "encoding": "utf-9"}, r"encoding='utf-9': no such encoding"),
        ({"path": "{}/a.parquet"}, r"text_field='text': .* has the columns words"),
    ],
)
def test_an_invalid_setting_is_one_line(tmp_path, fields, message):
    (tmp_path / "a.txt").write_text("a")
    pq.write_table(pa.table({"words": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message) as error:
        list_units("web", InputConfig(**{**fields, "path": fields["path"].format(tmp_path)}))
    assert "\n" not in str(error.value) and str(error.value).startswith("curate.inputs.web.")


# Damage.


def test_a_reject_has_the_id_of_its_record(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "a"}, {"id": "no-text", "body": "x"})
    assert rejects(read(path)) == [("no-text", "no field 'text'")]


def test_lone_surrogates_are_replaced_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "a \\ud800 b \\udc00 \\ud83d\\ude00", "title": "\\ud800"}\n')
    (record,) = read(path)
    assert record.text == "a \ufffd b \ufffd 😀" and record.notes == {encodings.SURROGATES: 2}
    assert record.meta == {"title": "\ufffd"}
    json.dumps(record).encode()


def test_jsonl_in_a_declared_encoding(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "été"}\n'.encode("cp1252"))
    assert rejects(read(path)) == [("main:a.jsonl@0", "not UTF-8")]
    assert texts(read(path, encoding="cp1252")) == ["été"]


@pytest.mark.parametrize("name", ["utf-16", "utf-8-sig", "utf-32"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_byte_order_marks_determine_the_encoding(tmp_path, name, kind):
    content = {"txt": "été 😀\n", "jsonl": '{"text": "été 😀\\n"}\n', "csv": 'text\n"été 😀\n"\n'}[kind]
    (tmp_path / f"a.{kind}").write_bytes(content.encode(name))
    assert texts(read(tmp_path / f"a.{kind}")) == ["été 😀\n"]


def test_words_of_a_megabyte(tmp_path):
    word = "x" * (1 << 20)
    write(tmp_path / "a.jsonl", {"text": word})
    (tmp_path / "b.csv").write_text(f"text\n{word}\n")
    (tmp_path / "c.txt").write_text(word)
    assert texts(read(tmp_path / "*")) == [word] * 3


def test_a_record_above_the_limit_is_rejected(tmp_path):
    write(tmp_path / "a.jsonl", {"text": "a"}, {"text": "x" * 5000}, {"text": "b"})
    records = read(tmp_path / "a.jsonl", max_record_bytes=1000)
    assert texts(records) == ["a", "b"]
    assert rejects(records) == [("main:a.jsonl@14", "longer than 1000 bytes (max_record_bytes)")]
    (tmp_path / "a.csv").write_text('text\na\n"' + "unclosed\n" * 500 + "\n")
    records = read(tmp_path / "a.csv", max_record_bytes=1000)
    assert texts(records)[0] == "a" and rejects(records)[0][1].startswith("not CSV: a quote that stays open")
    (tmp_path / "b.csv").write_text("text\na\n" + "x" * 5000 + "\nb\n")
    records = read(tmp_path / "b.csv", max_record_bytes=1000)
    assert texts(records) == ["a", "b"] and rejects(records) == [("main:b.csv:1", "not CSV: longer than 1000 bytes")]
    (tmp_path / "a.warc").write_bytes(response(b"<p>a") + response(b"<p>" + b"x" * 5000) + response(b"<p>b"))
    records = read(tmp_path / "a.warc", max_record_bytes=1000)
    assert texts(records) == ["<p>a", "<p>b"] and rejects(records)[0][1].startswith("longer than 1000 bytes")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.csv", "a.html", "a.warc", "a.parquet", "a.txt.zst"])
def test_empty_files_have_no_document(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    records = read(tmp_path / name)
    assert not texts(records)
    assert len(records) == (0 if name in ("a.jsonl.gz", "a.warc") else 1)


def test_a_binary_file_is_rejected(tmp_path):
    (tmp_path / "a.txt").write_bytes(random_bytes(5000))
    assert rejects(read(tmp_path / "a.txt")) == [("main:a.txt", "not text")]


def test_a_missing_file_is_an_error(tmp_path):
    """It may be available later, but a reject would be stored. Disk errors and permissions are handled the same."""
    (tmp_path / "a.txt").write_text("a")
    units = list_units("main", InputConfig(path=str(tmp_path / "a.txt")))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"curate\.inputs\.main\.path: .*a\.txt cannot be read \(No such file"):
        list(read_unit(units[0]))


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_records_before_a_truncation_are_kept(tmp_path, suffix):
    lines = [{"text": random_bytes(30, i).hex()} for i in range(20_000)]
    data = write(tmp_path / "plain", *lines).read_bytes()
    data = gzip.compress(data) if suffix == "gz" else zstandard.compress(data)
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(data[: len(data) // 2])
    records = read(tmp_path / f"a.jsonl.{suffix}")
    kept = texts(records)
    assert kept == [line["text"] for line in lines[: len(kept)]] and len(kept) > (9_500 if suffix == "gz" else 6_000)
    assert [reason for _, reason in rejects(records)][-1] == "unreadable"
    (tmp_path / f"a.txt.{suffix}").write_bytes(data[: len(data) // 2])
    text, rest = read(tmp_path / f"a.txt.{suffix}", format="text")
    assert text.notes == {"cut off": 1} and rest == Reject(text.id + "#rest", "unreadable", rest.excerpt, rest.size)
    assert rest.size >= len(text.text)  # the lost size is unknown: the complete file counts


def test_all_bytes_before_corrupt_gzip_data_are_kept(tmp_path):
    text = "\n".join(random_bytes(30, i).hex() for i in range(5000))
    pack = zlib.compressobj(wbits=31)
    head = pack.compress(text.encode()) + pack.flush(zlib.Z_FULL_FLUSH)
    (tmp_path / "a.txt.gz").write_bytes(head + b"\xff" * 50)  # no block type begins like this
    records = read(tmp_path / "a.txt.gz")
    assert texts(records) == [text] and records[0].notes == {"cut off": 1} and len(rejects(records)) == 1


def test_truncated_parquet(tmp_path):
    pq.write_table(pa.table({"text": ["a" * 50] * 10}), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(data[: len(data) // 2])
    records = read(tmp_path / "*.parquet")
    assert len(texts(records)) == 10 and rejects(records) == [("main:b.parquet#rest", "unreadable")]


def test_parquet_strings_that_are_not_utf8(tmp_path):
    column = pa.array([b"good", b"bad \xff", b"fine"], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": column, "note": column}), tmp_path / "a.parquet")
    records = read(tmp_path / "a.parquet")
    assert texts(records) == ["good", "fine"] and rejects(records) == [("main:a.parquet:1", "not UTF-8")]


def test_odd_columns_of_parquet_do_not_affect_others(tmp_path):
    """Dates out of range, unknown time zones, lists of texts that are not UTF-8, two columns with one name."""
    days = pa.array([2**31 - 1, 0], pa.date32())
    moments = pa.array([2**62, 0], pa.timestamp("ms"))
    zoned = pa.array([0, 0], pa.timestamp("s", tz="Nowhere/Atall"))
    broken = pa.array([[b"\xff"], [b"b"]], pa.list_(pa.binary())).cast(pa.list_(pa.string()), safe=False)
    names = ["text", "days", "moments", "zoned", "lists", "text"]
    first, second = pa.array(["first", "second"]), pa.array(["other", "other"])
    pq.write_table(pa.table([first, days, moments, zoned, broken, second], names=names), tmp_path / "a.parquet")
    records = read(tmp_path / "a.parquet")
    assert texts(records) == ["first", "second"] and records[1].meta["lists"] == ["b"]
    json.dumps([record.meta for record in records])


def test_an_input_without_records_is_an_error(tmp_path):
    pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("text", pa.string())])).close()
    with pytest.raises(UserError, match="contains no records"):
        read(tmp_path / "a.parquet")


def test_deeply_nested_fields_reject_at_most_one_record(tmp_path):
    deep = b'{"text": "deep", "x": ' + b"[" * 700 + b"]" * 700 + b"}\n"
    records = read(write(tmp_path / "a.jsonl", deep, {"text": "plain"}))
    assert texts(records)[-1] == "plain" and len(records) == 2


def test_an_invalid_id_is_copied_as_a_field(tmp_path):
    records = read(write(tmp_path / "a.jsonl", {"text": "a", "id": 7.5}, {"text": "b", "id": None}))
    assert [record.meta for record in records] == [{"id": 7.5}, {}]


# Encodings.


@pytest.mark.parametrize("codec", LEGACY)
def test_legacy_encodings_are_detected(tmp_path, codec):
    text = (LEGACY[codec] + "\n") * 3
    (tmp_path / "a.txt").write_bytes(text.encode(codec))
    (record,) = read(tmp_path / "a.txt")
    assert record.text == text and list(record.notes.values()) == [1]


# Archives.


def response(body, url="http://a.b/", head=b"Content-Type: text/html", status=b"200 OK", length=None):
    block = b"HTTP/1.1 " + status + b"\r\n" + head + b"\r\n\r\n" + body
    return (
        f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:{url}>\r\nWARC-Target-URI: {url}\r\n"
        f"WARC-Date: 2020-01-02T03:04:05Z\r\nContent-Type: application/http;msgtype=response\r\n"
        f"Content-Length: {len(block) if length is None else length}\r\n\r\n"
    ).encode() + (block + b"\r\n\r\n")


REQUEST = b"WARC/1.0\r\nWARC-Type: request\r\nContent-Length: 4\r\n\r\nGET \r\n\r\n"


@pytest.mark.parametrize("compressed", [False, True])
def test_warc_records_are_pages_or_rejects(tmp_path, compressed):
    records = [
        response("<p>été".encode("latin-1"), "http://1/", b"Content-Type: text/html; charset=ISO-8859-1"),
        REQUEST,
        response(b"<p>no", "http://2/", status=b"404 Not Found"),
        response(b"GIF", "http://3/", b"Content-Type: image/gif"),
        response(
            b"5\r\n<p>ab\r\n1\r\nc\r\n0\r\n\r\n", "http://4/", b"Transfer-Encoding: chunked\r\nContent-Type: text/html"
        ),
        response(gzip.compress(b"<p>zip"), "http://5/", b"Content-Encoding: gzip\r\nContent-Type: text/html"),
        response(b"<p>not zip", "http://6/", b"Content-Encoding: gzip\r\nContent-Type: text/html"),
        response(b"plain", "http://7/ x", b"Content-Type: text/plain"),
        response(b"<p>x", "http://8/", b"Content-Encoding: rot13\r\nContent-Type: text/html"),
    ]
    name = "a.warc.gz" if compressed else "a.warc"
    write(tmp_path / name, *(gzip.compress(record) if compressed else record for record in records))
    read_records = read(tmp_path / name)
    assert texts(read_records) == ["<p>été", "<p>abc", "<p>zip", "<p>not zip", "plain"]
    assert read_records[0].id == "urn:http://1/" and read_records[0].meta == {
        "url": "http://1/",
        "date": "2020-01-02T03:04:05Z",
    }
    assert [r.kind for r in read_records if isinstance(r, Record)] == ["html"] * 4 + ["text"]
    assert rejects(read_records) == [
        ("urn:http://2/", "HTTP status 404"),
        ("urn:http://3/", "content type image/gif"),
        ("urn:http://8/", "content encoding rot13"),
    ]


@pytest.mark.parametrize("length", ["10", "100000", "", "x", "999999999999", "9" * 5000])
def test_a_warc_record_of_a_wrong_length_does_not_affect_others(tmp_path, length):
    pages = [response(b"<p>" + str(i).encode() * 50, f"http://{i}/") for i in range(5)]
    pages[2] = response(b"<p>2", "http://2/", length=length)
    records = read(write(tmp_path / "a.warc", *pages))
    kept = {record.meta["url"] for record in records if isinstance(record, Record)}
    assert {f"http://{i}/" for i in (0, 1, 3, 4)} <= kept
    assert "http://2/" in kept or len(rejects(records)) == 1


def test_a_corrupt_gzip_member_affects_one_warc_record(tmp_path):
    members = [
        bytearray(gzip.compress(response(random_bytes(3000, i).hex().encode(), f"http://{i}/"))) for i in range(6)
    ]
    members[2][len(members[2]) // 2 :] = random_bytes(len(members[2]) // 2 + 1)
    records = read(write(tmp_path / "a.warc.gz", *map(bytes, members)))
    kept = [record for record in records if isinstance(record, Record)]
    assert [r.meta["url"] for r in kept if not r.notes] == [f"http://{i}/" for i in (0, 1, 3, 4, 5)]
    assert "unreadable" in [reason for _, reason in rejects(records)]


def test_damage_to_a_warc_never_raises(tmp_path):
    data = b"".join(response(random_bytes(300, i).hex().encode(), f"http://{i}/") for i in range(8))
    packed = b"".join(gzip.compress(response(random_bytes(300, i).hex().encode(), f"http://{i}/")) for i in range(8))
    rng = random.Random(1)
    for number in range(60):
        damaged = bytearray(packed if number % 2 else data)
        at = rng.randrange(len(damaged))
        damaged[at : at + rng.randrange(30)] = rng.randbytes(rng.randrange(30))
        assert len(texts(read(write(tmp_path / "a.warc", bytes(damaged))))) >= 6


# Numbers of pages and of rejects in each file.
@pytest.mark.parametrize(
    ("name", "num_pages", "num_rejects"),
    [
        ("bad.arc", 0, 3),
        ("dolma-sample-0000.warc.gz", 24, 0),
        ("example-bad-non-chunked.warc.gz", 1, 0),
        ("example-bad.warc.gz.bad", 1, 1),
        ("example-digest.warc", 0, 0),
        ("example-iana.org-chunked.warc", 1, 0),
        ("example-resource.warc.gz", 1, 0),
        ("example-space-in-target-uri.warc.gz", 0, 1),
        ("example-space-in-url.arc", 1, 0),
        ("example-trunc.warc", 1, 0),
        ("example-wget-bad-target-uri.warc.gz", 3, 0),
        ("example-wrong-chunks.warc.gz", 1, 0),
        ("example.arc", 1, 0),
        ("example.arc.gz", 1, 0),
        ("example.warc", 1, 0),
        ("example.warc.gz", 1, 0),
        ("post-test.warc.gz", 0, 3),
    ],
)
def test_published_archives(shared_data, name, num_pages, num_rejects):
    records = read(shared_data / "warc" / name, format="warc")
    assert (len(texts(records)), len(rejects(records))) == (num_pages, num_rejects), rejects(records)
    if "Example Domain" in "".join(texts(records)):
        assert "</html>" in texts(records)[0]


def test_shared_data_are_read(shared_data):
    columns = ("class", "title", "text")
    assert len(texts(read(shared_data / "agnews" / "test.csv.gz", columns=columns))) == 7600
    assert len(texts(read(shared_data / "sst2" / "dev.tsv", columns=("text", "label")))) == 872
    assert len(texts(read(shared_data / "common-crawl-docs" / "*.jsonl.gz"))) == 10


def test_an_arc_page_without_http_headers_is_html_by_content(tmp_path):
    path = tmp_path / "a.arc"
    body = b"<html>x"
    path.write_bytes(
        b"filedesc://a 0.0.0.0 20200101000000 text/plain 20\n1 0 x\nURL\n\n"
        + f"\nhttp://a/ 1.2.3.4 20200102030405 text/html {len(body)}\n".encode()
        + body
        + b"\n"
    )
    (page,) = warc.read_pages(str(path), 1000)
    assert isinstance(page, warc.Page) and (page.kind, page.date) == ("html", "2020-01-02T03:04:05Z")
