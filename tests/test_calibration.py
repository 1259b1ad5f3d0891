"""Label scores, temperature, calibration error and abstaining, against planted and hand-made cases."""

import json

import numpy as np
import pytest

from data.tasks import Task
from train import calibration
from train.calibration import LABEL_SCORES, Calibration, choose_threshold, coverage, fit, nll, reliability, softmax
from train.serve import label


def planted(temperature: float, rows: int = 4000, labels: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Scores whose probabilities are right at the given temperature, and targets drawn from those."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(rows, labels)) * 2
  odds = softmax(logits)
  targets = (odds.cumsum(axis=1) < rng.random((rows, 1))).sum(axis=1)
  return logits * temperature, targets


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_a_known_temperature_is_found_again(temperature):
  scores, targets = planted(temperature)
  found = fit(scores, targets, "sum", 0.0)
  assert found.temperature == pytest.approx(temperature, rel=0.05)
  assert found.rows == 4000 and found.note == "" and found.threshold is None
  assert (
    nll(scores, targets, found.temperature) <= min(nll(scores, targets, t) for t in np.geomspace(0.05, 50, 200)) + 1e-6
  )
  measured = calibration.measure(found, *planted(temperature, seed=1))
  assert measured["ece"]["after"] < 0.03
  if temperature != 1.0:
    assert measured["ece"]["before"] > 0.08 and measured["nll"]["before"] > measured["nll"]["after"]


def test_temperature_changes_no_label():
  scores, targets = planted(4.0, rows=50)
  shares = fit(scores, targets, "sum", 0.0).probabilities(scores)
  assert (shares.argmax(axis=1) == scores.argmax(axis=1)).all() and shares.sum(axis=1) == pytest.approx(1)


def test_where_every_row_is_right_nothing_is_fitted():
  found = fit(np.array([[0.0, -1.0], [-1.0, 0.0]]), np.array([0, 1]), "sum", 0.0)
  assert found.temperature == 1.0 and "every validation row is right" in found.note and found.rows == 2


def test_nll_by_hand_and_without_overflow():
  assert nll(np.log([[0.2, 0.8]]), np.array([0]), 1.0) == pytest.approx(-np.log(0.2))
  # at temperature 1/2 odds are squared: 0.04 of 0.68
  assert nll(np.log([[0.2, 0.8]]), np.array([0]), 0.5) == pytest.approx(-np.log(0.04 / 0.68))
  assert nll(np.array([[-1e4, 0.0]]), np.array([0]), 0.01) == pytest.approx(1e6)


def test_calibration_error_by_hand():
  confidence = np.array([0.95, 0.91, 0.99, 0.92, 0.62, 0.68])
  right = np.array([True, True, True, False, True, False])
  # above 0.9: 4 rows, mean 0.9425, 0.75 right; 0.6 to 0.7: 2 rows, mean 0.65, 0.5 right
  error, rows = reliability(confidence, right)
  assert error == pytest.approx(4 / 6 * (0.9425 - 0.75) + 2 / 6 * (0.65 - 0.5))
  assert rows == [[2, pytest.approx(0.65), 0.5], [4, pytest.approx(0.9425), 0.75]]


def test_a_bin_has_its_upper_edge():
  assert [row[0] for row in reliability(np.array([0.1, 0.3, 1.0]), np.array([True] * 3))[1]] == [1, 1, 1]
  assert reliability(np.array([0.5, 0.41]), np.array([True, False]))[1] == [[2, pytest.approx(0.455), 0.5]]


def test_coverage_and_threshold_by_hand():
  confidence = np.array([0.6, 0.9, 0.7, 0.7, 0.8])
  right = np.array([False, True, False, True, True])
  thresholds, share, accuracy = coverage(confidence, right)
  assert thresholds.tolist() == [0.9, 0.8, 0.7, 0.6]  # equal ones cannot be told apart by a threshold
  assert share == pytest.approx([0.2, 0.4, 0.8, 1.0]) and accuracy == pytest.approx([1, 1, 0.75, 0.6])
  # 2 of 2 right are more than 0.05 ** (1 / 2) = 0.224 with 95 %, 1 of 1 more than 0.05, 3 of 4 more than 0.249
  for asked, expected in ((0.26, None), (0.24, 0.7), (0.15, 0.0)):
    assert choose_threshold(confidence, right, asked) == expected
  assert choose_threshold(confidence, np.zeros(5, bool), 0.01) is None


@pytest.mark.parametrize(("rows", "wrong", "expected"), [(58, 0, None), (59, 0, 0.0), (92, 1, None), (93, 1, 0.0)])
def test_a_threshold_takes_as_many_rows_as_make_it_sure(rows, wrong, expected):
  assert choose_threshold(np.full(rows, 0.8), np.arange(rows) >= wrong, 0.95) == expected


def test_an_accuracy_that_no_confidence_has_is_hardly_ever_found():
  rng, found = np.random.default_rng(0), 0
  for _ in range(200):  # confidences mean what they say and end at 0.9: above none is an accuracy of 0.95
    confidence = rng.uniform(0.6, 0.9, 300)
    found += choose_threshold(confidence, rng.random(300) < confidence, 0.95) is not None
  assert found <= 10


def test_a_model_that_abstains_is_as_accurate_as_asked():
  scores, targets = planted(3.0)
  found = fit(scores, targets, "sum", 0.9)
  measured = calibration.measure(found, *planted(3.0, seed=1))
  assert measured["accuracy"] == pytest.approx(0.9, abs=0.03) and 0.2 < measured["coverage"] < 0.9
  assert len(measured["curve"]) == calibration.CURVE_POINTS and measured["curve"][-1][1] == 1.0
  assert "coverage" not in calibration.measure(found._replace(threshold=None), scores, targets)


def test_an_accuracy_out_of_reach_is_said():
  found = fit(np.array([[0.0, -1.0]]), np.array([1]), "sum", 0.9)
  assert found.threshold is None and "no threshold is sure to reach an accuracy of 0.9" in found.note


def test_pmi_removes_a_planted_prior():
  rng = np.random.default_rng(0)
  targets = rng.integers(3, size=300)
  evidence = rng.normal(size=(300, 3))
  evidence[np.arange(300), targets] += 4.0
  prior = np.array([-1.0, -9.0, -5.0])  # the first label is likely whatever is read
  tokens = np.array([1, 1, 1])
  accuracy = {
    name: (score(evidence + prior, tokens, prior).argmax(axis=1) == targets).mean()
    for name, score in LABEL_SCORES.items()
  }
  assert accuracy["pmi"] > 0.98 and accuracy["sum"] < 0.7
  assert LABEL_SCORES["pmi"](evidence + prior, tokens, prior) == pytest.approx(evidence)


def test_the_mean_does_not_punish_a_long_label():
  sums, tokens = np.array([[-4.0, -3.0]]), np.array([4, 2])
  assert LABEL_SCORES["sum"](sums, tokens, sums[0]).argmax() == 1
  assert LABEL_SCORES["mean"](sums, tokens, sums[0]).tolist() == [[-1.0, -1.5]]


TASK = Task.from_dict("t", {"kind": "classification", "labels": ["yes", "no"]})


def test_an_answer_abstains_below_the_threshold_only():
  sure, unsure = np.log([0.9, 0.1]), np.log([0.55, 0.45])
  fitted = Calibration("sum", threshold=0.6)
  probabilities = pytest.approx({"yes": 0.9, "no": 0.1})
  assert label(TASK, sure, fitted) == {"label": "yes", "probabilities": probabilities, "abstain": False}
  assert label(TASK, unsure, fitted)["abstain"] is True
  assert "abstain" not in label(TASK, unsure, Calibration("sum"))
  # at temperature 1/2 the odds are squared: 81 to 1
  assert label(TASK, sure, Calibration("sum", temperature=0.5))["probabilities"]["yes"] == pytest.approx(81 / 82)


def test_stored_and_read_again(tmp_path):
  fitted = Calibration("pmi", 1.5, 20, "", 0.9, 0.75)
  path = tmp_path / "calibration.json"
  assert calibration.read(path) == {}
  path.write_text(json.dumps({"t": fitted._asdict()}))
  assert calibration.read(path) == {"t": fitted}
  path.write_text(json.dumps({"t": {"warmth": 1}}))
  with pytest.raises(ValueError, match=r"calibration.json: expected task -> \['label_score'.*warmth.*delete it"):
    calibration.read(path)
