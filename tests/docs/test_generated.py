"""The generated parts of the documentation are up to date."""

import collections

import pytest

from tests.docs import generated
from tests.docs.pages import README, fenced_blocks

HINT = "run python -m tests.docs.generated"


def test_the_file_tree_is_up_to_date():
    assert generated.file_tree() + "\n" in fenced_blocks(generated.ARCHITECTURE), HINT


@pytest.mark.slow
def test_the_tables_of_models_are_up_to_date():
    assert generated.models_table() + "\n" in generated.MODELS.read_text(), HINT
    assert generated.families_table() + "\n" in README.read_text(), HINT


def test_configs_of_a_family_share_their_objectives():
    """The README's table has one list of objectives per family."""
    objectives = collections.defaultdict(set)
    for family, files in generated.recipes().items():
        objectives[family] |= {models[0].objectives for _, _, models in files}
    assert all(len(lists) <= 1 for lists in objectives.values()), objectives
