"""Metrics and baselines against figures worked out by hand."""

import pytest

from train.baselines import majority, nearest_neighbour
from train.metrics import classification_metrics, generation_metrics


def test_classification_by_hand():
  metrics = classification_metrics(["a", "a", "b", "a"], ["a", "b", "b", "a"], ["a", "b", "never"])
  assert metrics["accuracy"] == 0.75 and metrics["n"] == 4
  # a: precision 2/3, recall 1 -> 0.8; b: precision 1, recall 1/2 -> 2/3
  assert metrics["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
  assert metrics["confusion"] == [[2, 0, 0], [1, 1, 0], [0, 0, 0]]


def test_generation_by_hand():
  metrics = generation_metrics(["take two pills", "rest"], ["take two red pills", "rest"])
  # first: 3 of 3 words right, 3 of 4 found -> 6/7; one bigram of 2 right, of 3 found -> 0.4
  assert metrics["rouge1"] == pytest.approx((6 / 7 + 1) / 2)
  assert metrics["rougeL"] == pytest.approx((6 / 7 + 1) / 2)
  assert metrics["rouge2"] == pytest.approx(0.4 / 2)
  assert metrics["exact_match"] == 0.5


@pytest.mark.parametrize("measure", [lambda p, t: classification_metrics(p, t, ["a", "b"]), generation_metrics])
@pytest.mark.parametrize(("predictions", "targets"), [([], []), (["a"], ["a", "b"])])
def test_unequal_or_no_examples_are_an_error(measure, predictions, targets):
  with pytest.raises(ValueError, match="one prediction for each target"):
    measure(predictions, targets)


def test_baselines_by_hand():
  train = [{"input": "red apple", "target": "fruit"}, {"input": "green pea", "target": "plant"}]
  train.append({"input": "yellow pear", "target": "fruit"})
  test = [{"input": "a green leaf"}, {"input": "yellow pear tree"}]
  assert majority(train, test) == ["fruit", "fruit"]
  assert nearest_neighbour(train, test) == ["plant", "fruit"]
