"""What a task gives away without a language model: to counting, to copying, to similar rows, to a linear classifier."""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data.label_sets import as_text, from_text
from data.words import words
from train.metrics import METRICS, headline

if TYPE_CHECKING:
  from sklearn.feature_extraction.text import TfidfVectorizer

  from data.tasks import Task

Rows = Sequence[Mapping[str, str]]
_BLOCK = 512  # test rows compared at a time: bounds the dense [block, training rows] matrix of similarities


def baselines(task: "Task", limit: int = 0) -> dict[str, dict[str, Any]]:
  """Measures the baselines of a task, made from its "train" rows, on its "test" rows.

  Args:
    task: the task.
    limit: measure on so many rows only, those of the stages with `evaluate.max_examples`; 0 = all.

  Returns:
    As `measure_baselines`.

  Raises:
    FileNotFoundError: the task lacks a split.
    ValueError: a malformed row, with file and line.
  """
  from data.tasks import read_task_rows

  test = read_task_rows(task, "test").spread(limit)
  return measure_baselines(task.kind, read_task_rows(task, "train"), test, task.labels, task.metrics)


def measure_baselines(
  kind: str, train: Rows, test: Rows, labels: Sequence[str] = (), metrics: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
  """Measures the baselines of a task from its rows.

  Args:
    kind: "classification", "multi_label" or "generation".
    train: rows with `input` and `target` that the baselines are made from.
    test: rows with `input` and `target` that they are measured on.
    labels: every label, in order; not for generation.
    metrics: the task's, headline first; for generation only; none = all.

  Returns:
    Baseline name -> metrics of its kind (train/metrics.py) and `value`, the task's headline: `nearest_neighbour`; for
    labels `majority` (of several labels a text, the most frequent set), for one label a text `linear`, for several
    `frequent_labels`; for generation `constant` and `copied_input`.

  Raises:
    ValueError: an unknown kind, no rows, or a target that is not one of the labels.
  """
  if kind not in METRICS:
    raise ValueError(f"task kind {kind!r} has no baselines; kinds are {sorted(METRICS)}")
  made = {name: make(train, test) for name, make in BASELINES[kind].items()}
  if kind == "multi_label":
    made["frequent_labels"] = frequent_labels(train, test, labels)
  measured = {name: METRICS[kind](answers, test, labels, metrics)[0] for name, answers in made.items()}
  return {name: {"value": found[headline(kind, metrics)], **found} for name, found in measured.items()}


def majority(train: Rows, test: Rows) -> list[str]:
  """Answers the most frequent training target to everything; of equally frequent ones, that which comes first.

  Args:
    train: rows with `target`.
    test: rows, only counted.

  Returns:
    One answer a test row.

  Raises:
    ValueError: no training rows.
  """
  _check(train)
  return [Counter(row["target"] for row in train).most_common(1)[0][0]] * len(test)


def frequent_labels(train: Rows, test: Rows, labels: Sequence[str]) -> list[str]:
  """Answers the set that has the best micro-F1 of the training rows to everything: so many of the commonest labels.

  A model that knows nothing comes near it by its thresholds, while the most frequent set may be the empty one.

  Args:
    train: rows with `target`, a set as text.
    test: rows, only counted.
    labels: every label, in order.

  Returns:
    One answer a test row.

  Raises:
    ValueError: no training rows.

  Example:
    >>> frequent_labels([{"target": text} for text in ("none", "none", "b", "a, b")], [{}], ["a", "b"])
    ['b']
  """
  _check(train)
  counts = Counter(label for row in train for label in from_text(row["target"], labels, "")[0])
  order = sorted(labels, key=lambda label: -counts[label])
  right = list(itertools.accumulate(counts[label] for label in order))
  f1 = [2 * hits / (size * len(train) + right[-1]) for size, hits in enumerate(right, 1)]
  return [as_text(order[: f1.index(max(f1)) + 1], labels, "")] * len(test)


def nearest_neighbour(train: Rows, test: Rows) -> list[str]:
  """Answers the target of the training row whose input is most similar: cosine of TF-IDF over words.

  Args:
    train: rows with `input` and `target`.
    test: rows with `input`.

  Returns:
    One answer a test row; of equally similar training rows, that which comes first.

  Raises:
    ValueError: no training rows, or none with a word in it.

  Example:
    >>> known = [{"input": "red apple", "target": "fruit"}, {"input": "oak", "target": "tree"}]
    >>> nearest_neighbour(known, [{"input": "an old oak"}])
    ['tree']
  """
  _check(train)
  vectorizer = _word_counts()
  known = vectorizer.fit_transform([row["input"] for row in train])
  answers: list[str] = []
  for start in range(0, len(test), _BLOCK):
    asked = vectorizer.transform([row["input"] for row in test[start : start + _BLOCK]])
    nearest = (asked @ known.T).toarray().argmax(axis=1)  # rows have unit norm: a product is a cosine
    answers += [train[int(index)]["target"] for index in nearest]
  return answers


def linear(train: Rows, test: Rows) -> list[str]:
  """Answers what a linear classifier finds: a support vector machine over TF-IDF of words and pairs of words.

  Args:
    train: rows with `input` and `target`.
    test: rows with `input`.

  Returns:
    One answer a test row.

  Raises:
    ValueError: no training rows, or none with a word in it.

  Example:
    >>> known = [{"input": "red apple", "target": "fruit"}, {"input": "oak", "target": "tree"}]
    >>> linear(known, [{"input": "an old oak"}])
    ['tree']
  """
  from sklearn.svm import LinearSVC

  _check(train)
  targets = [row["target"] for row in train]
  if len(set(targets)) == 1:
    return targets[:1] * len(test)
  vectorizer = _word_counts(ngram_range=(1, 2), sublinear_tf=True)
  classifier = LinearSVC(random_state=0).fit(vectorizer.fit_transform([row["input"] for row in train]), targets)
  return [str(answer) for answer in classifier.predict(vectorizer.transform([row["input"] for row in test]))]


def constant(train: Rows, test: Rows) -> list[str]:
  """Answers the most typical training target to everything: the nearest to their mean, by cosine of TF-IDF over words.

  Args:
    train: rows with `target`.
    test: rows, only counted.

  Returns:
    One answer a test row; of equally typical targets, that which comes first.

  Raises:
    ValueError: no training rows, or no target with a word in it.
  """
  _check(train)
  targets = [row["target"] for row in train]
  known = _word_counts().fit_transform(targets)
  return [targets[int((known @ known.sum(axis=0).T).argmax())]] * len(test)


def copied_input(train: Rows, test: Rows) -> list[str]:
  """Answers every test row with its own input."""
  return [row["input"] for row in test]


BASELINES: dict[str, dict[str, Callable[[Rows, Rows], list[str]]]] = {
  "classification": {"majority": majority, "nearest_neighbour": nearest_neighbour, "linear": linear},
  "multi_label": {"majority": majority, "nearest_neighbour": nearest_neighbour},
  "generation": {"constant": constant, "copied_input": copied_input, "nearest_neighbour": nearest_neighbour},
}


def _word_counts(**settings: Any) -> "TfidfVectorizer":
  from sklearn.feature_extraction.text import TfidfVectorizer

  # Not the default's words: it drops single characters, which labels can hang on.
  return TfidfVectorizer(tokenizer=words, token_pattern=None, **settings)


def _check(train: Rows) -> None:
  if not train:
    raise ValueError("baselines are made from training rows, got none; give the task a train split")
