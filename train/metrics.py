"""Metrics of labels and of generated text, from kept libraries: scikit-learn and rouge-score.

Every score is a share from 0 to 1 (not a percentage); `n` counts examples.
"""

from collections.abc import Callable, Sequence
from typing import Any


def classification_metrics(predictions: Sequence[str], targets: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
  """Measures labels.

  Args:
    predictions: one label an example.
    targets: the right ones.
    labels: every label of the task, in its order.

  Returns:
    `accuracy` and `macro_f1` (0 to 1; the latter over labels that occur in targets or predictions), `confusion`
    (counts; rows are targets and columns predictions, in the order of `labels`), `n`.

  Raises:
    ValueError: no examples, unequal numbers of them, or a label that is not one of `labels` (it would have no row in
      the confusion, and an example would be lost without a word).

  Reference:
    `sklearn.metrics.f1_score(average="macro", zero_division=0)`.

  Example:
    >>> classification_metrics(["a", "a"], ["a", "b"], ["a", "b"])["confusion"]
    [[1, 0], [1, 0]]
  """
  from sklearn.metrics import confusion_matrix, f1_score

  _check(predictions, targets)
  for role, values in (("targets", targets), ("predictions", predictions)):
    if unknown := sorted(set(values) - set(labels)):
      raise ValueError(
        f"classification metrics expect {role} among the task's labels {list(labels)}, got {unknown[:5]}; "
        "add them to the labels or mend the rows"
      )
  occurring = {*predictions, *targets}
  seen = [label for label in labels if label in occurring]
  return {
    "accuracy": sum(p == t for p, t in zip(predictions, targets, strict=True)) / len(targets),
    "macro_f1": float(f1_score(targets, predictions, labels=seen, average="macro", zero_division=0)),
    "confusion": confusion_matrix(targets, predictions, labels=list(labels)).tolist(),
    "n": len(targets),
  }


def generation_metrics(predictions: Sequence[str], targets: Sequence[str]) -> dict[str, Any]:
  """Measures generated text against one reference each.

  Args:
    predictions: one text an example.
    targets: the references.

  Returns:
    `rouge1`, `rouge2`, `rougeL`: mean F1 (0 to 1, no stemming; `rougeL` takes a text as one sentence); `exact_match`:
    share of equal texts, white space around them aside; `n`.

  Raises:
    ValueError: no examples, or unequal numbers of them.

  Reference:
    Lin, "ROUGE: a package for automatic evaluation of summaries" (2004), as in the rouge-score library, whose words are
    lower-cased runs of a-z and 0-9: texts in other scripts score 0.
  """
  from rouge_score.rouge_scorer import RougeScorer

  _check(predictions, targets)
  names = ("rouge1", "rouge2", "rougeL")
  scorer = RougeScorer(names, use_stemmer=False)
  scores = [scorer.score(target, prediction) for prediction, target in zip(predictions, targets, strict=True)]
  means = {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in names}
  exact = sum(p.strip() == t.strip() for p, t in zip(predictions, targets, strict=True)) / len(targets)
  return {**means, "exact_match": exact, "n": len(targets)}


# Task kind -> metrics; classification also takes the labels.
METRICS: dict[str, Callable[..., dict[str, Any]]] = {
  "classification": classification_metrics,
  "generation": generation_metrics,
}
# The metric that a skill's `value` is.
HEADLINES = {"classification": "accuracy", "generation": "rougeL", "perplexity": "perplexity"}


def _check(predictions: Sequence[str], targets: Sequence[str]) -> None:
  if not targets or len(predictions) != len(targets):
    raise ValueError(f"metrics need one prediction for each target, got {len(predictions)} and {len(targets)}")
