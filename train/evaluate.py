"""Evaluation of every skill: perplexity of held-out texts, classification by label likelihood, generation.

A classification task is asked twice: by its labels' scores, made probabilities by what was fitted on the validation
split (train/calibration.py), and freely, as a generation whose answer may be no label at all.

Each example counts once, whatever the batch size.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from data.components import held_out_objective
from data.objectives import OBJECTIVES
from data.prompts import render
from data.rows import Row
from data.tasks import Task, read_task_rows
from models import Model
from models.sharding import fetch, on_mesh, pin
from train import calibration, generate, label_sets
from train.calibration import LABEL_SCORES, Calibration, LabelSets
from train.evaluator import Evaluator, label_answers
from train.loss import token_losses
from train.metrics import (
  DECODING,
  METRICS,
  accuracy_parts,
  check_metrics,
  classification_metrics,
  headline,
  perplexity_of,
)
from train.text_metrics import ratio


class Measured(NamedTuple):
  """What one skill's evaluation found.

  Attributes:
    metrics: `value` is the headline; JSON-able.
    parts: the headline's parts, float64 [templates, examples, K], see `train/text_metrics.py`; example by example the
      same in every stage.
    samples: input, target and output of the first rows.
    calibration: of a classification task; of one with several labels a text how they are chosen.
  """

  metrics: dict[str, Any]
  parts: np.ndarray
  samples: Sequence[dict[str, str]] = ()
  calibration: Calibration | LabelSets | None = None


def check_evaluation(settings: ConfigDict, tasks: Mapping[str, Task]) -> None:
  """Checks what a config and tasks ask of the evaluation, before a long run.

  Args:
    settings: `config.evaluate`.
    tasks: by name.

  Raises:
    ValueError: an unknown objective, metric or label score, a target accuracy that is no share, or settings of answers
      that do not go together.
  """
  if not 0 <= settings.target_accuracy <= 1:
    raise ValueError(f"config.evaluate.target_accuracy must be 0 (never abstain) to 1, got {settings.target_accuracy}")
  if settings.objective not in ("", *OBJECTIVES):
    raise ValueError(f"config.evaluate.objective must be one of {sorted(OBJECTIVES)}, got {settings.objective!r}")
  try:
    generate.wish_of(settings, headline("generation"))
  except ValueError as error:
    raise ValueError(f"config.evaluate: {error}") from error
  asked = {"config.evaluate.label_score": settings.label_score}
  for name, task in tasks.items():
    check_metrics(task)
    if task.kind == "multi_label":
      label_sets.check(task)
    if task.label_score and task.kind != "classification":
      raise ValueError(f"task {name!r}: `label_score` is for classification, this is {task.kind}; leave it out")
    asked[f"task {name!r}: `label_score`"] = task.label_score or settings.label_score
  for where, name in asked.items():
    if name not in LABEL_SCORES:
      raise ValueError(f"{where} must be one of {list(LABEL_SCORES)}, got {name!r}")


def evaluate_task(evaluator: Evaluator, task: Task, split: str) -> Measured:
  """Measures one task, with each of its templates.

  Args:
    evaluator: the model.
    task: the task.
    split: "validation" or "test".

  Returns:
    Metrics: `value`, the task's headline, and its name, `metric`; those of `train/metrics.py`, means over the templates
    where there are several, then with each one's `value` under `templates`; for classification also `accuracies` by
    label score, `generated` (see `answer_freely`) and `calibration` (see `calibration.measure`; over the templates'
    rows together); for generation those of `DECODING` that were asked for otherwise; for several labels a text
    `generated` and `label_sets`: how they were chosen; `skipped`: rows that could not be used, by reason, if any.
    Samples are of the first `config.evaluate.samples` rows with the first template.
  """
  settings = evaluator.config.evaluate
  there = read_task_rows(task, split)
  rows = there.spread(settings.max_examples)
  fit = {"classification": calibrate, "multi_label": label_sets.calibrate}.get(task.kind)
  fitted = fit(evaluator, task, split) if fit else None
  found, parts, outputs, scores = [], [], [], []
  for template in range(len(task.templates)):
    prompts = [render(task, row, template)[0] for row in rows]
    if isinstance(fitted, LabelSets):
      metrics, here, answers = label_sets.measure(evaluator, task, rows, prompts, template, fitted)
    elif fitted:
      metrics, here, answers, scored = measure_labels(evaluator, task, rows, prompts, template, fitted)
      scores.append(scored)
    else:
      wish = generate.wish_of(settings, headline(task.kind, task.metrics))._replace(template=template)
      answers = [answer for [answer] in generate.answers(evaluator, prompts, wish, task, rows)]
      metrics, here = METRICS[task.kind](answers, rows, (), task.metrics)
    found.append(metrics)
    parts.append(here)
    outputs.append(answers)
  metrics, name = mean_of(found), headline(task.kind, task.metrics)
  metrics = {"value": metrics[name], "metric": name, **metrics}
  if there.skipped:
    metrics["skipped"] = dict(there.skipped)
  if len(found) > 1:
    metrics["templates"] = [one[name] for one in found]
  if task.kind == "generation":
    metrics |= {name: settings[name] for name, plain in DECODING.items() if settings[name] != plain}
  if isinstance(fitted, LabelSets):
    metrics["label_sets"] = {**fitted._asdict(), "sets": len(fitted.sets)}
  elif fitted:
    targets = np.tile(label_numbers(task, rows), len(task.templates))
    metrics["calibration"] = calibration.measure(fitted, np.concatenate(scores), targets)
  samples = [
    {"input": row["input"], "target": row["target"], "output": output}
    for row, output in zip(rows[: settings.samples], outputs[0], strict=False)
  ]
  return Measured(metrics, np.stack(parts), samples, fitted)


def calibrate(evaluator: Evaluator, task: Task, split: str) -> Calibration:
  """Fits a task's temperature and threshold on its validation split, over all templates together.

  Args:
    evaluator: the model.
    task: a classification task.
    split: the split that is measured: where it is "validation", or the task has none, nothing is fitted.
  """
  settings = evaluator.config.evaluate
  name = task.label_score or settings.label_score
  if why := calibration.unfitted(task, split):
    return Calibration(name, note=why, target_accuracy=settings.target_accuracy)
  rows = read_task_rows(task, "validation").spread(settings.max_examples)
  scores = [
    evaluator.label_scores(task, [render(task, row, template)[0] for row in rows], template)[name]
    for template in range(len(task.templates))
  ]
  targets = np.tile(label_numbers(task, rows), len(scores))
  return calibration.fit(np.concatenate(scores), targets, name, settings.target_accuracy)


def measure_labels(
  evaluator: Evaluator, task: Task, rows: Sequence[Row], prompts: Sequence[str], template: int, fitted: Calibration
) -> tuple[dict[str, Any], np.ndarray, list[str], np.ndarray]:
  """Measures a classification task with one template.

  Returns:
    The metrics, accuracy's parts [rows,2], the labels that were chosen, and their scores [rows, labels].
  """
  scores, targets = evaluator.label_scores(task, prompts, template), label_numbers(task, rows)
  chosen = scores[fitted.label_score]
  outputs = [task.labels[number] for number in chosen.argmax(axis=1)]
  metrics, parts = classification_metrics(outputs, [row["target"] for row in rows], task.labels)
  metrics["label_score"] = fitted.label_score
  metrics["accuracies"] = {
    name: float(ratio(accuracy_parts(score.argmax(axis=1), targets).sum(axis=0))) for name, score in scores.items()
  }
  metrics["generated"] = answer_freely(evaluator, task, rows, prompts, template)
  return metrics, parts, outputs, chosen


def answer_freely(
  evaluator: Evaluator, task: Task, rows: Sequence[Row], prompts: Sequence[str], template: int
) -> dict[str, float]:
  """Measures what a model writes when it is not held to the labels.

  Returns:
    `valid`: the share of answers that are a label's text (white space around it aside); `accuracy`: that are the right
    one's.
  """
  wish = generate.Wish(room=evaluator.label_room(task, template))
  written = [text for [text] in generate.answers(evaluator, prompts, wish, task)]
  texts = {answer.strip(): label for answer, label in zip(label_answers(task, template), task.labels, strict=True)}
  labels = [texts.get(text) for text in written]
  right = [label == row["target"] for label, row in zip(labels, rows, strict=True)]
  return {"valid": sum(label is not None for label in labels) / len(labels), "accuracy": sum(right) / len(right)}


def label_numbers(task: Task, rows: Sequence[Row]) -> np.ndarray:
  """Returns the places of the rows' targets among the labels, int [rows]."""
  places = {label: place for place, label in enumerate(task.labels)}
  return np.array([places[row["target"]] for row in rows])


def mean_of(metrics: Sequence[Any]) -> Any:
  """Returns the mean of equally formed metrics: of numbers, and of those in lists and dicts.

  Example:
    >>> mean_of([{"f1": 0.5, "counts": [1, 2]}, {"f1": 1.0, "counts": [3, 4]}])
    {'f1': 0.75, 'counts': [2.0, 3.0]}
  """
  first = metrics[0]
  if len(metrics) == 1 or isinstance(first, str) or first is None:
    return first
  if isinstance(first, dict):
    return {key: mean_of([found[key] for found in metrics]) for key in first}
  if isinstance(first, (list, tuple)):
    return [mean_of(values) for values in zip(*metrics, strict=True)]
  return first if all(value == first for value in metrics) else sum(metrics) / len(metrics)


def perplexity(evaluator: Evaluator, batches: Iterator[dict[str, np.ndarray]], count_bytes: int) -> Measured:
  """Measures the perplexity of held-out text under `config.evaluate.objective`.

  Args:
    evaluator: the model.
    batches: every held-out example once, as training batches.
    count_bytes: UTF-8 bytes of the text that the targets stand for.

  Returns:
    Metrics: `value` and `perplexity` (a target token's), `bits_per_byte` (so that tokenizers compare), `n` (target
    tokens), `objective`. An example of the parts is a packed row: its nats and its target tokens.

  Raises:
    ValueError: there is no target token.
  """
  run = partial(summer(evaluator.model, evaluator.config.train.loss_chunk_tokens), evaluator.params)
  parts = np.concatenate([np.asarray(fetch(run(on_mesh(batch))), np.float64) for batch in batches])
  parts = parts[parts[:, 1] > 0]
  if not len(parts):
    raise ValueError("the held-out text has no target tokens; give a longer corpus_validation.jsonl")
  nll, weight = parts.sum(axis=0)
  value = float(perplexity_of(parts.sum(axis=0)))
  bits = float(nll) / math.log(2) / count_bytes
  metrics = {"value": value, "perplexity": value, "bits_per_byte": bits, "n": int(weight)}
  metrics["objective"] = held_out_objective(evaluator.config)
  return Measured(metrics, parts[None])


@functools.cache
def summer(model: Model, chunk_tokens: int) -> Callable:
  """The compiled `(params, batch) -> [B,2]` of a model: each row's nll and weight, the same on every process."""

  def sums(params, batch):
    weights, targets = batch["decoder_loss_weights"], batch["decoder_target_tokens"]
    features, head = model.features(params, batch), model.head(params)
    settings = {"vocab_size": model.config.vocab_size, "chunk_tokens": chunk_tokens, "logit_cap": model.logit_cap}
    _, tokens = token_losses(features, head, targets, weights, **settings)
    return pin(jnp.stack([(weights * tokens["nll"]).sum(axis=1), weights.sum(axis=1)], axis=1), None, None)

  return jax.jit(sums)
