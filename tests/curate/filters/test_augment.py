"""Changed copies depend on the seed, the id and the copy number alone."""

from llmjax.curate.config import AugmentConfig
from llmjax.curate.filters.augment import change_text

TEXT = "  One two three four five.\n\n\tSix seven  eight nine ten.\n" * 20


def test_equal_arguments_give_equal_texts_and_others_differ():
    config = AugmentConfig(drop=0.2, swap=0.2)
    changed = change_text(TEXT, copy=1, id="a", config=config)
    assert changed == change_text(TEXT, copy=1, id="a", config=config)
    others = [change_text(TEXT, copy=2, id="a", config=config), change_text(TEXT, copy=1, id="b", config=config)]
    others.append(change_text(TEXT, copy=1, id="a", config=AugmentConfig(drop=0.2, swap=0.2, seed=1)))
    assert len({changed, *others}) == 4


def test_zero_probabilities_change_nothing():
    assert change_text(TEXT, copy=1, id="a", config=AugmentConfig(drop=0, swap=0, lowercase=0)) == TEXT


def test_about_the_configured_fraction_of_words_is_dropped():
    changed = change_text(TEXT, copy=1, id="a", config=AugmentConfig(drop=0.3, swap=0, lowercase=0))
    assert set(changed.split()) == set(TEXT.split())
    assert 0.6 < len(changed.split()) / len(TEXT.split()) < 0.8
    assert changed.count("\n") == TEXT.count("\n")


def test_a_line_keeps_at_least_one_word():
    assert change_text("Word", copy=1, id="a", config=AugmentConfig(drop=1, swap=1, lowercase=1)) == "word"
    assert change_text("", copy=1, id="a", config=AugmentConfig()) == ""
