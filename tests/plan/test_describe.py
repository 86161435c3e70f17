"""The cost of a run, and the advice where a step does not fit."""

import pytest

from llmjax.plan import describe, topology as topologies
from llmjax.run import config as run_config
from tests.plan.fake_plan import make_plan

V6E = topologies.parse("v6e:4x4")
FIELDS = (("model.vocab_size", "128256"), ("train.global_batch", "64"), ("mesh.data", "1"), ("mesh.fsdp", "16"))
CONFIG = run_config.resolve("llama:8B", (*FIELDS, ("model.remat", "attention")))


def test_the_cost_of_a_run():
    """A million tokens in 36 seconds: a billion are 1,000 steps, 10 hours, 160 chip-hours."""
    plan = make_plan(CONFIG, V6E, seconds=36.0, gib=20.0)
    cost = describe.cost_of_run(plan, 1e9, price=2.0)
    assert cost is not None
    assert (cost.steps, cost.days, cost.chip_hours, cost.money) == pytest.approx((1000, 10 / 24, 160, 320))
    assert 0 < cost.kwh[0] < cost.kwh[1] and 0 < cost.kg_co2[0] < cost.kg_co2[1]
    text = "\n".join(describe.describe_run(plan, 1e9, cost))
    assert "money: 320 at 2 a chip and hour" in text and "assuming" in text
    assert "MFU" in "\n".join(describe.describe(plan, "llama:8B"))


def test_the_costs_of_phases_add_up():
    plan = make_plan(CONFIG, V6E, seconds=36.0, gib=20.0)
    total, first, rest = (describe.cost_of_run(plan, tokens, price=2.0) for tokens in (1e9, 3e8, 7e8))
    added = describe.add_costs([first, rest])
    assert added is not None and total is not None
    assert (added.steps, added.days, added.chip_hours) == pytest.approx((total.steps, total.days, total.chip_hours))
    assert added.money == pytest.approx(320) and added.kwh == pytest.approx(total.kwh)
    assert added.kg_co2 == pytest.approx(total.kg_co2)
    assert describe.add_costs([first, None]) is None


def test_the_largest_batch_of_a_schedule_is_planned():
    config = run_config.with_fields(CONFIG, [("train.batch_schedule", ((4000, 128), (9000, 32)))])
    text = "\n".join(describe.describe(make_plan(config, V6E, seconds=36.0, gib=20.0), "llama:8B"))
    assert "128 rows, 1,000,000 tokens a step" in text
    assert "of the largest batch: train.batch_schedule has 64, 128 from sample 4,000, 32 from sample 9,000 rows" in text


def test_a_step_that_does_not_fit_is_a_result_with_advice():
    """4 rows of a device need 60 of 31.24 GiB: two microbatches of 2 rows, or another policy."""
    plan = make_plan(CONFIG, V6E, seconds=1.0, gib=60.0)
    text = "\n".join(describe.describe(plan, "llama:8B"))
    assert "DOES NOT FIT" in text and "28.8 GiB too much" in text
    assert "--config.model.remat=full" in text and "--config.train.accumulation=2 " in text
    assert plan.to_json()["fits"] is False and plan.to_json()["step_seconds"] is None
    assert describe.cost_of_run(plan, 1e9, None) is None
