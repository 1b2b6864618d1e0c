"""Learning rates: every schedule by hand, never 0, from 1 step to many; the optimizer's settings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from trainer.config import TrainConfig
from trainer.optimizing import make_optimizer, rate_share

SCHEDULES = ["cosine", "linear", "constant", "wsd", "inverse_sqrt"]


def config(**options: Any) -> TrainConfig:
    return TrainConfig(model="M", data=("D",), rule="sft", **options)


def shares(planned: int, **options: Any) -> list[float]:
    share = rate_share(config(**options), planned)
    return [share(step) for step in range(planned)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("planned", [1, 2, 3, 10, 101])
@pytest.mark.parametrize("more", [{}, {"warmup": 0.0}, {"warmup_steps": 5}, {"warmup_steps": 500}])
def test_no_step_has_rate_0_or_more_than_the_highest(schedule: str, planned: int, more: dict[str, Any]):
    found = shares(planned, schedule=schedule, **more)
    assert all(0 < share <= 1 for share in found)
    if planned == 101 and more.get("warmup_steps") != 500:
        assert max(found) == 1


def test_wsd_stays_and_falls_at_the_end():
    found = shares(10, schedule="wsd", warmup_steps=2, decay=0.4)
    assert found == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5])
    assert shares(10, schedule="wsd", warmup=0)[-3:] == pytest.approx([1, 2 / 3, 1 / 3]), "a fifth by default"


def test_inverse_sqrt_goes_on_from_the_warm_up():
    found = shares(9, schedule="inverse_sqrt", warmup_steps=3)
    assert found[:4] == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1])
    assert found[4:] == pytest.approx([math.sqrt(4 / (step + 1)) for step in range(4, 9)])


def test_the_least_rate_is_where_a_schedule_arrives():
    bare = shares(20, schedule="cosine", warmup_steps=0)
    found = shares(20, schedule="cosine", warmup_steps=0, min_rate=0.1)
    assert found == pytest.approx([0.1 + 0.9 * share for share in bare])
    assert found[0] == 1
    assert 0.1 < found[-1] < 0.11
    rising = shares(20, schedule="linear", warmup_steps=4, min_rate=0.5)
    assert rising[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1]), "the rise begins at 0 all the same"


def test_a_number_of_warm_up_steps_is_a_share():
    assert shares(50, warmup_steps=10) == shares(50, warmup=0.2)
    assert shares(50) == shares(50, warmup=0.03) == shares(50, warmup_steps=2)


def test_adamw_gets_its_settings():
    model = torch.nn.Linear(2, 2)
    made = make_optimizer(model, config(beta1=0.8, beta2=0.999, epsilon=1e-6, weight_decay=0.1))
    assert [group["weight_decay"] for group in made.param_groups] == [0.1, 0.0]
    assert all(group["betas"] == (0.8, 0.999) and group["eps"] == 1e-6 for group in made.param_groups)
    assert make_optimizer(model, config()).param_groups[0]["betas"] == (0.9, 0.95)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": 0.1, "warmup_steps": 3}, "give one"),
        ({"decay": 0.1}, "--decay is for --schedule wsd, not cosine"),
        ({"schedule": "constant", "min_rate": 0.1}, "which does not fall"),
        ({"patience": 2}, "--patience needs --eval-steps"),
        ({"min_delta": 0.1}, "--min-delta needs --patience"),
        ({"project": "p"}, "--project needs --tracker"),
        ({"run_name": "p"}, "--run-name needs --tracker"),
        ({"show": 3}, "--show needs --dry-run"),
    ],
)
def test_what_would_be_ignored_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        config(**options)
