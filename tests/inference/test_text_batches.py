"""Texts are read by line; each is in one batch, whose shape depends on the text's own length alone."""

import pytest

from llmjax.errors import UserError
from llmjax.inference.text_batches import fill_batches, group_by_length, read_texts, round_length


def test_each_text_is_in_one_batch_of_its_own_shape():
    lengths = [3, 16, 17, 100, 2000, 5000, *[20] * 200]
    batches = list(group_by_length(lengths))
    assert sorted(index for indices, _, _ in batches for index in indices) == list(range(len(lengths)))
    for indices, rows, size in batches:
        assert len(indices) <= rows and all(size // 2 < max(lengths[i], 9) <= size for i in indices)
    shapes = {index: (rows, size) for indices, rows, size in batches for index in indices}
    assert shapes[0] == shapes[1] == (256, 16) and shapes[2] == (128, 32) and shapes[5] == (1, 8192)


def test_rows_are_not_longer_than_the_longest():
    assert [size for _, _, size in group_by_length([40, 90], 96)] == [64, 96]


def test_batches_have_the_given_number_of_rows():
    assert list(group_by_length([3, 40, 5, 7], rows=2)) == [([0, 2], 2, 16), ([3], 2, 16), ([1], 2, 64)]


def test_filled_batches_have_little_padding():
    sizes = [round_length(length) for length in range(1, 300)]
    assert sizes == sorted(sizes) and [*dict.fromkeys(sizes)][:12] == [
        16,
        24,
        32,
        40,
        48,
        56,
        64,
        80,
        96,
        112,
        128,
        160,
    ]
    assert all(length <= size <= max(16, length * 5 / 4 + 7) for length, size in enumerate(sizes, 1))
    assert round_length(17, multiple=16) == 32
    lengths, spans = [3, 40, 5, 7, 90], [9, 1, 2, 5, 1]
    assert list(fill_batches(lengths, spans, rows=2, longest=92)) == [([2, 3], 2, 16), ([0, 1], 2, 40), ([4], 2, 92)]


def test_texts(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b\\u2028c", "title": "d"}\n')
    assert read_texts(path, "text") == ["a", "b\u2028c"]
    with pytest.raises(UserError, match=r"in\.jsonl, line 1: has no text in the field 'title'; name it with --field"):
        read_texts(path, "title")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{', r"in\.jsonl, line 2: not JSON"),
        ('["a"]', "line 1: expected a JSON object"),
        ("", "has no lines"),
    ],
)
def test_bad_lines(tmp_path, content, message):
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        read_texts(tmp_path / "in.jsonl", "text")
