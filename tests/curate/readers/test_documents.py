"""Reading: every kind of file gives its documents, whatever is wrong beside them; the rest is refused with a reason."""

import gzip
import json
import random
from typing import ClassVar
import zlib

import numpy as np
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

# ruff: noqa: RUF001 (letters of other alphabets are meant)
LEGACY = {
    "cp1252": "Ça coûte 5 €; « l’été » déjà passé, où l'on goûtait à tout sans façon.",
    "cp1251": "Все люди рождаются свободными и равными в своём достоинстве и правах.",
    "koi8-r": "Все люди рождаются свободными и равными в своём достоинстве и правах.",
    "cp1250": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw.",
    "cp932": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "gb18030": "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。",
    "cp949": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
}


def run(path, **fields):
    return [record for unit in list_units("main", InputConfig(path=str(path), **fields)) for record in read_unit(unit)]


def texts(records):
    return [record.text for record in records if isinstance(record, Record)]


def refused(records):
    return [(record.id, record.reason) for record in records if isinstance(record, Reject)]


def write(path, *lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return path


def noise(size, seed=0):
    return random.Random(seed).randbytes(size)


# Kinds of files.


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a", "a.txt.gz", "a.txt.zst"])
def test_text_comes_back_untouched(tmp_path, name):
    odd = "\ttab\r\nCRLF\r\n\n  two spaces  \n\u2581 \0 é 😀"
    data = odd.encode()
    data = gzip.compress(data) if name.endswith(".gz") else zstandard.compress(data) if name.endswith(".zst") else data
    (tmp_path / name).write_bytes(data)
    assert run(tmp_path / name) == [Record(f"main:{name}", odd, "text", {}, {})]


def test_packing_is_detected_by_content_not_by_name(tmp_path):
    (tmp_path / "a.txt").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "b.txt.gz").write_bytes(b"plain")
    assert texts(run(tmp_path / "*")) == ["packed", "plain"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "json"])
def test_jsonl_gives_text_id_and_the_other_fields(tmp_path, suffix, ending):
    records = [{"body": f"text {i}", "key": i, "url": f"u{i}", "n": {"a": [1, None]}} for i in range(3)]
    data = "\n\n".join(map(json.dumps, records)).encode()
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    (tmp_path / f"a.{ending}{suffix}").write_bytes(pack(data))
    found = run(tmp_path / f"a.{ending}{suffix}", text_field="body", id_field="key")
    assert found == [Record(str(i), f"text {i}", "auto", {"url": f"u{i}", "n": {"a": [1, None]}}, {}) for i in range(3)]


def test_fields_licence_and_origin_are_carried_through(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "a", "licence": "MIT", "junk": 1}, {"text": "b"})
    found = run(path, fields=("licence",), licence="CC0", origin="here")
    assert [record.meta for record in found] == [
        {"licence": "MIT", "origin": "here"},
        {"licence": "CC0", "origin": "here"},
    ]


def test_lines_are_documents_on_demand(tmp_path):
    path = write(tmp_path / "a.txt", b"one\r\n\ntwo\n\xe9t\xe9")
    assert texts(run(path, format="lines")) == ["one", "two", "été"]


def test_csv(tmp_path):
    path = write(tmp_path / "a.csv", b'id,text,label\nx,"two\nlines, ""quoted""",1\n\ny,b\nz,\xc3\xa9,2\n')
    found = run(path)
    assert found[0] == Record("x", 'two\nlines, "quoted"', "auto", {"label": "1"}, {})
    assert refused(found) == [("main:a.csv:1", "wrong number of columns")]
    assert texts(found)[1:] == ["é"]


def test_csv_without_a_header(tmp_path):
    path = write(tmp_path / "a.csv.gz", gzip.compress(b"3,title,body\n4,t,b\n"))
    with pytest.raises(UserError, match=r"text_field='text'.*columns"):
        run(path)
    assert texts(run(path, columns=("class", "title", "text"))) == ["body", "b"]


def test_a_quote_in_tsv_is_a_quote(tmp_path):
    path = write(tmp_path / "a.tsv", b'text\tlabel\n"unclosed\t0\nnext\t1\n')
    assert texts(run(path)) == ['"unclosed', "next"]


def test_csv_in_an_old_encoding(tmp_path):
    rows = [f'{i},"{LEGACY["cp1252"]}"' for i in range(20)]
    path = write(tmp_path / "a.csv", "\n".join(["id,text", *rows]).encode("cp1252"))
    assert texts(run(path)) == [LEGACY["cp1252"]] * 20


def test_parquet(tmp_path):
    rows = 1000
    table = pa.table({"text": [f"t{i}" for i in range(rows)], "score": [i / 2 for i in range(rows)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    found = run(tmp_path / "a.parquet")
    assert [(r.id, r.text, r.meta) for r in found] == [
        (f"main:a.parquet:{i}", f"t{i}", {"score": i / 2}) for i in range(rows)
    ]


def test_tfds(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")

    class Toy(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        url_infos: ClassVar = {}  # nothing to download

        def _info(self):
            features = {"text": tfds.features.Text(), "label": np.int64}
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(3):
                yield i, {"text": f"é {i}", "label": i}

    Toy(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    found = run(f"tfds:toy@{tmp_path}")
    assert sorted((r.text, r.meta["label"]) for r in found) == [("é 0", 0), ("é 1", 1), ("é 2", 2)]
    assert json.dumps(found[0].meta)
    with pytest.raises(UserError, match=r"text_field='body': .* has the columns label, text"):
        run(f"tfds:toy@{tmp_path}", text_field="body")


def test_html(tmp_path):
    page = "<html><head><meta charset=windows-1251></head><body>Привет</body></html>"
    (tmp_path / "a.html").write_bytes(page.encode("cp1251"))
    assert run(tmp_path / "a.html") == [Record("main:a.html", page, "html", {}, {"decoded from cp1251": 1})]


def test_html_in_a_field(tmp_path):
    path = write(tmp_path / "a.jsonl", {"id": "1", "html": "<p>x", "text": "y"})
    assert run(path, text_field="html", content="html") == [Record("1", "<p>x", "html", {"text": "y"}, {})]


def test_stdlib():
    units = list_units("python", InputConfig())
    first = next(read_unit(units[0]))
    assert isinstance(first, Record) and first.id == "python:__future__.py"


# Units and ids.


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_units_of_one_file_are_the_whole_and_ids_do_not_depend_on_them(tmp_path, monkeypatch, mark):
    rng = random.Random(0)
    lines = [{"text": f"{i} " + "x" * rng.randrange(200)} for i in range(500)]
    path = write(tmp_path / "a.jsonl", mark, *lines)
    one = run(path)
    assert texts(one) == [line["text"] for line in lines]
    for limit in (50, 997, 4096):
        monkeypatch.setattr("llmjax.data.readers.sources.choose_unit_bytes", lambda total, limit=limit: limit)
        assert len(list_units("main", InputConfig(path=str(path)))) > 10
        assert run(path) == one


def test_a_file_whose_line_ends_are_wider_than_a_byte_is_not_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("llmjax.data.readers.sources.choose_unit_bytes", lambda total: 1000)
    lines = [{"text": f"{i} \u0a00"} for i in range(500)]  # its bytes hold a line feed's
    (tmp_path / "a.jsonl").write_bytes(
        "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines).encode("utf-16")
    )
    assert texts(run(tmp_path / "a.jsonl")) == [line["text"] for line in lines]


def test_small_files_share_a_unit(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_text(str(i))
    units = list_units("main", InputConfig(path=str(tmp_path / "*.txt")))
    assert len(units) == 1 and len(units[0].items) == 30 and units[0].size == 50


def test_ids_are_relative_to_the_fixed_part_of_a_glob(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / "a.txt").write_text("a")
    assert [r.id for r in run(tmp_path / "x" / "**" / "*.txt")] == ["main:y/a.txt"]


def test_a_long_text_becomes_several_documents(tmp_path, monkeypatch):
    monkeypatch.setattr("llmjax.data.readers.raw_records.MAX_TEXT_BYTES", 100)
    text = "\n\n".join(f"paragraph {i}" for i in range(50))
    (tmp_path / "a.txt").write_text(text)
    found = run(tmp_path / "a.txt")
    assert "".join(texts(found)) == text and len(found) > 2
    assert [r.id for r in found] == [f"main:a.txt#{i}" for i in range(len(found))]


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
def test_a_wrong_setting_is_one_line(tmp_path, fields, message):
    (tmp_path / "a.txt").write_text("a")
    pq.write_table(pa.table({"words": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message) as error:
        list_units("web", InputConfig(**{**fields, "path": fields["path"].format(tmp_path)}))
    assert "\n" not in str(error.value) and str(error.value).startswith("curate.inputs.web.")


# What is wrong in files.


def test_bad_lines_are_refused_one_by_one(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"text": "first"},
        b'{"text": "bad \xff byte"}\n',
        b'{"text": "no end\n',
        b"[1, 2]\n",
        {"id": "no-text", "body": "x"},
        {"text": 5},
        {"text": None},
        {"text": " \n"},
        b"[" * 100_000 + b"\n",
        b'{"text": ' + b"9" * 5000 + b"}\n",
        b"\0\0\0\n",
        {"text": "nul \0 stays"},
        {"text": "last"},
    )
    found = run(path)
    assert texts(found) == ["first", "nul \0 stays", "last"]
    assert [reason for _, reason in refused(found)] == [
        "not UTF-8",
        "not JSON",
        "not a JSON object",
        "no field 'text'",
        "field 'text' is not a text",
        "field 'text' is not a text",
        "empty",
        "not JSON",
        "not JSON",
        "not JSON",
    ]
    assert ("no-text", "no field 'text'") in refused(found)
    assert refused(found)[0][0] == "main:a.jsonl@18"  # the offset of the line


def test_lone_surrogates_are_replaced_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "a \\ud800 b \\udc00 \\ud83d\\ude00", "title": "\\ud800"}\n')
    (found,) = run(path)
    assert found.text == "a \ufffd b \ufffd 😀" and found.notes == {encodings.SURROGATES: 2}
    assert found.meta == {"title": "\ufffd"}
    json.dumps(found).encode()


def test_a_declared_encoding_reads_jsonl(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "été"}\n'.encode("cp1252"))
    assert refused(run(path)) == [("main:a.jsonl@0", "not UTF-8")]
    assert texts(run(path, encoding="cp1252")) == ["été"]


@pytest.mark.parametrize("name", ["utf-16", "utf-8-sig", "utf-32"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_byte_order_marks(tmp_path, name, kind):
    content = {"txt": "été 😀\n", "jsonl": '{"text": "été 😀\\n"}\n', "csv": 'text\n"été 😀\n"\n'}[kind]
    (tmp_path / f"a.{kind}").write_bytes(content.encode(name))
    assert texts(run(tmp_path / f"a.{kind}")) == ["été 😀\n"]


def test_a_word_of_a_megabyte(tmp_path):
    word = "x" * (1 << 20)
    write(tmp_path / "a.jsonl", {"text": word})
    (tmp_path / "b.csv").write_text(f"text\n{word}\n")
    (tmp_path / "c.txt").write_text(word)
    assert texts(run(tmp_path / "*")) == [word] * 3


def test_a_record_above_the_limit_is_refused(tmp_path):
    write(tmp_path / "a.jsonl", {"text": "a"}, {"text": "x" * 5000}, {"text": "b"})
    found = run(tmp_path / "a.jsonl", max_record_bytes=1000)
    assert texts(found) == ["a", "b"]
    assert refused(found) == [("main:a.jsonl@14", "longer than 1000 bytes (max_record_bytes)")]
    (tmp_path / "a.csv").write_text('text\na\n"' + "unclosed\n" * 500 + "\n")
    found = run(tmp_path / "a.csv", max_record_bytes=1000)
    assert texts(found)[0] == "a" and refused(found)[0][1].startswith("not CSV: a quote that stays open")
    (tmp_path / "b.csv").write_text("text\na\n" + "x" * 5000 + "\nb\n")
    found = run(tmp_path / "b.csv", max_record_bytes=1000)
    assert texts(found) == ["a", "b"] and refused(found) == [("main:b.csv:1", "not CSV: longer than 1000 bytes")]
    (tmp_path / "a.warc").write_bytes(response(b"<p>a") + response(b"<p>" + b"x" * 5000) + response(b"<p>b"))
    found = run(tmp_path / "a.warc", max_record_bytes=1000)
    assert texts(found) == ["<p>a", "<p>b"] and refused(found)[0][1].startswith("longer than 1000 bytes")


def test_csv_that_ends_inside_a_quote_loses_one_row(tmp_path):
    write(tmp_path / "a.csv", b'id,text\n1,one\n2,"open\n3,three\n4,four\n')
    found = run(tmp_path / "a.csv")
    assert texts(found) == ["one", "three", "four"]
    assert refused(found) == [("main:a.csv:1", "not CSV: the file ends inside a quote")]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.csv", "a.html", "a.warc", "a.parquet", "a.txt.zst"])
def test_empty_files_give_no_document(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    found = run(tmp_path / name)
    assert not texts(found)
    assert len(found) == (0 if name in ("a.jsonl.gz", "a.warc") else 1)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(noise(5000))
    assert refused(run(tmp_path / "a.txt")) == [("main:a.txt", "not text")]


def test_a_file_that_cannot_be_read_now_stops_the_command(tmp_path):
    """It may come back: a reject would be remembered. The disk's errors and permissions take the same way."""
    (tmp_path / "a.txt").write_text("a")
    units = list_units("main", InputConfig(path=str(tmp_path / "a.txt")))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"curate\.inputs\.main\.path: .*a\.txt cannot be read \(No such file"):
        list(read_unit(units[0]))


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_what_precedes_a_truncation_is_kept(tmp_path, suffix):
    lines = [{"text": noise(30, i).hex()} for i in range(20_000)]
    data = write(tmp_path / "plain", *lines).read_bytes()
    data = gzip.compress(data) if suffix == "gz" else zstandard.compress(data)
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(data[: len(data) // 2])
    found = run(tmp_path / f"a.jsonl.{suffix}")
    kept = texts(found)
    assert kept == [line["text"] for line in lines[: len(kept)]] and len(kept) > (9_500 if suffix == "gz" else 6_000)
    assert [reason for _, reason in refused(found)][-1] == "unreadable"
    (tmp_path / f"a.txt.{suffix}").write_bytes(data[: len(data) // 2])
    text, rest = run(tmp_path / f"a.txt.{suffix}", format="text")
    assert text.notes == {"cut off": 1} and rest == Reject(text.id + "#rest", "unreadable", rest.excerpt, rest.size)
    assert rest.size >= len(text.text)  # nobody knows more: the file counts whole


def test_what_precedes_broken_gzip_data_is_kept_to_the_byte(tmp_path):
    text = "\n".join(noise(30, i).hex() for i in range(5000))
    pack = zlib.compressobj(wbits=31)
    head = pack.compress(text.encode()) + pack.flush(zlib.Z_FULL_FLUSH)
    (tmp_path / "a.txt.gz").write_bytes(head + b"\xff" * 50)  # no kind of block begins so
    found = run(tmp_path / "a.txt.gz")
    assert texts(found) == [text] and found[0].notes == {"cut off": 1} and len(refused(found)) == 1


def test_broken_parquet(tmp_path):
    pq.write_table(pa.table({"text": ["a" * 50] * 10}), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(data[: len(data) // 2])
    found = run(tmp_path / "*.parquet")
    assert len(texts(found)) == 10 and refused(found) == [("main:b.parquet#rest", "unreadable")]


def test_parquet_strings_that_are_not_utf8(tmp_path):
    column = pa.array([b"good", b"bad \xff", b"fine"], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": column, "note": column}), tmp_path / "a.parquet")
    found = run(tmp_path / "a.parquet")
    assert texts(found) == ["good", "fine"] and refused(found) == [("main:a.parquet:1", "not UTF-8")]


def test_odd_columns_of_parquet_cost_nothing_else(tmp_path):
    """Dates beyond the calendar, unknown zones, texts in lists that are not UTF-8, two columns of one name."""
    days = pa.array([2**31 - 1, 0], pa.date32())
    moments = pa.array([2**62, 0], pa.timestamp("ms"))
    zoned = pa.array([0, 0], pa.timestamp("s", tz="Nowhere/Atall"))
    broken = pa.array([[b"\xff"], [b"b"]], pa.list_(pa.binary())).cast(pa.list_(pa.string()), safe=False)
    names = ["text", "days", "moments", "zoned", "lists", "text"]
    first, second = pa.array(["first", "second"]), pa.array(["other", "other"])
    pq.write_table(pa.table([first, days, moments, zoned, broken, second], names=names), tmp_path / "a.parquet")
    found = run(tmp_path / "a.parquet")
    assert texts(found) == ["first", "second"] and found[1].meta["lists"] == ["b"]
    json.dumps([record.meta for record in found])


def test_no_records_at_all(tmp_path):
    pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("text", pa.string())])).close()
    with pytest.raises(UserError, match="holds no records"):
        run(tmp_path / "a.parquet")


def test_fields_nested_deeply_cost_one_record(tmp_path):
    deep = b'{"text": "deep", "x": ' + b"[" * 700 + b"]" * 700 + b"}\n"
    found = run(write(tmp_path / "a.jsonl", deep, {"text": "plain"}))
    assert texts(found)[-1] == "plain" and len(found) == 2


def test_an_id_that_names_nothing_is_carried_through(tmp_path):
    found = run(write(tmp_path / "a.jsonl", {"text": "a", "id": 7.5}, {"text": "b", "id": None}))
    assert [record.meta for record in found] == [{"id": 7.5}, {}]


# Encodings.


@pytest.mark.parametrize("codec", LEGACY)
def test_old_encodings_are_detected(tmp_path, codec):
    text = (LEGACY[codec] + "\n") * 3
    (tmp_path / "a.txt").write_bytes(text.encode(codec))
    (found,) = run(tmp_path / "a.txt")
    assert found.text == text and list(found.notes.values()) == [1]


# Captured pages.


def response(body, url="http://a.b/", head=b"Content-Type: text/html", status=b"200 OK", length=None):
    block = b"HTTP/1.1 " + status + b"\r\n" + head + b"\r\n\r\n" + body
    return (
        f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:{url}>\r\nWARC-Target-URI: {url}\r\n"
        f"WARC-Date: 2020-01-02T03:04:05Z\r\nContent-Type: application/http;msgtype=response\r\n"
        f"Content-Length: {len(block) if length is None else length}\r\n\r\n"
    ).encode() + (block + b"\r\n\r\n")


REQUEST = b"WARC/1.0\r\nWARC-Type: request\r\nContent-Length: 4\r\n\r\nGET \r\n\r\n"


@pytest.mark.parametrize("packed", [False, True])
def test_warc(tmp_path, packed):
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
    name = "a.warc.gz" if packed else "a.warc"
    write(tmp_path / name, *(gzip.compress(record) if packed else record for record in records))
    found = run(tmp_path / name)
    assert texts(found) == ["<p>été", "<p>abc", "<p>zip", "<p>not zip", "plain"]
    assert found[0].id == "urn:http://1/" and found[0].meta == {"url": "http://1/", "date": "2020-01-02T03:04:05Z"}
    assert [r.kind for r in found if isinstance(r, Record)] == ["html"] * 4 + ["text"]
    assert refused(found) == [
        ("urn:http://2/", "HTTP status 404"),
        ("urn:http://3/", "content type image/gif"),
        ("urn:http://8/", "content encoding rot13"),
    ]


@pytest.mark.parametrize("length", ["10", "100000", "", "x", "999999999999", "9" * 5000])
def test_a_warc_record_of_a_wrong_length_costs_no_other(tmp_path, length):
    pages = [response(b"<p>" + str(i).encode() * 50, f"http://{i}/") for i in range(5)]
    pages[2] = response(b"<p>2", "http://2/", length=length)
    found = run(write(tmp_path / "a.warc", *pages))
    kept = {record.meta["url"] for record in found if isinstance(record, Record)}
    assert {f"http://{i}/" for i in (0, 1, 3, 4)} <= kept
    assert "http://2/" in kept or len(refused(found)) == 1


def test_a_broken_gzip_member_costs_one_warc_record(tmp_path):
    members = [bytearray(gzip.compress(response(noise(3000, i).hex().encode(), f"http://{i}/"))) for i in range(6)]
    members[2][len(members[2]) // 2 :] = noise(len(members[2]) // 2 + 1)
    found = run(write(tmp_path / "a.warc.gz", *map(bytes, members)))
    kept = [record for record in found if isinstance(record, Record)]
    assert [r.meta["url"] for r in kept if not r.notes] == [f"http://{i}/" for i in (0, 1, 3, 4, 5)]
    assert "unreadable" in [reason for _, reason in refused(found)]


def test_no_damage_to_a_warc_raises(tmp_path):
    data = b"".join(response(noise(300, i).hex().encode(), f"http://{i}/") for i in range(8))
    packed = b"".join(gzip.compress(response(noise(300, i).hex().encode(), f"http://{i}/")) for i in range(8))
    rng = random.Random(1)
    for number in range(60):
        broken = bytearray(packed if number % 2 else data)
        at = rng.randrange(len(broken))
        broken[at : at + rng.randrange(30)] = rng.randbytes(rng.randrange(30))
        assert len(texts(run(write(tmp_path / "a.warc", bytes(broken))))) >= 6


# Pages, and records that are refused or damaged, of each file.
@pytest.mark.parametrize(
    ("name", "pages", "others"),
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
def test_published_archives(shared_data, name, pages, others):
    found = run(shared_data / "warc" / name, format="warc")
    assert (len(texts(found)), len(refused(found))) == (pages, others), refused(found)
    if "Example Domain" in "".join(texts(found)):
        assert "</html>" in texts(found)[0]


def test_files_of_shared_data_are_read(shared_data):
    columns = ("class", "title", "text")
    assert len(texts(run(shared_data / "agnews" / "test.csv.gz", columns=columns))) == 7600
    assert len(texts(run(shared_data / "sst2" / "dev.tsv", columns=("text", "label")))) == 872
    assert len(texts(run(shared_data / "common-crawl-docs" / "*.jsonl.gz"))) == 10


def test_a_page_without_headers_is_detected_by_its_look(tmp_path):
    path = tmp_path / "a.arc"
    body = b"<html>x"
    path.write_bytes(
        b"filedesc://a 0.0.0.0 20200101000000 text/plain 20\n1 0 x\nURL\n\n"
        + f"\nhttp://a/ 1.2.3.4 20200102030405 text/html {len(body)}\n".encode()
        + body
        + b"\n"
    )
    (page,) = warc.pages(str(path), 1000)
    assert isinstance(page, warc.Page) and (page.kind, page.date) == ("html", "2020-01-02T03:04:05Z")
