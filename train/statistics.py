"""How sure a figure is, and a difference: bootstrap intervals and paired tests over a skill's examples.

Both need an example's parts alone, see `train/text_metrics.py`: N examples, M measurements of each (a task's
templates), K parts. A figure is the mean over M of the value of the sums over N. Draws are seeded: the same parts, the
same answer.

Reference:
  Efron and Tibshirani, "An introduction to the bootstrap" (1993), chapters 13 (percentile interval) and 15
  (permutation test); Koehn, "Statistical significance tests for machine translation evaluation" (2004).
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

Value = Callable[[np.ndarray], np.ndarray]
DRAWS = 2000  # an interval's ends are then good to about a twentieth of its width
SURE = 0.95  # of intervals; a difference whose p-value is below 1 - SURE is called one
FEW = 10  # where fewer examples than this vary, a bootstrap of them is too narrow
_SEED = 20260101
_BLOCK = 4_000_000  # numbers held at a time


def figure(parts_MNK: np.ndarray, value: Value) -> float:
  """Returns the value of all examples, the mean over measurements.

  Args:
    parts_MNK: float64.
    value: sums [...,K] -> [...].
  """
  return float(value(parts_MNK.sum(axis=1)).mean())


def interval(parts_MNK: np.ndarray, value: Value) -> tuple[float, float] | None:
  """Returns the bootstrap's 95 % interval of a figure; None for fewer than two examples.

  Where all answers are right, the bootstrap knows nothing of what these examples do not show. The interval is the
  binomial one then (Clopper and Pearson, 1934): 0.929 to 1 for 50 right answers. Where all but a `FEW` examples are
  alike, the interval of a share reaches at least as far on both sides: one wrong answer must not make it narrower.

  Args:
    parts_MNK: float64.
    value: sums [...,K] -> [...].
  """
  count = parts_MNK.shape[1]
  if count < 2:
    return None
  low, high = _ends(_values(_draws(count, "bootstrap"), parts_MNK, value))
  _, alike = np.unique(parts_MNK.swapaxes(0, 1).reshape(count, -1), axis=0, return_counts=True)
  if low >= 0 and high <= 1 and (low == high or count - alike.max() < FEW):
    low, high = _wider((low, high), figure(parts_MNK, value), count)
    low, high = max(low, 0.0), min(high, 1.0)
  return low, high


def compare(before_MNK: np.ndarray, after_MNK: np.ndarray, value: Value, bounded: bool = True) -> dict[str, Any] | None:
  """Compares two models on the same examples.

  Where only a `FEW` examples differ, or none as where both models are right everywhere, the interval is at least what
  examples that are not among these could make of it (see `interval`), if an example's value is between 0 and 1.

  Args:
    before_MNK: one model's parts, float64.
    after_MNK: the other's, example by example.
    value: sums [...,K] -> [...].
    bounded: whether it is.

  Returns:
    `low` and `high`, the paired bootstrap's 95 % interval of after minus before, and `p`, the two-sided p-value of the
    paired permutation test (each example's parts change places by a coin; how often the difference is then as large).
    None where the examples cannot be the same ones, or are fewer than two.
  """
  if before_MNK.shape != after_MNK.shape or before_MNK.shape[1] < 2:
    return None
  bootstrap, coins = (_draws(before_MNK.shape[1], kind) for kind in ("bootstrap", "coins"))
  low, high = _ends(_values(bootstrap, after_MNK, value) - _values(bootstrap, before_MNK, value))
  seen = figure(after_MNK, value) - figure(before_MNK, value)
  if bounded and (low == high or _differ(before_MNK, after_MNK) < FEW):
    low, high = _wider((low, high), seen, before_MNK.shape[1])
  # A coin that falls on 1 leaves an example as it is, and 0 swaps it: the two sums stay whole numbers of examples.
  swapped = _values(coins, after_MNK, value, before_MNK) - _values(coins, before_MNK, value, after_MNK)
  as_large = np.abs(swapped) >= abs(seen) - 1e-12
  return {"low": low, "high": high, "p": float((1 + as_large.sum()) / (1 + DRAWS))}


def margin(
  first_MNK: np.ndarray, second_MNK: np.ndarray, value: Value, share: float, bounded: bool = True
) -> tuple[float, float]:
  """Returns the paired bootstrap's 95 % interval of one model's figure less a share of another's.

  Args:
    first_MNK, second_MNK: the models' parts, float64, of the same two or more examples.
    value: sums [...,K] -> [...].
    share: of the second figure.
    bounded: see `compare`.
  """
  count = first_MNK.shape[1]
  draws = _draws(count, "bootstrap")
  low, high = _ends(_values(draws, first_MNK, value) - share * _values(draws, second_MNK, value))
  if bounded and (low == high or _differ(first_MNK, second_MNK) < FEW):
    low, high = _wider((low, high), figure(first_MNK, value) - share * figure(second_MNK, value), count)
  return low, high


def judge(change: dict[str, Any], before: float, better: int, margin: float) -> str:
  """Says what a difference is.

  Args:
    change: from `compare`.
    before: the figure that it is a difference to.
    better: 1 where more is better, -1 where less is.
    margin: a relative change no larger than this does not matter.

  Returns:
    "kept" where the whole interval lies within the margin; else "gained" or "forgotten" where both the interval and the
    test exclude that there is no difference; else "cannot tell".
  """
  low, high = change["low"], change["high"]
  if max(abs(low), abs(high)) <= margin * abs(before):
    return "kept"
  if change["p"] < 1 - SURE and low * high > 0:
    return "gained" if better * low > 0 else "forgotten"
  return "cannot tell"


@functools.lru_cache(maxsize=8)
def _draws(count: int, kind: str) -> np.ndarray:
  """Returns uint8 [DRAWS,N]: how often each draw takes each example, of N with replacement, or by a coin's fall."""
  rng = np.random.default_rng((_SEED, count))
  if kind == "coins":
    return rng.integers(2, size=(DRAWS, count), dtype=np.uint8)
  taken = (np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(DRAWS))
  return np.stack([one.astype(np.uint8) for one in taken])  # no example comes 256 times in a draw


def _values(
  draws_RN: np.ndarray, parts_MNK: np.ndarray, value: Value, else_MNK: np.ndarray | None = None
) -> np.ndarray:
  """Returns the figure of each draw, [R]; with `else_MNK`, an example's parts come from there where its draw is 0."""
  rest_MK = 0.0 if else_MNK is None else else_MNK.sum(axis=1)
  weighed_MNK = parts_MNK if else_MNK is None else parts_MNK - else_MNK
  rows = max(1, _BLOCK // draws_RN.shape[1])
  blocks = (draws_RN[start : start + rows].astype(np.float64) for start in range(0, len(draws_RN), rows))
  # Not one einsum: a matrix product for each measurement runs in BLAS.
  sums = np.concatenate([np.stack([block @ one for one in weighed_MNK], axis=1) for block in blocks])
  return value(sums + rest_MK).mean(axis=-1)


def _differ(first_MNK: np.ndarray, second_MNK: np.ndarray) -> int:
  """Counts the examples that two models have other parts of."""
  return int((first_MNK != second_MNK).any(axis=(0, 2)).sum())


def _wider(ends: tuple[float, float], seen: float, count: int) -> tuple[float, float]:
  """Returns an interval that reaches at least as far from `seen` as examples that were not drawn can move it."""
  return min(ends[0], seen - _unseen(count)), max(ends[1], seen + _unseen(count))


def _unseen(count: int) -> float:
  """Returns the share of all examples that so many, drawn from them, may all have missed (with probability 2.5 %)."""
  return 1 - ((1 - SURE) / 2) ** (1 / count)


def _ends(values: np.ndarray) -> tuple[float, float]:
  low, high = np.quantile(values, ((1 - SURE) / 2, (1 + SURE) / 2))
  return float(low), float(high)
