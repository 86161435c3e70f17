"""Phases: steps, rows, mixtures, batches and learning rates of each, from the config alone."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from llmjax.errors import UserError
from llmjax.optim.schedules import make_schedule
from llmjax.run import phases
from llmjax.run.config import RunConfig, apply_overrides

TREE = {
    "seed": 3,
    "data": {"seq_len": 64, "sources": {"a": {"path": "a", "weight": 3}, "b": {"path": "b", "weight": 1}}},
    "train": {"steps": 12, "global_batch": 16},
    "optimizer": {"schedule": "linear", "learning_rate": 1e-2, "warmup_steps": 2},
}
PHASES = {
    "phases.long.after_step": 7,
    "phases.long.seq_len": 128,
    "phases.long.global_batch": 4,
    "phases.mix.after_step": 3,
    "phases.mix.weights.b": 2,
    "phases.mix.global_batch": 8,
    "phases.end.after_step": 10,
    "phases.end.learning_rate": 1e-3,
    "phases.end.weights.a": 1,
}


def make_config(**more: Any) -> RunConfig:
    """A config with PHASES and further fields, dots written as two underscores."""
    fields = {**PHASES, **{name.replace("__", "."): value for name, value in more.items()}}
    tree = {name: dict(section) if isinstance(section, dict) else section for name, section in TREE.items()}
    return apply_overrides(tree, [(name, str(value)) for name, value in fields.items()])


def test_a_phase_changes_what_it_sets_and_keeps_the_rest():
    config = make_config()
    first, mix, long, end = phases.split(config)
    assert [(each.name, each.first, each.last, each.batch) for each in (first, mix, long, end)] == [
        ("first", 0, 3, 16),
        ("mix", 3, 7, 8),
        ("long", 7, 10, 4),
        ("end", 10, 12, 4),
    ]
    assert first.config == mix.config and long.config == end.config, "phases with one row length read one stream"
    data, train = mix.config.data, mix.config.train
    assert (data.seq_len, train.global_batch, train.batch_schedule) == (64, 16, ((48, 8),))
    assert data.weight_schedule == ((48, (("b", 2.0),)),) and data.sources["a"].weight == 3
    data, train = long.config.data, long.config.train
    assert (data.seq_len, train.global_batch, train.batch_schedule) == (128, 4, ())
    assert data.sources["a"].weight == 0 and data.sources["b"].weight == 2, "the mixture before goes on"
    assert data.weight_schedule == ((12, (("a", 1.0),)),)
    assert first.config.seed == 3 != long.config.seed, "another row length has another order"
    assert phases.last_config(config) == long.config and not long.config.phases
    assert [phases.count_samples(phases.split(config), step) for step in (1, 3, 4, 7, 8, 10, 12)] == [
        16, 48, 56, 80, 4, 12, 20,
    ]  # fmt: skip


def test_skipped_samples_move_the_samples_of_a_phase_not_its_steps():
    config = make_config(data__skip="((10, 20), (60, 64))", phases__long__skip="((0, 2),)")
    first, _, long, _ = phases.split(config)
    assert first.config.train.batch_schedule == ((58, 8),) and first.config.data.weight_schedule[0][0] == 58
    assert long.config.data.skip == ((0, 2),) and long.config.data.weight_schedule[0][0] == 14
    assert phases.count_samples(phases.split(config), 7) == 80


def test_the_learning_rate_goes_on_or_starts_a_schedule_of_its_own():
    first, mix, long, end = phases.split(make_config())
    assert first.rates == mix.rates == long.rates, "phases without a rate go on with the schedule"
    assert (first.rates.first, first.rates.horizon) == (0, 10) and (end.rates.first, end.rates.horizon) == (10, 2)
    rates = [make_schedule(each.rates.optimizer, each.rates.horizon, each.rates.first) for each in (first, end)]
    # Linear: a warmup of 2 updates to 1e-2, then down to a tenth of it at update 10.
    np.testing.assert_allclose([rates[0](n) for n in (0, 2, 10)], [1e-2 / 3, 1e-2, 1e-3], rtol=1e-6)
    # From update 10 without warmup; updates that were skipped before it do not lead out of the schedule.
    np.testing.assert_allclose([rates[1](n) for n in (8, 10, 11, 12)], [1e-3, 1e-3, 5.5e-4, 1e-4], rtol=1e-6)
    warmed = phases.split(make_config(phases__end__warmup_steps=1))[-1].rates
    assert make_schedule(warmed.optimizer, warmed.horizon, warmed.first)(10) == pytest.approx(5e-4)


def test_a_run_without_phases_is_one():
    config = apply_overrides({**TREE}, [])
    (phase,) = phases.split(config)
    assert (phase.first, phase.last, phase.rows, phase.batch) == (0, 12, 0, 16)
    assert phase.config is config is phases.last_config(config) is phases.largest_config(config)


def test_the_largest_phase_has_the_most_tokens_in_a_step():
    assert phases.largest_config(make_config()).data.seq_len == 64
    assert phases.largest_config(make_config(phases__long__global_batch=16)).data.seq_len == 128


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(phases__mix__after_step=12), r"phases.mix.after_step=12: must be from 1 to 11, below train.steps=12"),
        (dict(phases__mix__after_step=7), r"phases.mix.after_step=7: phases.long begins there, too; merge them"),
        (dict(phases__first__after_step=1), r"phases.first: this is the name of the phase before all others"),
        (dict(phases__mix__global_batch=0), r"phases.mix.global_batch=0: must be from 1 to 16777216"),
        (dict(phases__mix__global_batch=1 << 40), r"phases.mix.global_batch=1099511627776: must be from 1 to"),
        (dict(phases__long__seq_len=1 << 40), r"phases.long.seq_len=1099511627776: must be from 1 to 16777216"),
        (dict(phases__long__target_len=8), r"phases.long: objective.target_len=8: objective.name='causal' does not"),
        (dict(phases__long__skip="((2, 0),)"), r"phases.long: data.skip entry \(2, 0\): from must be 0 or more"),
        (dict(train__accumulation=8), r"phases.long.global_batch=4 is not divisible by train.accumulation=8"),
        (dict(phases__mix__weights__c=1), r"phases.mix.weights.c: unknown source"),
        (dict(phases__mix__weights__b=-1), r"phases.mix.weights.b=-1.0: must be 0 or more"),
        (dict(phases__mix__weights__b=0), r"phases.mix.weights: all are 0"),
        (dict(phases__mix__skip="((0, 2),)"), r"phases.mix.skip=\(\(0, 2\),\): its sample indices go on"),
        (dict(phases__end__schedule="linaer"), r"phases.end: optimizer.schedule='linaer' \(did you mean 'linear'"),
        (dict(train__epochs=2), r"train.epochs=2.0: phases begin after given steps; unset it"),
        (dict(train__batch_schedule="((8, 4),)"), r"train.batch_schedule=\(\(8, 4\),\): phases begin after"),
        (dict(data__weight_schedule='((8, (("a", 1),)),)'), r"data.weight_schedule=.*: phases begin after"),
    ],
)  # fmt: skip
def test_a_phase_that_does_not_fit_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        phases.split(make_config(**fields))


def test_a_schedule_that_does_not_fit_names_its_phase():
    with pytest.raises(UserError, match=r"phases.end: optimizer.warmup_steps=2: must be below the 2 steps"):
        phases.check_rates(make_config(phases__end__warmup_steps=2))
    with pytest.raises(UserError, match=r"^optimizer.warmup_steps=10: must be below the 10 steps"):
        phases.check_rates(make_config(optimizer__warmup_steps=10))


def test_rows_of_records_keep_their_length():
    config = make_config()
    sources = {name: dataclasses.replace(source, label_field="label") for name, source in config.data.sources.items()}
    labelled = dataclasses.replace(
        config,
        objective=dataclasses.replace(config.objective, name="classify"),
        data=dataclasses.replace(config.data, classes=("no", "yes"), sources=sources),
    )
    with pytest.raises(UserError, match=r"phases.long.seq_len=128: objective.name='classify' reads records"):
        phases.split(labelled)
