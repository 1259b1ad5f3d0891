"""Learning rates over a run, by name.

Each warms up linearly from `initial_fraction · peak` to `peak` (`rsqrt` apart). Continued pre-training of a model whose
schedule has ended re-warms and decays again (Ibrahim et al. 2024): any of these, with `initial_fraction` where the
earlier run ended, such as 0.1, so that the rate goes up from there to the new peak and down once more.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax


class Course(NamedTuple):
  """What a schedule is made from.

  Attributes:
    peak: the highest rate.
    warmup: steps up to it.
    steps: of the run.
    final_fraction: the last rate, as a share of the peak; `constant` and `rsqrt` have none.
    initial_fraction: the first rate, as a share of the peak; `rsqrt` has none.
    decay_steps: `wsd`: steps of the decay at the end.
  """

  peak: float
  warmup: int
  steps: int
  final_fraction: float = 0.0
  initial_fraction: float = 0.0
  decay_steps: int = 0


def constant(course: Course) -> optax.Schedule:
  """Warm-up, then constant."""
  return _then(course, optax.constant_schedule(course.peak))


def cosine(course: Course) -> optax.Schedule:
  """Warm-up, then half a cosine down to `final_fraction · peak` at `steps` (Loshchilov & Hutter 2017)."""
  last = max(course.steps, course.warmup + 1)
  first, final = course.peak * course.initial_fraction, course.peak * course.final_fraction
  return optax.warmup_cosine_decay_schedule(first, course.peak, course.warmup, last, final)


def linear(course: Course) -> optax.Schedule:
  """Warm-up, then a straight line down to `final_fraction · peak` at `steps`."""
  return _then(course, _down(course, max(course.steps - course.warmup, 1)))


def rsqrt(course: Course) -> optax.Schedule:
  """T5's: constant `peak` for `warmup` steps, then `peak · sqrt(warmup / step)`.

  Raises:
    ValueError: an initial fraction is asked for.
  """
  if course.initial_fraction:
    raise ValueError("config.optimizer.initial_fraction: 'rsqrt' begins at its peak; leave it at 0, or take another")
  warmup = max(course.warmup, 1)
  return lambda step: course.peak * jax.lax.rsqrt(jax.numpy.maximum(step, warmup) / warmup)


def wsd(course: Course) -> optax.Schedule:
  """Warm-up, stable, decay: constant, then a straight line to `final_fraction · peak` over the last `decay_steps`.

  Until the decay begins no rate depends on the number of steps.

  Raises:
    ValueError: no step decays, or the decay begins before the warm-up ends.

  Reference:
    Hu et al. 2024 (MiniCPM), §4; Hägele et al. 2024, which compares forms of the decay.
  """
  stable = course.steps - course.decay_steps
  if course.decay_steps < 1 or stable < course.warmup:
    raise ValueError(
      f"config.optimizer.decay_steps is {course.decay_steps}: 'wsd' needs 1 or more, and no more than "
      f"config.train.steps {course.steps} less warmup_steps {course.warmup}"
    )
  parts = [_then(course, optax.constant_schedule(course.peak)), _down(course, course.decay_steps)]
  return optax.join_schedules(parts, [stable])


SCHEDULES: dict[str, Callable[[Course], optax.Schedule]] = {
  "constant": constant,
  "cosine": cosine,
  "linear": linear,
  "rsqrt": rsqrt,
  "wsd": wsd,
}


def build(name: str, course: Course) -> optax.Schedule:
  """Builds a schedule.

  Raises:
    ValueError: an unknown name, or a setting that this schedule has no use for.
  """
  if name not in SCHEDULES:
    raise ValueError(f"config.optimizer.schedule is {name!r}; known: {sorted(SCHEDULES)}")
  if course.decay_steps and name != "wsd":
    raise ValueError(f"config.optimizer.decay_steps is for the schedule 'wsd', this is {name!r}; leave it at 0")
  return SCHEDULES[name](course)


def _then(course: Course, rest: optax.Schedule) -> optax.Schedule:
  up = optax.linear_schedule(course.peak * course.initial_fraction, course.peak, course.warmup)
  return optax.join_schedules([up, rest], [course.warmup])


def _down(course: Course, steps: int) -> optax.Schedule:
  return optax.linear_schedule(course.peak, course.peak * course.final_fraction, steps)
