"""Labels' scores, probabilities that mean what they say, and when to abstain.

A label's score is made from log-probabilities of its text; a softmax at a temperature makes scores probabilities. The
temperature and the threshold of confidence below which a model abstains are fitted on the validation split, and stored
with the model. n counts rows, C is labels; confidence is the largest probability of a row.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from train.metrics import indicators
from train.statistics import SURE

if TYPE_CHECKING:
  from data.tasks import Task

BINS = 10  # of equal width, of confidence
CURVE_POINTS = 60  # most points of a coverage curve that are kept
_TEMPERATURES = (0.01, 100.0)  # searched, by their logarithm

# name -> (sums of log-probabilities [n,C], tokens of the labels [C], the labels' sums without an input [C]) -> [n,C]
LABEL_SCORES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
  "sum": lambda sums, tokens, prior: sums,  # the probability of the whole label
  "mean": lambda sums, tokens, prior: sums / tokens,  # … a token: long labels are not punished
  "pmi": lambda sums, tokens, prior: sums - prior,  # what the input adds: labels likely anyway gain nothing
}
"""Reference: Holtzman et al., "Surface form competition" (2021), section 2: average log-likelihood, domain PMI."""


class Calibration(NamedTuple):
  """How a task's scores become probabilities.

  Attributes:
    label_score: a name in `LABEL_SCORES`.
    temperature: divides the scores before the softmax.
    rows: validation rows, by templates, that it was fitted on; 0 = it was not fitted.
    note: why it was not fitted, or why there is no threshold though one is asked for; else "".
    target_accuracy: asked of the rows that are answered; 0 = the model never abstains.
    threshold: the model abstains below this confidence; None = never.
  """

  label_score: str
  temperature: float = 1.0
  rows: int = 0
  note: str = ""
  target_accuracy: float = 0.0
  threshold: float | None = None

  def probabilities(self, scores: np.ndarray) -> np.ndarray:
    """Returns float64 [n,C] from scores of the same shape."""
    return softmax(scores / self.temperature)


class LabelSets(NamedTuple):
  """How a task's labels are chosen.

  Attributes:
    sets: the sets that are scored, as answers.
    thresholds: label -> the probability from which on it is chosen.
    temperature: divides the sets' log-probabilities.
    rows: validation rows, by templates, that thresholds and temperature were fitted on; 0 = they were not.
    note: why they were not; else "".
  """

  sets: Sequence[str]
  thresholds: Mapping[str, float]
  temperature: float = 1.0
  rows: int = 0
  note: str = ""

  def probabilities(self, scores: np.ndarray) -> np.ndarray:
    """Returns the labels' probabilities, float64 [n,L], from the sets' log-probabilities [n,C]."""
    return softmax(scores / self.temperature) @ indicators(self.sets, list(self.thresholds))

  def choose(self, probabilities: np.ndarray) -> list[list[str]]:
    """Returns the labels that are chosen by probabilities, float64 [n,L]."""
    thresholds = self.thresholds.items()
    return [[label for (label, least), p in zip(thresholds, row, strict=True) if p >= least] for row in probabilities]


def unfitted(task: "Task", split: str) -> str:
  """Returns why nothing can be fitted where `split` is measured, "" where the task's validation split is for that."""
  if split == "validation":
    return "measured on the validation split itself: nothing was fitted"
  return "" if "validation" in task.files else "the task has no validation split: nothing was fitted"


def softmax(scores: np.ndarray) -> np.ndarray:
  """Returns the softmax over the last dim, safe for large scores."""
  odds = np.exp(scores - scores.max(axis=-1, keepdims=True))
  return odds / odds.sum(axis=-1, keepdims=True)


def nll(scores: np.ndarray, targets: np.ndarray, temperature: float) -> float:
  """Returns the mean negative log-probability of the right labels, in nats.

  Args:
    scores: float64 [n,C].
    targets: int [n], the right labels' numbers.
    temperature: divides the scores.
  """
  scaled = scores / temperature
  top = scaled.max(axis=1)
  log_z = top + np.log(np.exp(scaled - top[:, None]).sum(axis=1))
  return float((log_z - scaled[np.arange(len(targets)), targets]).mean())


def fit(scores: np.ndarray, targets: np.ndarray, label_score: str, target_accuracy: float) -> Calibration:
  """Fits temperature and threshold to validation rows.

  Args:
    scores: float64 [n,C] of the kind `label_score`.
    targets: int [n], the right labels' numbers.
    label_score: a name in `LABEL_SCORES`.
    target_accuracy: 0 to 1, asked of the rows that are answered, see `choose_threshold`; 0 = no threshold.

  Returns:
    The calibration. Where every row is right any smaller temperature would be likelier yet: it stays 1, with a note.

  Reference:
    Guo et al., "On calibration of modern neural networks" (2017), section 4.2.
  """
  right = scores.argmax(axis=1) == targets
  notes, temperature = [], 1.0
  if right.all():
    notes.append("every validation row is right: no temperature fits best")
  else:
    temperature = fit_temperature(scores, targets)
  found = Calibration(label_score, temperature, len(targets), target_accuracy=target_accuracy)
  if target_accuracy:
    confidence = found.probabilities(scores).max(axis=1)
    found = found._replace(threshold=choose_threshold(confidence, right, target_accuracy))
    if found.threshold is None:
      asked = f"an accuracy of {target_accuracy} by {len(targets):,} validation rows"
      notes.append(f"no threshold is sure to reach {asked}: the model never abstains")
  return found._replace(note="; ".join(notes))


def fit_temperature(scores: np.ndarray, targets: np.ndarray) -> float:
  """Returns the temperature of the least negative log-likelihood, which has one minimum: it is convex in 1/T.

  Args:
    scores: float64 [n,C].
    targets: int [n], the right labels' numbers.
  """
  from scipy.optimize import minimize_scalar

  bounds = tuple(np.log(_TEMPERATURES))
  found = minimize_scalar(lambda log_t: nll(scores, targets, np.exp(log_t)), bounds=bounds, method="bounded")
  return float(np.exp(found.x))


def choose_threshold(confidence: np.ndarray, right: np.ndarray, target_accuracy: float) -> float | None:
  """Returns the lowest confidence from which on the answers are surely as accurate as asked; None where there is none.

  "Surely" is the lower end of a one-sided 95 % interval (Clopper and Pearson, 1934) of the rows that would be answered:
  the few most confident rows are all right by luck more often than not. To be sure of 0.95 takes 59 rows without an
  error, or 93 with one. Where all answers together are so accurate, the threshold is 0: there is no need to abstain.

  Args:
    confidence: float64 [n].
    right: bool [n].
    target_accuracy: 0 to 1.

  Reference:
    Geifman and El-Yaniv, "Selective classification for deep neural networks" (2017), section 3: guaranteed risk.
  """
  from scipy.stats import beta

  thresholds, share, accuracy = coverage(confidence, right)
  answered = np.rint(share * len(right))
  correct = np.rint(accuracy * answered)
  sure = np.where(correct > 0, beta.ppf(1 - SURE, np.maximum(correct, 1), answered - correct + 1), 0.0)
  if sure[-1] >= target_accuracy:
    return 0.0
  enough = thresholds[sure >= target_accuracy]
  return float(enough.min()) if len(enough) else None


def coverage(confidence: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns what answering from each confidence on would give, the highest first; equal confidences go together.

  Args:
    confidence: float64 [n].
    right: bool [n].

  Returns:
    Thresholds, the share of rows that are answered, and the share of those that are right; each float64 [points].

  Reference:
    El-Yaniv and Wiener, "On the foundations of noise-free selective classification" (2010): the risk-coverage curve.
  """
  order = np.argsort(-confidence, kind="stable")
  ordered = confidence[order]
  answered = np.arange(1, len(order) + 1)
  accuracy = np.cumsum(right[order]) / answered
  last = np.append(ordered[:-1] != ordered[1:], True)
  return ordered[last], answered[last] / len(order), accuracy[last]


def reliability(confidence: np.ndarray, right: np.ndarray) -> tuple[float, list[list[float]]]:
  """Compares confidence with accuracy, bin by bin.

  Args:
    confidence: float64 [n].
    right: bool [n].

  Returns:
    The expected calibration error: the difference of both, weighted by rows, over `BINS` bins of equal width, each with
    its upper edge; and for each bin that has rows [rows, mean confidence, accuracy].

  Reference:
    Guo et al. (2017), section 2, equation 3.

  Example:
    >>> reliability(np.array([0.95, 0.95, 0.55]), np.array([True, False, True]))[1]
    [[1, 0.55, 1.0], [2, 0.95, 0.5]]
  """
  number = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
  rows = [
    [int(here.sum()), float(confidence[here].mean()), float(right[here].mean())]
    for here in (number == one for one in range(BINS))
    if here.any()
  ]
  return sum(count * abs(sure - accuracy) for count, sure, accuracy in rows) / len(confidence), rows


def measure(calibration: Calibration, scores: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
  """Measures probabilities on test rows.

  Args:
    calibration: of the scores' kind.
    scores: float64 [n,C].
    targets: int [n], the right labels' numbers.

  Returns:
    The calibration's fields; `ece` and `nll` (nats) and `reliability` (see there), each with "before" (temperature 1)
    and "after"; `curve`: [threshold, coverage, accuracy] points; with a threshold `coverage` and `accuracy` of the rows
    that are answered (accuracy None where none is).
  """
  right = scores.argmax(axis=1) == targets
  result: dict[str, Any] = {**calibration._asdict(), "ece": {}, "nll": {}, "reliability": {}}
  for name, temperature in (("before", 1.0), ("after", calibration.temperature)):
    confidence = softmax(scores / temperature).max(axis=1)
    result["ece"][name], result["reliability"][name] = reliability(confidence, right)
    result["nll"][name] = nll(scores, targets, temperature)
  curve = np.stack(coverage(confidence, right), axis=1)
  kept = np.unique(np.linspace(0, len(curve) - 1, min(len(curve), CURVE_POINTS)).astype(int))
  result["curve"] = curve[kept].tolist()
  if calibration.threshold is not None:
    answered = confidence >= calibration.threshold
    result["coverage"] = float(answered.mean())
    result["accuracy"] = float(right[answered].mean()) if answered.any() else None
  return result


def read(path: Path) -> dict[str, Calibration | LabelSets]:
  """Reads the calibrations of a model's tasks; {} where there is no such file: it was trained and not evaluated.

  Args:
    path: JSON, task -> `Calibration._asdict()`, or of a task with several labels a text `LabelSets._asdict()`.

  Raises:
    ValueError: the file is of another form.
  """
  if not path.exists():
    return {}
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
    return {name: (LabelSets if "sets" in fields else Calibration)(**fields) for name, fields in found.items()}
  except (json.JSONDecodeError, TypeError, AttributeError) as error:
    fix = "delete it, and evaluation.json beside it, and run the recipe again"
    raise ValueError(f"{path}: expected task -> {list(Calibration._fields)}, got {error}; {fix}") from error
