"""Records of JSON streams, CSV files and Parquet columns."""

import json

import pyarrow as pa
import pytest

from llmjax.data.readers import records
from llmjax.data.readers.records import BadRow
from llmjax.data.readers.streams import DamageError


def cut(data, size):
    return (data[at : at + size] for at in range(0, len(data), size))


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_json_elements_of_any_block_size(size):
    values = [{"a": '}]"\\'}, [1, {"b": "["}], "text, too", 5]
    data = json.dumps(values).encode() + b'\n{"c": [1]} {"d": 2}'
    elements = list(records.split_json(cut(data, size), 100))
    assert [json.loads(value) for _, value in elements] == [*values, {"c": [1]}, {"d": 2}]
    assert all(data[offset:].lstrip().startswith(value) for offset, value in elements)


def test_json_elements_above_the_limit_are_numbers():
    data = json.dumps(["short", "x" * 50, "end"]).encode()
    assert [value for _, value in records.split_json(cut(data, 7), 20)] == [b'"short"', 53, b'"end"']
    with pytest.raises(DamageError, match="ends inside a JSON value"):
        list(records.split_json(cut(data[:-1], 7), 20))


def test_unclosed_quote_invalidates_one_line():
    rows = list(records.parse_csv(iter([b'a,b\n1,"open\n2,two\n3,three\n']), "csv", 100))
    assert rows[:1] == [(["a", "b"], 4)]
    assert rows[1] == BadRow("the file ends inside a quote", '1,"open', 8)
    assert [row[0] for row in rows[2:]] == [["2", "two"], ["3", "three"]]


def test_rows_end_in_any_line_end_and_tsv_has_no_quotes():
    rows = list(records.parse_csv(iter([b'a,b\r1,"x\ry"\r\n2,z\n']), "csv", 100))
    assert [row[0] for row in rows] == [["a", "b"], ["1", "x\ry"], ["2", "z"]]
    rows = list(records.parse_csv(iter([b'a\t"b\n']), "tsv", 100))
    assert [row[0] for row in rows] == [["a", '"b']]


def test_values_of_arrow_columns():
    text = pa.array(["a", "é", None])
    for column in (text, text.dictionary_encode(), text.cast(pa.string_view()), text.cast(pa.large_binary())):
        assert records.is_text(column.type)
        assert records.read_column(column) == [b"a", "é".encode(), None]
    assert records.read_column(pa.array([1, 2])) == [1, 2] and not records.is_text(pa.int64())
    days = pa.array([2**31 - 1, 0], pa.date32())
    assert len(records.read_column(days)) == 2  # beyond Python's calendar
