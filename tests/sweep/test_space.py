"""Ranges of a sweep: how they are parsed, and that a bad one is named before anything is trained."""

import pytest

from llmjax.errors import UserError
from llmjax.run import config as run_config
from llmjax.sweep import space


def resolve(overrides):
    return run_config.resolve("quickstart", [("data.tokenizer.kind", "bytes"), *overrides])


def test_each_kind_of_range_is_parsed():
    log, uniform, integer, choice = space.parse(
        [
            "optimizer.learning_rate=log(1e-4, 1e-2)",
            "model.dropout=uniform(0,0.5)",
            "model.num_layers=int(2,8,3)",
            "model.activation = choice('silu', gelu)",
        ]
    )
    assert (log.field, log.kind, log.low, log.high) == ("optimizer.learning_rate", "log", 1e-4, 1e-2)
    assert log.distribution.log and not uniform.distribution.log  # pyright: ignore[reportAttributeAccessIssue]
    assert integer.grid == (2, 5, 8) and choice.choices == ("silu", "gelu")
    params = {log.field: 0.00123456789, uniform.field: 0.25, integer.field: 5, choice.field: "gelu"}
    assert space.write_overrides([log, uniform, integer, choice], params) == [
        ("optimizer.learning_rate", "0.0012346"),
        ("model.dropout", "0.25"),
        ("model.num_layers", "5"),
        ("model.activation", "gelu"),
    ]


def test_a_choice_keeps_brackets_and_quoted_commas_together():
    (each,) = space.parse(["data.classes=choice(('a','b'), ('a, c',))"])
    assert each.choices == ("('a','b')", "('a, c',)")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optimizer.learning_rate", "not a range"),
        ("optimizer.learning_rate=lgo(1,2)", "did you mean 'log'"),
        ("optimizer.learning_rate=log(0,1)", "no logarithm"),
        ("optimizer.learning_rate=log(1e-2,1e-4)", "1e-2 must be below 1e-4"),
        ("optimizer.learning_rate=log(1e-4)", r"expected log\(LOW,HIGH\)"),
        ("optimizer.learning_rate=uniform(0,inf)", "not a finite number"),
        ("model.num_layers=int(2,3.5)", "not an integer"),
        ("model.num_layers=int(2,8,0)", "step 0 must be at least 1"),
        ("model.activation=choice(silu)", "two or more"),
        ("model.activation=choice(silu,,gelu)", "empty"),
        ("data.classes=choice((1,2)", "not closed"),
        ("eval.metric=choice(loss,accuracy)", "cannot be compared"),
    ],
)
def test_text_that_is_no_range_is_named(text, words):
    with pytest.raises(UserError, match=words):
        space.parse([text])


def test_a_field_has_one_range():
    with pytest.raises(UserError, match="has 2 ranges"):
        space.parse(["model.dropout=uniform(0,1)", "model.dropout=uniform(0,0.5)"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optimizer.learning_rat=log(1e-4,1e-2)", "did you mean 'learning_rate'"),
        ("model.num_layers=uniform(2,8)", "expected an integer"),
        ("model.dropout=uniform(0,1)", "model.dropout=1"),
        ("model.num_layers=choice(2,many)", "expected an integer"),
        ("model.activation=choice(silu,glue)", "did you mean 'gelu'"),
        ("model=choice(a,b)", "this is a section"),
        ("model.num_heads=choice(3,7)", "7"),
        ("data.split.validation=choice(0.1,0.2)", "changes the token store"),
        ("train.steps=int(10,20)", "both set train.steps"),
    ],
)
def test_a_range_that_the_config_does_not_take_is_named(text, words):
    with pytest.raises(UserError, match=words) as error:
        space.check(space.parse([text]), [("train.steps", "5")], resolve)
    assert text in str(error.value)


def test_a_value_that_fits_with_another_range_is_accepted():
    """A width of 224 has no whole heads with the config's 6, and has with 7."""
    space.check(space.parse(["model.embed=choice(192,224)", "model.num_heads=choice(6,7)"]), [], resolve)
