"""Changed copies: pure, seeded by id and number, and never more than was asked for."""

from llmjax.curate.config import AugmentConfig
from llmjax.curate.filters.augment import augment

TEXT = "  One two three four five.\n\n\tSix seven  eight nine ten.\n" * 20


def test_the_same_arguments_give_the_same_text_and_others_another():
    config = AugmentConfig(drop=0.2, swap=0.2)
    made = augment(TEXT, copy=1, id="a", config=config)
    assert made == augment(TEXT, copy=1, id="a", config=config)
    others = [augment(TEXT, copy=2, id="a", config=config), augment(TEXT, copy=1, id="b", config=config)]
    others.append(augment(TEXT, copy=1, id="a", config=AugmentConfig(drop=0.2, swap=0.2, seed=1)))
    assert len({made, *others}) == 4


def test_nothing_asked_nothing_changed():
    assert augment(TEXT, copy=1, id="a", config=AugmentConfig(drop=0, swap=0, case=0)) == TEXT


def test_only_words_of_the_text_in_about_the_number_asked_for():
    made = augment(TEXT, copy=1, id="a", config=AugmentConfig(drop=0.3, swap=0, case=0))
    assert set(made.split()) == set(TEXT.split())
    assert 0.6 < len(made.split()) / len(TEXT.split()) < 0.8
    assert made.count("\n") == TEXT.count("\n")


def test_a_line_keeps_a_word_and_case_is_of_a_whole_copy():
    assert augment("Word", copy=1, id="a", config=AugmentConfig(drop=1, swap=1, case=1)) == "word"
    assert augment("", copy=1, id="a", config=AugmentConfig()) == ""
