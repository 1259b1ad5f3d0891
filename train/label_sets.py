"""Several labels for one text: the probability of each, from log-probabilities of whole sets, and when it is chosen.

A model answers with a set, written in one way (data/label_sets.py), so log-probabilities of answers are a distribution
over sets; a label's probability is that of all sets that hold it. Of up to 8 labels all 256 sets are scored, and this
is exact among them. Of more labels the empty set, each label alone and the commonest sets of the training rows are: the
labels' probabilities then leave out sets that the task does not show. A label is chosen, whatever the others are, where
its probability reaches its threshold, so that sets that were not scored can be answers, too. n counts rows, L is
labels, C is sets.

Reference:
  Read et al., "Multi-label classification using ensembles of pruned sets" (2008): the sets; Lipton et al., "Optimal
  thresholding of classifiers to maximize F1 measure" (2014): the thresholds.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data.label_sets import as_text, from_text
from data.prompts import render
from data.tasks import Task, read_task_rows
from train import generate
from train.calibration import LabelSets, fit_temperature, unfitted
from train.evaluator import Evaluator
from train.metrics import indicators, multi_label_metrics

MOST = 256  # sets that are scored


def check(task: Task) -> None:
  """Raises a ValueError where a task has more labels than can be scored."""
  if len(task.labels) >= MOST:
    raise ValueError(
      f"task {task.name!r} has {len(task.labels)} labels; with `multi_label` expected at most {MOST - 1}: split it"
    )


def candidates(task: Task) -> list[str]:
  """Returns the sets that are scored, as answers, in an order that the task determines; `check` comes before."""
  labels = task.labels
  if 2 ** len(labels) <= MOST:
    sizes = range(len(labels) + 1)
    return [as_text(one, labels, task.none) for size in sizes for one in itertools.combinations(labels, size)]
  sets = dict.fromkeys([task.none, *labels])
  seen = Counter(row["target"] for row in read_task_rows(task, "train"))
  sets |= dict.fromkeys(sorted(seen, key=lambda one: (-seen[one], one)))
  return list(sets)[:MOST]


def score(evaluator: Evaluator, task: Task, sets: Sequence[str], prompts: Sequence[str], template: int) -> np.ndarray:
  """Returns the sets' log-probabilities as answers to rendered prompts, float64 [n,C]."""
  return evaluator.likelihoods(dataclasses.replace(task, kind="classification", labels=tuple(sets)), prompts, template)


def calibrate(evaluator: Evaluator, task: Task, split: str) -> LabelSets:
  """Fits temperature and thresholds on a task's validation split, over all templates together.

  Args:
    evaluator: the model.
    task: a task with several labels a text.
    split: the split that is measured: where it is "validation", or the task has none, nothing is fitted.
  """
  sets = candidates(task)
  plain = LabelSets(sets, dict.fromkeys(task.labels, 0.5))
  if why := unfitted(task, split):
    return plain._replace(note=why)
  rows = read_task_rows(task, "validation").spread(evaluator.config.evaluate.max_examples)
  templates = range(len(task.templates))
  scores = [score(evaluator, task, sets, [render(task, row, t)[0] for row in rows], t) for t in templates]
  return fit(plain, np.concatenate(scores), [row["target"] for row in rows] * len(task.templates))


def fit(plain: LabelSets, scores: np.ndarray, targets: Sequence[str]) -> LabelSets:
  """Fits the temperature by the right sets' likelihood, then each label's threshold by its F1.

  Args:
    plain: the sets and the labels.
    scores: float64 [n,C].
    targets: the right sets, as answers; those that are not scored have no say in the temperature.
  """
  places = {one: place for place, one in enumerate(plain.sets)}
  known = np.array([target in places for target in targets])
  numbers = np.array([places.get(target, 0) for target in targets])
  notes, found = [], plain._replace(rows=len(targets))
  if not known.all():
    notes.append(f"{(~known).sum()} of {len(targets)} validation rows have sets that are not scored")
  if not known.any():
    notes.append("no temperature can be fitted")
  elif (scores.argmax(axis=1) == numbers)[known].all():
    notes.append("every validation row's set is right: no temperature fits best")
  else:
    found = found._replace(temperature=fit_temperature(scores[known], numbers[known]))
  probabilities, right = found.probabilities(scores), indicators(targets, list(plain.thresholds))
  thresholds = {
    label: choose_threshold(probabilities[:, place], right[:, place]) for place, label in enumerate(plain.thresholds)
  }
  return found._replace(thresholds=thresholds, note="; ".join(notes))


def choose_threshold(probability: np.ndarray, right: np.ndarray) -> float:
  """Returns the threshold of the best F1: half way between two rows' probabilities, of equal ones the nearest to 0.5.

  Args:
    probability: float64 [n].
    right: bool [n]: the label is one of the row's. Where it never is, the threshold stays 0.5.

  Example:
    >>> choose_threshold(np.array([0.9, 0.3, 0.1]), np.array([True, True, False]))
    0.2
  """
  if not right.any():
    return 0.5
  ordered, place = np.unique(probability, return_inverse=True)  # rising
  edges = np.concatenate([[ordered[0] / 2], (ordered[:-1] + ordered[1:]) / 2])
  # From each edge on: how many rows are chosen, and how many of them are right.
  chosen = np.bincount(place)[::-1].cumsum()[::-1]
  both = np.bincount(place, weights=right)[::-1].cumsum()[::-1]
  f1 = 2 * both / (chosen + right.sum())
  best = edges[f1 >= f1.max() - 1e-12]
  return float(best[np.abs(best - 0.5).argmin()])


def measure(
  evaluator: Evaluator,
  task: Task,
  rows: Sequence[Mapping[str, str]],
  prompts: Sequence[str],
  template: int,
  fitted: LabelSets,
) -> tuple[dict[str, Any], np.ndarray, list[str]]:
  """Measures a task with one template.

  Returns:
    The metrics of `multi_label_metrics`, and `generated`, see `answer_freely`; micro-F1's parts [n,2]; the answers.
  """
  scores = score(evaluator, task, fitted.sets, prompts, template)
  outputs = [as_text(one, task.labels, task.none) for one in fitted.choose(fitted.probabilities(scores))]
  metrics, parts = multi_label_metrics(outputs, [row["target"] for row in rows], task.labels)
  metrics["generated"] = answer_freely(evaluator, task, rows, prompts, template, fitted.sets)
  return metrics, parts, outputs


def answer_freely(
  evaluator: Evaluator,
  task: Task,
  rows: Sequence[Mapping[str, str]],
  prompts: Sequence[str],
  template: int,
  sets: Sequence[str],
) -> dict[str, float]:
  """Measures what a model writes when it is not held to any set.

  Returns:
    `valid`: the share of answers that are labels, each once, or the word for none; `subset_accuracy`: that are the
    right set, and nothing else; `micro_f1` of the labels in all of them.
  """
  held = dataclasses.replace(task, kind="classification", labels=(*sets, as_text(task.labels, task.labels, task.none)))
  wish = generate.Wish(room=evaluator.label_room(held, template), template=template)
  answers = [text for [text] in generate.answers(evaluator, prompts, wish, task, rows)]
  read = [from_text(text, task.labels, task.none) for text in answers]
  texts, targets = [as_text(found, task.labels, task.none) for found, _ in read], [row["target"] for row in rows]
  valid = np.array([valid for _, valid in read])
  right = valid & (np.array(texts) == np.array(targets))  # what holds no label is not the answer that there is none
  micro_f1 = multi_label_metrics(texts, targets, task.labels)[0]["micro_f1"]
  return {"valid": float(valid.mean()), "micro_f1": micro_f1, "subset_accuracy": float(right.mean())}


def answers(
  evaluator: Evaluator, task: Task, prompts: Sequence[str], template: int, fitted: LabelSets
) -> list[dict[str, Any]]:
  """Returns for each prompt its `labels`, the `probabilities` of all labels, and the `thresholds` for them."""
  found = fitted.probabilities(score(evaluator, task, fitted.sets, prompts, template))
  return [
    {
      "labels": chosen,
      "probabilities": dict(zip(task.labels, row.tolist(), strict=True)),
      "thresholds": dict(fitted.thresholds),
    }
    for row, chosen in zip(found, fitted.choose(found), strict=True)
  ]
