"""Word lists: who and what a corpus speaks of."""

import pytest

from llmjax.curate.filters import terms
from llmjax.errors import UserError


def test_groups_are_counted_by_whole_words():
    found = terms.count("She and her mother met HIM; the shepherd was there.", ())
    assert found == {"gender/women": 3, "gender/men": 1}


def test_the_longest_term_counts_once(tmp_path):
    (tmp_path / "list.txt").write_text("# a comment\nplace/york: york\nplace/new york: new york\n")
    assert terms.count("New York, York.", (str(tmp_path / "list.txt"),)) == {"place/new york": 1, "place/york": 1}


def test_a_word_of_two_groups_counts_in_both(tmp_path):
    (tmp_path / "list.txt").write_text("a/x: bank\nb/y: bank, river\n")
    assert terms.count("the bank", (str(tmp_path / "list.txt"),)) == {"a/x": 1, "b/y": 1}


@pytest.mark.parametrize("line", ["no colon here", "group:", "group: ,"])
def test_a_bad_line_is_named(tmp_path, line):
    (tmp_path / "list.txt").write_text(f"a/x: word\n{line}\n")
    with pytest.raises(UserError, match="line 2"):
        terms.parse((str(tmp_path / "list.txt"),))
