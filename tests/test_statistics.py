"""Intervals cover, paired tests see a planted difference and not one that is none, verdicts follow."""

import numpy as np
import pytest
import scipy.stats

from train.metrics import VALUES, generation_metrics, perplexity_of
from train.statistics import compare, figure, interval, judge, margin
from train.text_metrics import ratio


def parts_of(scores: np.ndarray) -> np.ndarray:
  """One measurement of examples whose value is their mean."""
  return np.stack([scores, np.ones_like(scores)], axis=1)[None].astype(np.float64)


def test_the_interval_is_that_of_the_normal_approximation():
  low, high = interval(parts_of(np.arange(400) < 300), ratio)  # 0.75 ± 1.96 sqrt(0.75 * 0.25 / 400)
  assert low == pytest.approx(0.75 - 0.0424, abs=0.004) and high == pytest.approx(0.75 + 0.0424, abs=0.004)
  assert interval(parts_of(np.ones(1)), ratio) is None


@pytest.mark.parametrize("count", [2, 50, 400])
def test_rows_that_are_all_right_or_all_wrong_are_not_sure_of_rows_unseen(count):
  both = parts_of(np.ones(count)), parts_of(np.zeros(count))
  (low, one), (nought, high) = (interval(parts, ratio) for parts in both)
  assert (low, one) == pytest.approx(scipy.stats.binomtest(count, count).proportion_ci(), rel=1e-9)
  assert (nought, high) == pytest.approx(scipy.stats.binomtest(0, count).proportion_ci(), rel=1e-9)
  unseen = 1 - 0.025 ** (1 / count)
  assert interval(parts_of(np.full(count, 0.5)), ratio) == pytest.approx((max(0, 0.5 - unseen), min(1, 0.5 + unseen)))


@pytest.mark.parametrize("count", [10, 50, 170, 400])
def test_a_wrong_answer_makes_no_interval_narrower_and_no_model_surer(count):
  perfect = parts_of(np.ones(count))
  lows, changes, margins = [], [], []
  for wrong in range(min(count, 15)):
    parts = parts_of(np.arange(count) >= wrong)
    lows.append(interval(parts, ratio)[0])
    changes.append(compare(perfect, parts, ratio)["low"])
    margins.append(margin(parts, perfect, ratio, 0.98)[0])
  for ends in (lows, changes, margins):
    assert ends == sorted(ends, reverse=True)
  low, high = interval(perfect, lambda sums: sums[..., 0] / count + 2)
  assert low == high == 3.0  # no share, so nothing says how far unseen rows could move it


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
  rng = np.random.default_rng(0)
  covered = 0
  for _ in range(200):
    low, high = interval(parts_of(rng.random(150) < 0.8), ratio)
    covered += low <= 0.8 <= high
  assert 180 <= covered <= 199  # of 200: 190 are expected, give or take 3


def test_the_same_parts_give_the_same_answer():
  rng = np.random.default_rng(1)
  parts, other = (parts_of(rng.random(60)) for _ in range(2))
  assert interval(parts, ratio) == interval(parts.copy(), ratio)
  assert compare(parts, other, ratio) == compare(parts.copy(), other.copy(), ratio)


@pytest.mark.parametrize("name", ["bleu", "chrf", "rougeL", "length_ratio"])
def test_every_metric_has_an_interval_around_its_value(name):
  rng = np.random.default_rng(2)
  words = np.array("take two red pills at night and rest well".split())
  targets = [" ".join(rng.choice(words, 8)) for _ in range(50)]
  outputs = [target if i % 2 else " ".join(rng.choice(words, 6)) for i, target in enumerate(targets)]
  found, parts = generation_metrics(outputs, targets, targets, [name] if name != "length_ratio" else ["bleu", name])
  value = VALUES[name]
  if name == "length_ratio":
    parts = np.array([[len(o.split()), len(t.split())] for o, t in zip(outputs, targets, strict=True)], float)
  low, high = interval(parts[None], value)
  assert low < found[name] < high and figure(parts[None], value) == pytest.approx(found[name])


def test_a_planted_difference_is_seen_and_pairs_make_it_surer():
  rng = np.random.default_rng(3)
  hard = rng.random(250)  # some rows are harder for both
  before, after = parts_of(hard < 0.60), parts_of(hard < 0.66)  # a superset of the right rows: 15 more, none less
  found = compare(before, after, ratio)
  assert found["low"] > 0 and found["p"] < 0.005
  shuffled = parts_of(rng.permutation(after[0, :, 0]))
  assert compare(before, shuffled, ratio)["p"] > 0.05  # the same two accuracies, not paired any more


def test_the_p_value_is_the_sign_tests():
  # 8 rows better, 1 worse, of 100: two-sided, 2 * (1 + 9) / 2^9 = 0.0391
  before, after = np.zeros(100), np.zeros(100)
  before[0], after[1:9] = 1, 1
  assert compare(parts_of(before), parts_of(after), ratio)["p"] == pytest.approx(0.0391, abs=0.01)


def test_no_difference_is_rarely_seen():
  rng = np.random.default_rng(4)
  seen = 0
  for _ in range(200):
    easy = rng.random(120)
    before, after = (parts_of(rng.random(120) < easy) for _ in range(2))
    seen += judge(compare(before, after, ratio), figure(before, ratio), 1, 0.02) in ("gained", "forgotten")
  assert seen <= 20  # 5 % of 200 are expected by chance: 10, give or take 3


def test_swapping_the_models_turns_the_sign_alone():
  rng = np.random.default_rng(5)
  before, after = parts_of(rng.random(80)), parts_of(rng.random(80) + 0.1)
  there, back = compare(before, after, ratio), compare(after, before, ratio)
  assert there["low"] == pytest.approx(-back["high"]) and there["p"] == pytest.approx(back["p"])


def test_perplexity_is_compared_by_rows_of_different_weight():
  rng = np.random.default_rng(6)
  tokens = rng.integers(20, 60, 80).astype(float)
  before = np.stack([tokens * rng.normal(3.0, 0.1, 80), tokens], axis=1)[None]
  after = before * np.array([0.97, 1.0])
  found = compare(before, after, perplexity_of)
  assert figure(before, perplexity_of) == pytest.approx(np.exp(before[0, :, 0].sum() / tokens.sum()))
  assert found["high"] < 0 and found["p"] < 0.005


def test_templates_are_averaged_and_drawn_together():
  rng = np.random.default_rng(7)
  first = rng.random(90)
  both = np.concatenate([parts_of(first), parts_of(1 - first)])
  assert figure(both, ratio) == pytest.approx(0.5)
  low, high = interval(both, ratio)  # what one template gains in a draw the other loses
  assert high - low < 1e-9


def test_examples_that_cannot_be_the_same_are_not_compared():
  assert compare(parts_of(np.ones(5)), parts_of(np.ones(6)), ratio) is None
  assert compare(parts_of(np.ones(1)), parts_of(np.ones(1)), ratio) is None


@pytest.mark.parametrize(
  ("low", "high", "p", "better", "expected"),
  [
    (0.05, 0.15, 0.001, 1, "gained"),
    (0.05, 0.15, 0.001, -1, "forgotten"),
    (-0.15, -0.05, 0.001, 1, "forgotten"),
    (-0.02, 0.15, 0.1, 1, "cannot tell"),
    (0.001, 0.15, 0.06, 1, "cannot tell"),  # the test does not exclude chance
    (-0.01, 0.012, 0.8, 1, "kept"),
    (0.002, 0.012, 0.001, 1, "kept"),  # sure, and too small to matter: 2 % of 0.8 is 0.016
  ],
)
def test_verdicts(low, high, p, better, expected):
  assert judge({"low": low, "high": high, "p": p}, 0.8, better, 0.02) == expected


@pytest.mark.parametrize("count", [3, 50, 400])
def test_rows_of_which_none_differs_are_not_sure_of_rows_unseen(count):
  right, unseen = parts_of(np.ones(count)), 1 - 0.025 ** (1 / count)
  found = compare(right, right, ratio)
  assert (found["low"], found["high"], found["p"]) == pytest.approx((-unseen, unseen, 1.0))
  assert judge(found, 1.0, 1, 0.02) == ("kept" if count == 400 else "cannot tell")
  assert margin(right, right, ratio, 0.9) == pytest.approx((0.1 - unseen, 0.1 + unseen))
  found = compare(right, right, ratio, bounded=False)  # a text's nats may be any number
  assert (found["low"], found["high"]) == (0.0, 0.0)
