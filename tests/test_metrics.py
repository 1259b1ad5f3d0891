"""Metrics against figures worked out by hand."""

import subprocess
import sys
from pathlib import Path

import pytest

from train.metrics import HEADLINES, METRICS, classification_metrics, generation_metrics


def test_classification_by_hand():
  metrics = classification_metrics(["a", "a", "b", "a"], ["a", "b", "b", "a"], ["a", "b", "never"])
  assert metrics["accuracy"] == 0.75 and metrics["n"] == 4
  # a: precision 2/3, recall 1 -> 0.8; b: precision 1, recall 1/2 -> 2/3
  assert metrics["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
  assert metrics["confusion"] == [[2, 0, 0], [1, 1, 0], [0, 0, 0]]


def test_macro_f1_counts_a_label_that_is_only_predicted():
  metrics = classification_metrics(["a", "b"], ["a", "a"], ["a", "b", "never"])
  assert metrics["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)


def test_confusion_follows_the_order_of_the_labels():
  metrics = classification_metrics(["z", "a"], ["z", "z"], ["z", "a"])
  assert metrics["confusion"] == [[1, 1], [0, 0]]


@pytest.mark.parametrize(("predictions", "targets", "role"), [(["x"], ["a"], "predictions"), (["a"], ["x"], "targets")])
def test_a_label_that_is_unknown_is_an_error_not_a_lost_row(predictions, targets, role):
  with pytest.raises(ValueError, match=rf"{role} among .*'x'"):
    classification_metrics(predictions, targets, ["a", "b"])


def test_generation_by_hand():
  metrics = generation_metrics(["take two pills", "rest"], ["take two red pills", "rest"])
  # first: 3 of 3 words right, 3 of 4 found -> 6/7; one bigram of 2 right, of 3 found -> 0.4; a lone word has no bigram
  assert metrics["rouge1"] == pytest.approx((6 / 7 + 1) / 2)
  assert metrics["rougeL"] == pytest.approx((6 / 7 + 1) / 2)
  assert metrics["rouge2"] == pytest.approx(0.4 / 2)
  assert metrics["exact_match"] == 0.5 and metrics["n"] == 2


def test_rouge_l_minds_the_order_and_rouge_does_not_stem():
  metrics = generation_metrics(["c b a"], ["a b c"])
  assert metrics["rouge1"] == 1 and metrics["rougeL"] == pytest.approx(1 / 3)
  assert generation_metrics(["walking"], ["walks"])["rouge1"] == 0


@pytest.mark.parametrize("measure", [lambda p, t: classification_metrics(p, t, ["a", "b"]), generation_metrics])
@pytest.mark.parametrize(("predictions", "targets"), [([], []), (["a"], ["a", "b"])])
def test_unequal_or_no_examples_are_an_error(measure, predictions, targets):
  with pytest.raises(ValueError, match="one prediction for each target"):
    measure(predictions, targets)


def test_every_kind_has_its_headline_among_its_metrics():
  assert HEADLINES["classification"] in METRICS["classification"](["a", "b"], ["a", "b"], ["a", "b"])
  assert HEADLINES["generation"] in METRICS["generation"](["a"], ["a"])


def test_metrics_baselines_and_report_load_neither_jax_nor_heavy_libraries():
  heavy = "{'jax', 'transformers', 'sklearn', 'rouge_score', 'matplotlib'}"
  code = f"import sys, train.metrics, train.baselines, train.report; print(sorted({heavy} & set(sys.modules)))"
  root = Path(__file__).resolve().parent.parent
  done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]"
