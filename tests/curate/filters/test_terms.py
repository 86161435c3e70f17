"""Counts of the words in topic lists."""

import pytest

from llmjax.curate.filters import terms
from llmjax.errors import UserError


def test_only_complete_words_count():
    counts = terms.count_terms("She and her mother met HIM; the shepherd was there.", ())
    assert counts == {"gender/women": 3, "gender/men": 1}


def test_only_the_longest_of_overlapping_terms_counts(tmp_path):
    (tmp_path / "list.txt").write_text("# a comment\ncity/york: york\ncity/new york: new york\n")
    assert terms.count_terms("New York, York.", (str(tmp_path / "list.txt"),)) == {"city/new york": 1, "city/york": 1}


def test_a_word_in_two_groups_counts_in_both(tmp_path):
    (tmp_path / "list.txt").write_text("a/x: bank\nb/y: bank, river\n")
    assert terms.count_terms("the bank", (str(tmp_path / "list.txt"),)) == {"a/x": 1, "b/y": 1}


@pytest.mark.parametrize("line", ["no colon here", "group:", "group: ,"])
def test_the_error_names_the_bad_line(tmp_path, line):
    (tmp_path / "list.txt").write_text(f"a/x: word\n{line}\n")
    with pytest.raises(UserError, match="line 2"):
        terms.parse_lists((str(tmp_path / "list.txt"),))
