"""Evaluation of every skill: perplexity of held-out texts, classification by label likelihood, greedy generation.

A classification task is asked twice: by its labels' scores, made probabilities by what was fitted on the validation
split (train/calibration.py), and freely, as a generation whose answer may be no label at all.

Each example counts once, whatever the batch size: batches are filled up with empty rows that count nothing. Prompts are
sorted by length into buckets, so that few shapes are compiled and little padding is computed.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from data.prompts import Frame, fill, frame_of, render, template_fields
from data.rows import Row
from data.tasks import Task, read_task_rows
from data.tokenizer import Tokenizer
from models import Model, beam, decode
from models.sharding import BATCH, pin, token_spec
from train import calibration, label_sets
from train.calibration import LABEL_SCORES, Calibration, LabelSets
from train.loss import token_losses
from train.metrics import METRICS, accuracy_parts, check_metrics, classification_metrics, headline, perplexity_of, ratio

BUCKETS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)  # padded lengths of prompts and labels


class Measured(NamedTuple):
  """What one skill's evaluation found.

  Attributes:
    metrics: `value` is the headline; JSON-able.
    parts: the headline's parts, float64 [templates, examples, K], see `train/metrics.py`; example by example the same
      in every stage.
    samples: input, target and output of the first rows.
    calibration: of a classification task; of one with several labels a text how they are chosen.
  """

  metrics: dict[str, Any]
  parts: np.ndarray
  samples: Sequence[dict[str, str]] = ()
  calibration: Calibration | LabelSets | None = None


class Evaluator:
  """A model with its tokenizer, ready to be asked.

  Args:
    config: `evaluate` and `data` lengths are read.
    model: the model.
    params: its parameters, on the current mesh (`jax.set_mesh`).
    tokenizer: its tokenizer.
  """

  def __init__(self, config: ConfigDict, model: Model, params: Any, tokenizer: Tokenizer):
    self.config, self.model, self.params, self.tokenizer = config, model, params, tokenizer
    t5 = config.architecture == "t5"
    self.longest_prompt = config.data.encoder_length if t5 else config.data.decoder_length
    self.cut: set[tuple[str, Frame]] = set()  # prompts that were cut to `longest_prompt`

  def classify(self, task: Task, texts: Sequence[str], template: int = 0) -> np.ndarray:
    """Scores every label for rendered prompts.

    Args:
      task: a classification task.
      texts: prompts from `render`.
      template: which of the task's templates, whose answers the labels are put into.

    Returns:
      float64 [texts, labels] log-probabilities of the label texts.
    """
    frame, labels = frame_of(task, self.tokenizer), self.label_tokens(task, template)
    tokens, weights = padded(labels, room_of(labels))
    run = partial(scorer(self.model), self.params)
    scores = np.zeros((len(texts), len(labels)))
    for rows, prompts in self.batches(texts, frame):
      scores[rows] = fetch(run(prompts, tokens, weights))[: len(rows)]
    return scores

  def label_tokens(self, task: Task, template: int = 0) -> list[list[int]]:
    """Returns the tokens of every label as the answer in a template, with what stands around an answer."""
    frame = frame_of(task, self.tokenizer)
    return [frame.answer(self.tokenizer.encode(answer)) for answer in label_answers(task, template)]

  def label_room(self, task: Task, template: int = 0) -> int:
    """Returns the tokens that an answer may have for every label to fit."""
    return room_of(self.label_tokens(task, template))

  def label_scores(self, task: Task, texts: Sequence[str], template: int = 0) -> dict[str, np.ndarray]:
    """Scores every label for rendered prompts in each way of `LABEL_SCORES`.

    Args:
      task, texts, template: see `classify`.

    Returns:
      Name -> float64 [texts, labels].
    """
    fields = template_fields(task.templates[template]["input"], task.name)
    nothing = render(task, dict.fromkeys(fields, ""), template)[0]
    sums = self.classify(task, [*texts, nothing], template)  # in one batch: a shape of its own would be compiled
    tokens = np.array([len(label) for label in self.label_tokens(task, template)])
    return {name: score(sums[:-1], tokens, sums[-1]) for name, score in LABEL_SCORES.items()}

  def generate(
    self,
    texts: Sequence[str],
    max_new_tokens: int | None = None,
    task: Task | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
  ) -> list[str]:
    """Answers prompts, greedily or by the best of several beams.

    Args:
      texts: prompts.
      max_new_tokens: default `config.evaluate.max_new_tokens`.
      task: the task that they are prompts of, or None.
      beams: more than 1: beam search.
      length_penalty: of beams, see `models.beam.search`.

    Returns:
      The answers, in the order of the prompts.
    """
    room, frame = max_new_tokens or self.config.evaluate.max_new_tokens, frame_of(task, self.tokenizer)
    ends = self.tokenizer.eos_id, self.tokenizer.pad_id
    run = searcher(self.model, beams, room, *ends, length_penalty) if beams > 1 else generator(self.model, room, *ends)
    answers = [""] * len(texts)
    for rows, prompts in self.batches(texts, frame):
      written = fetch(run(self.params, prompts))
      for row, tokens in zip(rows, written[:, 0] if beams > 1 else written, strict=False):
        answers[row] = self.tokenizer.decode(frame.answered(tokens.tolist())).strip()
    return answers

  def batches(self, texts: Sequence[str], frame: Frame) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
    """Yields the numbers of a batch's prompts and the padded batch; short prompts first."""
    encoded = [self.encode(text, frame) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))
    size = self.config.evaluate.batch_size
    for begin in range(0, len(order), size):
      rows = order[begin : begin + size]
      filled = [encoded[i] for i in rows] + [[self.tokenizer.eos_id]] * (size - len(rows))
      length = min(bucket(max(map(len, filled))), self.longest_prompt)
      prompts = self.model.prompts(filled, length, self.tokenizer.start_id)
      if self.config.data.bidirectional_prefix and self.config.architecture == "gpt":
        prompts["bidirectional"] = prompts["segments"]
      yield rows, on_mesh(prompts, whole=True)

  def encode(self, text: str, frame: Frame) -> list[int]:
    """Encodes a prompt; one that is too long loses its end, never its frame, and is counted."""
    tokens = self.tokenizer.encode(text)
    prompt = frame.prompt(tokens, self.longest_prompt)
    if len(prompt) < len(frame.prompt(tokens, len(tokens) + self.longest_prompt)):
      self.cut.add((text, frame))  # a prompt that is asked twice counts once
    return prompt


def check_evaluation(settings: ConfigDict, tasks: Mapping[str, Task]) -> None:
  """Checks what a config and tasks ask of the evaluation, before a long run.

  Args:
    settings: `config.evaluate`.
    tasks: by name.

  Raises:
    ValueError: an unknown metric or label score, a target accuracy that is no share, or a length penalty of no beams.
  """
  if not 0 <= settings.target_accuracy <= 1:
    raise ValueError(f"config.evaluate.target_accuracy must be 0 (never abstain) to 1, got {settings.target_accuracy}")
  check_beams(settings.beams, settings.length_penalty, "config.evaluate.")
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


def check_beams(beams: int, length_penalty: float, where: str = "") -> None:
  """Raises a ValueError where settings of beam search do not go together; `where` stands before their names."""
  if beams < 1:
    raise ValueError(f"{where}beams must be 1 (greedy) or more, got {beams}")
  if beams == 1 and length_penalty != 1.0:
    raise ValueError(f"{where}length_penalty is of beams: set more than one, got length_penalty {length_penalty}")


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
    rows together); for generation `beams` and `length_penalty`, where answers were not greedy; for several labels a
    text `generated` and `label_sets`: how they were chosen.
    Samples are of the first `config.evaluate.samples` rows with the first template.
  """
  settings = evaluator.config.evaluate
  rows = read_task_rows(task, split)[: settings.max_examples or None]
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
      answers = evaluator.generate(prompts, None, task, settings.beams, settings.length_penalty)
      metrics, here = METRICS[task.kind](answers, rows, (), task.metrics)
    found.append(metrics)
    parts.append(here)
    outputs.append(answers)
  metrics, name = mean_of(found), headline(task.kind, task.metrics)
  metrics = {"value": metrics[name], "metric": name, **metrics}
  if len(found) > 1:
    metrics["templates"] = [one[name] for one in found]
  if task.kind == "generation" and settings.beams > 1:
    metrics |= {"beams": settings.beams, "length_penalty": settings.length_penalty}
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
  if split == "validation" or "validation" not in task.files:
    note = "measured on the validation split itself" if split == "validation" else "the task has no validation split"
    return Calibration(name, note=f"{note}: nothing was fitted", target_accuracy=settings.target_accuracy)
  rows = read_task_rows(task, "validation")[: settings.max_examples or None]
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
  written = evaluator.generate(prompts, evaluator.label_room(task, template), task)
  texts = {answer.strip(): label for answer, label in zip(label_answers(task, template), task.labels, strict=True)}
  labels = [texts.get(text) for text in written]
  right = [label == row["target"] for label, row in zip(labels, rows, strict=True)]
  return {"valid": sum(label is not None for label in labels) / len(labels), "accuracy": sum(right) / len(right)}


def room_of(answers: Sequence[Sequence[int]]) -> int:
  """Returns the bucket of tokens that the longest answer fits in."""
  return bucket(max(map(len, answers)), (4, 8, *BUCKETS))


def label_answers(task: Task, template: int) -> list[str]:
  """Returns the text of every label as the answer in a template."""
  fields = {"task": task.name, "instruction": task.instruction}
  return [fill(task.templates[template]["target"], {**fields, "target": label}) for label in task.labels]


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
  """Measures the perplexity of held-out text under the config's objective.

  Args:
    evaluator: the model.
    batches: every held-out example once, as training batches.
    count_bytes: UTF-8 bytes of the text that the targets stand for.

  Returns:
    Metrics: `value` and `perplexity` (a target token's), `bits_per_byte` (so that tokenizers compare), `n` (target
    tokens). An example of the parts is a packed row: its nats and its target tokens.

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
  return Measured({"value": value, "perplexity": value, "bits_per_byte": bits, "n": int(weight)}, parts[None])


@functools.cache
def scorer(model: Model) -> Callable:
  """The compiled `decode.score` of a model; one for each model, so that stages share it."""
  return jax.jit(partial(decode.score, model))


@functools.cache
def generator(model: Model, room: int, eos_id: int, pad_id: int) -> Callable:
  """The compiled `decode.write` of a model."""
  return jax.jit(partial(decode.write, model, room=room, eos_id=eos_id, pad_id=pad_id))


@functools.cache
def searcher(model: Model, beams: int, room: int, eos_id: int, pad_id: int, length_penalty: float) -> Callable:
  """The compiled `beam.search` of a model, without the scores."""
  settings = {"beams": beams, "room": room, "eos_id": eos_id, "pad_id": pad_id, "length_penalty": length_penalty}
  return jax.jit(lambda params, prompts: beam.search(model, params, prompts, **settings)[0])


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


def padded(sequences: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
  """Pads on the right.

  Returns:
    int32 tokens and float32 weights, both [sequences, length].

  Example:
    >>> padded([[5, 1], [7, 8, 1]], 4)[0].tolist()
    [[5, 1, 0, 0], [7, 8, 1, 0]]
  """
  tokens, weights = np.zeros((len(sequences), length), np.int32), np.zeros((len(sequences), length), np.float32)
  for i, sequence in enumerate(sequences):
    tokens[i, : len(sequence)], weights[i, : len(sequence)] = sequence, 1.0
  return tokens, weights


def bucket(length: int, sizes: Sequence[int] = BUCKETS) -> int:
  """Returns the smallest size that holds `length` (itself beyond the last).

  Example:
    >>> bucket(17), bucket(5000)
    (32, 5000)
  """
  return next((size for size in sizes if size >= length), length)


def until(tokens: list[int], eos_id: int) -> list[int]:
  """Returns what stands before the first EOS.

  Example:
    >>> until([4, 5, 1, 0, 0], eos_id=1)
    [4, 5]
  """
  return tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens


def on_mesh(batch: dict[str, np.ndarray], whole: bool = False) -> dict[str, jax.Array]:
  """Lays rows out over the current mesh; every process passes the same global arrays.

  Args:
    batch: [B,T] or [B] each.
    whole: the tokens of a row stay together, as prompts' do, whatever the size of `context`.
  """
  mesh = jax.sharding.get_mesh()

  def place(value: np.ndarray) -> jax.Array:
    layout = P(BATCH) if whole else token_spec(mesh, value.shape)
    return jax.make_array_from_callback(value.shape, NamedSharding(mesh, layout), value.__getitem__)

  return {key: place(value) for key, value in batch.items()}


def fetch(x: jax.Array) -> np.ndarray:
  """Returns a global array on this host, whichever processes hold its parts; all processes must ask for it."""
  return np.asarray(jax.device_get(x)) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
