"""The metrics of every kind of skill, and which of them is its headline; labels are measured by scikit-learn.

Every score is a share from 0 to 1 (not a percentage), but for `length_ratio` and perplexity; `n` counts examples.
Headlines are made from parts and their sums, see `train/text_metrics.py`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from data.label_sets import from_text
from train.text_metrics import GENERATION, Texts, means, ratio

if TYPE_CHECKING:
  from data.tasks import Task

Rows = Sequence[Mapping[str, str]]


def perplexity_of(sums: np.ndarray) -> np.ndarray:
  """Returns exp(nats by target tokens), from the sums of both."""
  return np.exp(np.minimum(ratio(sums), 700.0))


# How `config.evaluate` may have generated text written -> what it is where nothing is asked for; else it is stored
# beside the metrics.
DECODING = {"beams": 1, "length_penalty": 1.0, "repetition_penalty": 1.0, "candidates": 1, "temperature": 1.0}
# Headline -> its value, from sums of parts.
VALUES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
  "accuracy": ratio,
  "micro_f1": ratio,
  "perplexity": perplexity_of,
  **{name: metric.value for name, metric in GENERATION.items()},
}


def headline(kind: str, names: Sequence[str] = ()) -> str:
  """Returns the metric that is a skill's `value`.

  Args:
    kind: "classification", "multi_label", "generation" or "perplexity".
    names: a generation task's `metrics`.

  Raises:
    ValueError: see `chosen`.
  """
  fixed = {"classification": "accuracy", "multi_label": "micro_f1", "perplexity": "perplexity"}
  return fixed.get(kind) or chosen(names)[0]


def higher_is_better(name: str) -> bool:
  """Says whether more of a headline is better."""
  return name != "perplexity" and (name in ("accuracy", "micro_f1") or GENERATION[name].better > 0)


def chosen(names: Sequence[str]) -> tuple[str, ...]:
  """Returns the metrics of generated text that a task asks for, the headline first; all where it names none.

  Raises:
    ValueError: an unknown name, one that comes twice, or a headline of which neither more nor less is better.
  """
  known = list(GENERATION)
  if unknown := [name for name in names if name not in known]:
    raise ValueError(f"`metrics` names {unknown}; known are {known}")
  if len(set(names)) < len(names):
    raise ValueError(f"`metrics` names one twice: {list(names)}")
  if names and not GENERATION[names[0]].better:
    judges = [name for name in known if GENERATION[name].better]
    raise ValueError(f"`metrics` begins with {names[0]!r}, which only describes; put one of {judges} first")
  return tuple(names) or tuple(known)


def check_metrics(task: "Task") -> None:
  """Checks the metrics that a task names.

  Raises:
    ValueError: see `chosen`; a classification task that names some.
  """
  if task.kind != "generation" and task.metrics:
    raise ValueError(f"task {task.name!r}: `metrics` are for generation; classification has its own, leave them out")
  try:
    chosen(task.metrics)
  except ValueError as error:
    raise ValueError(f"task {task.name!r}: {error}") from error


def generation_metrics(
  outputs: Texts, targets: Texts, inputs: Texts, names: Sequence[str] = ()
) -> tuple[dict[str, Any], np.ndarray]:
  """Measures generated text against one reference each.

  Args:
    outputs: one text an example.
    targets: the references.
    inputs: what was asked about, for `copy_rate`.
    names: the metrics, headline first; none = all of `GENERATION`.

  Returns:
    Metric -> value, and `n`; and the headline's parts, float64 [n,K].

  Raises:
    ValueError: no examples, unequal numbers of them, or see `chosen`.

  Example:
    >>> generation_metrics(["take two"], ["take two"], ["x"], ["exact_match"])[0]
    {'exact_match': 1.0, 'n': 1}
  """
  _check(outputs, targets)
  parts = {name: GENERATION[name].parts(outputs, targets, inputs) for name in chosen(names)}
  values = {name: float(GENERATION[name].value(found.sum(axis=0))) for name, found in parts.items()}
  return {**values, "n": len(targets)}, next(iter(parts.values()))


def classification_metrics(predictions: Texts, targets: Texts, labels: Texts) -> tuple[dict[str, Any], np.ndarray]:
  """Measures labels.

  Args:
    predictions: one label an example.
    targets: the right ones.
    labels: every label of the task, in its order.

  Returns:
    `accuracy` and `macro_f1` (0 to 1; the latter over labels that occur in targets or predictions), `per_class` (label
    -> `precision`, `recall`, `f1`, each 0 where it is not defined, and `n`, its targets), `confusion` (counts; rows are
    targets and columns predictions, in the order of `labels`), `n`; and the parts of accuracy, float64 [n,2].

  Raises:
    ValueError: no examples, unequal numbers of them, or a label that is not one of `labels` (it would have no row in
      the confusion, and an example would be lost without a word).

  Reference:
    `sklearn.metrics.precision_recall_fscore_support` and `f1_score(average="macro", zero_division=0)`.

  Example:
    >>> classification_metrics(["a", "a"], ["a", "b"], ["a", "b"])[0]["confusion"]
    [[1, 0], [1, 0]]
  """
  from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

  _check(predictions, targets)
  for role, values in (("targets", targets), ("predictions", predictions)):
    if unknown := sorted(set(values) - set(labels)):
      raise ValueError(
        f"classification metrics expect {role} among the task's labels {list(labels)}, got {unknown[:5]}; "
        "add them to the labels or mend the rows"
      )
  columns = precision_recall_fscore_support(targets, predictions, labels=list(labels), zero_division=0)
  per_class = _per_class(labels, columns)
  occurring = {*predictions, *targets}
  parts = accuracy_parts(predictions, targets)
  metrics = {
    "accuracy": float(ratio(parts.sum(axis=0))),
    "macro_f1": float(np.mean([found["f1"] for label, found in per_class.items() if label in occurring])),
    "per_class": per_class,
    "confusion": confusion_matrix(targets, predictions, labels=list(labels)).tolist(),
    "n": len(targets),
  }
  return metrics, parts


def multi_label_metrics(outputs: Texts, targets: Texts, labels: Texts) -> tuple[dict[str, Any], np.ndarray]:
  """Measures sets of labels.

  Args:
    outputs: one set an example, as text (data/label_sets.py); what is no label in it is passed over.
    targets: the right ones.
    labels: every label of the task, in its order.

  Returns:
    `micro_f1` (of all decisions together), `macro_f1` (of each label that occurs in targets or outputs, their mean),
    `subset_accuracy` (the share of examples whose set is right as a whole), `hamming_loss` (the share of decisions,
    one for each label of each example, that are wrong), `per_class` (label -> `precision`, `recall`, `f1`, each 0 where
    it is not defined, and `n`, its targets), `n` examples; and the parts of micro-F1, float64 [n,2].

  Raises:
    ValueError: no examples, or unequal numbers of them.

  Reference:
    scikit-learn's `f1_score` (zero_division=0), `accuracy_score` and `hamming_loss` of indicator matrices.

  Example:
    >>> multi_label_metrics(["a, b", "none"], ["a", "none"], ["a", "b"])[0]["subset_accuracy"]
    0.5
  """
  from sklearn.metrics import precision_recall_fscore_support

  _check(outputs, targets)
  found, right = (indicators(texts, labels) for texts in (outputs, targets))
  columns = precision_recall_fscore_support(right, found, average=None, zero_division=0)
  per_class = _per_class(labels, columns)
  parts = np.stack([2.0 * (found & right).sum(axis=1), found.sum(axis=1) + right.sum(axis=1)], axis=1)
  occurring = (found | right).any(axis=0)
  f1 = [one["f1"] for one, occurs in zip(per_class.values(), occurring, strict=True) if occurs]
  metrics = {
    "micro_f1": float(ratio(parts.sum(axis=0))),
    "macro_f1": float(np.mean(f1)) if f1 else 0.0,
    "subset_accuracy": float((found == right).all(axis=1).mean()),
    "hamming_loss": float((found != right).mean()),
    "per_class": per_class,
    "n": len(targets),
  }
  return metrics, parts


def indicators(texts: Texts, labels: Texts) -> np.ndarray:
  """Returns bool [n, labels]: which labels stand in each text; what is no label is passed over."""
  return np.array([[label in from_text(text, labels, "")[0] for label in labels] for text in texts], bool)


def accuracy_parts(predictions: Sequence[Any], targets: Sequence[Any]) -> np.ndarray:
  """Returns float64 [n,2]: 1 where a prediction is right, and 1."""
  return means(p == t for p, t in zip(predictions, targets, strict=True))


# Task kind -> (outputs, rows, the task's labels, the task's metrics) -> metrics, and the headline's parts.
METRICS: dict[str, Callable[[Texts, Rows, Texts, Texts], tuple[dict[str, Any], np.ndarray]]] = {
  "classification": lambda outputs, rows, labels, _: classification_metrics(outputs, column(rows, "target"), labels),
  "multi_label": lambda outputs, rows, labels, _: multi_label_metrics(outputs, column(rows, "target"), labels),
  "generation": lambda outputs, rows, _, names: generation_metrics(
    outputs, column(rows, "target"), column(rows, "input"), names
  ),
}


def column(rows: Rows, field: str) -> list[str]:
  """Returns one field of every row.

  Example:
    >>> column([{"input": "a"}, {"input": "b"}], "input")
    ['a', 'b']
  """
  return [row[field] for row in rows]


def _check(predictions: Texts, targets: Texts) -> None:
  if not targets or len(predictions) != len(targets):
    raise ValueError(f"metrics need one prediction for each target, got {len(predictions)} and {len(targets)}")


def _per_class(labels: Texts, columns: Iterable[Iterable[float]]) -> dict[str, dict[str, float]]:
  """Returns scikit-learn's columns, a value for each label, as label -> `precision`, `recall`, `f1` and `n`."""
  return {
    label: {"precision": float(precision), "recall": float(recall), "f1": float(f1), "n": int(n)}
    for label, precision, recall, f1, n in zip(labels, *columns, strict=True)
  }
