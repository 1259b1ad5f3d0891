"""Schedules at their corners, against published formulas and optax's own."""

import math

import numpy as np
import optax
import pytest

from train import schedules
from train.schedules import Course

COURSE = Course(0.5, 10, 100, 0.1)


def rates(name: str, course: Course, steps) -> list[float]:
  schedule = schedules.build(name, course)
  return [float(schedule(step)) for step in steps]


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("cosine", [0, 0.25, 0.5, 0.05 + 0.45 * (1 + math.cos(math.pi / 2)) / 2, 0.05]),
    ("linear", [0, 0.25, 0.5, 0.275, 0.05]),
    ("constant", [0, 0.25, 0.5, 0.5, 0.5]),
    ("rsqrt", [0.5, 0.5, 0.5, 0.5 * (10 / 55) ** 0.5, 0.5 * 0.1**0.5]),
    ("wsd", [0, 0.25, 0.5, 0.5, 0.05]),
  ],
)
def test_corners(name, expected):
  course = COURSE._replace(decay_steps=20 if name == "wsd" else 0)
  assert rates(name, course, (0, 5, 10, 55, 100)) == pytest.approx(expected)


def test_they_are_what_optax_gives():
  steps = range(0, 120, 7)
  ours, theirs = rates("cosine", COURSE, steps), optax.warmup_cosine_decay_schedule(0, 0.5, 10, 100, 0.05)
  assert ours == [float(theirs(step)) for step in steps]
  ours = rates("linear", COURSE._replace(warmup=0, final_fraction=0.0), steps)
  assert ours == pytest.approx([float(optax.linear_schedule(0.5, 0.0, 100)(step)) for step in steps])


def test_wsd_is_flat_until_its_decay_and_does_not_depend_on_the_steps_before_it():
  long, short = COURSE._replace(decay_steps=20, steps=200), COURSE._replace(decay_steps=20)
  assert rates("wsd", long, range(81)) == rates("wsd", short, range(81))
  assert rates("wsd", short, (80, 85, 90)) == pytest.approx([0.5, 0.3875, 0.275])


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "wsd"])
def test_rewarming_goes_from_where_the_earlier_run_ended_up_and_down_again(name):
  course = COURSE._replace(initial_fraction=0.1, decay_steps=30 if name == "wsd" else 0)
  curve = np.array(rates(name, course, range(101)))
  assert curve[0] == pytest.approx(0.05) and curve[10] == pytest.approx(0.5) == curve.max()
  assert (np.diff(curve[:11]) > 0).all() and (np.diff(curve[10:]) <= 1e-7).all()
  assert curve[100] == pytest.approx(0.5 if name == "constant" else 0.05)


@pytest.mark.parametrize(
  ("name", "different", "message"),
  [
    ("rsqrt", {"initial_fraction": 0.1}, "begins at its peak"),
    ("cosine", {"decay_steps": 5}, "is for the schedule 'wsd'"),
    ("wsd", {}, "needs 1 or more"),
    ("wsd", {"decay_steps": 91}, "no more than config.train.steps 100 less warmup_steps 10"),
    ("step", {}, "known: .*rsqrt"),
  ],
)
def test_settings_without_an_effect_are_refused(name, different, message):
  with pytest.raises(ValueError, match=message):
    schedules.build(name, COURSE._replace(**different))
