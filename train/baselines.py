"""What a task gives away without a model: the majority label, and the answer of the most similar training row."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from data.tasks import Task, read_task_rows
from train.metrics import HEADLINES, METRICS


def baselines(task: Task, split: str = "test") -> dict[str, dict[str, Any]]:
  """Measures the baselines of a task.

  Args:
    task: the task.
    split: the split they are measured on; they are made from "train".

  Returns:
    Baseline name -> metrics, with `value` as in the report: `majority` (classification only) and `nearest_neighbour`.
  """
  train, test = read_task_rows(task, "train"), read_task_rows(task, split)
  answers = {"nearest_neighbour": nearest_neighbour(train, test)}
  if task.kind == "classification":
    answers["majority"] = majority(train, test)
  targets = [row["target"] for row in test]
  extra = (task.labels,) if task.kind == "classification" else ()
  measured = {name: METRICS[task.kind](predictions, targets, *extra) for name, predictions in answers.items()}
  return {name: {"value": metrics[HEADLINES[task.kind]], **metrics} for name, metrics in measured.items()}


def majority(train: Sequence[Mapping[str, str]], test: Sequence[Mapping[str, str]]) -> list[str]:
  """Answers the most frequent training target to everything."""
  return [Counter(row["target"] for row in train).most_common(1)[0][0]] * len(test)


def nearest_neighbour(train: Sequence[Mapping[str, str]], test: Sequence[Mapping[str, str]]) -> list[str]:
  """Answers the target of the training row whose input is most similar (cosine of TF-IDF over words)."""
  from sklearn.feature_extraction.text import TfidfVectorizer

  vectorizer = TfidfVectorizer(token_pattern=r"\S+")  # rows come out with unit norm: a product is a cosine
  known = vectorizer.fit_transform([row["input"] for row in train])
  asked = vectorizer.transform([row["input"] for row in test])
  similarity = (asked @ known.T).tocsr()
  return [train[int(row.toarray().argmax())]["target"] for row in similarity]
