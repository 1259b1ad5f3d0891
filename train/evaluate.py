"""Evaluation of every skill: perplexity of held-out texts, classification by label likelihood, greedy generation.

Each example counts once, whatever the batch size: batches are filled up with empty rows that count nothing. Prompts are
sorted by length into buckets, so that few shapes are compiled and little padding is computed.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from data.prompts import Frame, frame_of, render
from data.rows import Row
from data.tasks import Task, read_task_rows
from data.tokenizer import Tokenizer
from models import Model, decode
from models.sharding import BATCH
from train.loss import token_losses
from train.metrics import HEADLINES, METRICS

BUCKETS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)  # padded lengths of prompts and labels


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
    self.truncated = 0  # prompts that were cut to `longest_prompt`

  def classify(self, task: Task, texts: Sequence[str], template: int = 0) -> np.ndarray:
    """Scores every label for rendered prompts.

    Args:
      task: a classification task.
      texts: prompts from `render`.
      template: which of the task's templates, whose answers the labels are put into.

    Returns:
      float64 [texts, labels] log-probabilities of the label texts.
    """
    frame = frame_of(task, self.tokenizer)
    answers = [render(task, {"input": "", "target": label}, template)[1] for label in task.labels]
    labels = [frame.answer(self.tokenizer.encode(answer)) for answer in answers]
    tokens, weights = padded(labels, bucket(max(map(len, labels)), (4, 8, *BUCKETS)))
    run = partial(scorer(self.model), self.params)
    scores = np.zeros((len(texts), len(labels)))
    for rows, prompts in self.batches(texts, frame):
      scores[rows] = np.asarray(jax.device_get(run(prompts, tokens, weights)))[: len(rows)]
    return scores

  def generate(self, texts: Sequence[str], max_new_tokens: int | None = None, task: Task | None = None) -> list[str]:
    """Answers prompts greedily.

    Args:
      texts: prompts.
      max_new_tokens: default `config.evaluate.max_new_tokens`.
      task: the task that they are prompts of, or None.

    Returns:
      The answers, in the order of the prompts.
    """
    room, frame = max_new_tokens or self.config.evaluate.max_new_tokens, frame_of(task, self.tokenizer)
    run = partial(generator(self.model, room, self.tokenizer.eos_id, self.tokenizer.pad_id), self.params)
    answers = [""] * len(texts)
    for rows, prompts in self.batches(texts, frame):
      written = np.asarray(jax.device_get(run(prompts)))
      for row, tokens in zip(rows, written, strict=False):
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
      yield rows, on_mesh(self.model.prompts(filled, length, self.tokenizer.start_id))

  def encode(self, text: str, frame: Frame) -> list[int]:
    """Encodes a prompt; one that is too long loses its end, never its frame, and is counted."""
    tokens = self.tokenizer.encode(text)
    prompt = frame.prompt(tokens, self.longest_prompt)
    self.truncated += len(prompt) < len(frame.prompt(tokens, len(tokens) + self.longest_prompt))
    return prompt


def evaluate_task(evaluator: Evaluator, task: Task, split: str) -> tuple[dict[str, Any], list[dict[str, str]]]:
  """Measures one task, with each of its templates.

  Args:
    evaluator: the model.
    task: the task.
    split: "validation" or "test".

  Returns:
    The metrics (`value` is the task's headline: accuracy or ROUGE-L F1), means over the templates where there are
    several, then with each one's `value` under `templates`; and for each of the first `config.evaluate.samples` rows
    its input, target and output with the first template.
  """
  settings = evaluator.config.evaluate
  rows = read_task_rows(task, split)[: settings.max_examples or None]
  measured = [measure(evaluator, task, rows, template) for template in range(len(task.templates))]
  samples = [
    {"input": row["input"], "target": row["target"], "output": output}
    for row, output in zip(rows[: settings.samples], measured[0][1], strict=False)
  ]
  metrics = mean_of([found for found, _ in measured])
  name = HEADLINES[task.kind]
  each = {"templates": [found[name] for found, _ in measured]} if len(measured) > 1 else {}
  return {"value": metrics[name], **metrics, **each}, samples


def measure(evaluator: Evaluator, task: Task, rows: Sequence[Row], template: int) -> tuple[dict[str, Any], list[str]]:
  """Returns a task's metrics with one template, and the outputs."""
  prompts, targets = zip(*(render(task, row, template) for row in rows), strict=True)
  if task.kind == "classification":
    best = evaluator.classify(task, prompts, template).argmax(axis=1)
    outputs = [task.labels[i] for i in best]
    return METRICS[task.kind](outputs, [row["target"] for row in rows], task.labels), outputs
  outputs = evaluator.generate(prompts, task=task)
  return METRICS[task.kind](outputs, targets), outputs


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


def perplexity(evaluator: Evaluator, batches: Iterator[dict[str, np.ndarray]], count_bytes: int) -> dict[str, float]:
  """Measures the perplexity of held-out text under the config's objective.

  Args:
    evaluator: the model.
    batches: every held-out example once, as training batches.
    count_bytes: UTF-8 bytes of the text that the targets stand for.

  Returns:
    `value` and `perplexity` (a target token's), `bits_per_byte` (so that tokenizers compare), `n` (target tokens).
  """
  run = partial(summer(evaluator.model, evaluator.config.train.loss_chunk_tokens), evaluator.params)
  nll = weight = 0.0
  for batch in batches:
    sums = jax.device_get(run(on_mesh(batch)))
    nll, weight = nll + float(sums[0]), weight + float(sums[1])
  if not weight:
    raise ValueError("the held-out text has no target tokens; give a longer corpus_validation.jsonl")
  value = math.exp(min(nll / weight, 700.0))
  return {"value": value, "perplexity": value, "bits_per_byte": nll / math.log(2) / count_bytes, "n": int(weight)}


@functools.cache
def scorer(model: Model) -> Callable:
  """The compiled `decode.score` of a model; one for each model, so that stages share it."""
  return jax.jit(partial(decode.score, model))


@functools.cache
def generator(model: Model, room: int, eos_id: int, pad_id: int) -> Callable:
  """The compiled `decode.greedy` of a model."""
  return jax.jit(partial(decode.greedy, model, room=room, eos_id=eos_id, pad_id=pad_id))


@functools.cache
def summer(model: Model, chunk_tokens: int) -> Callable:
  """The compiled `(params, batch) -> (nll sum, weight sum)` of a model."""

  def sums(params, batch):
    weights, targets = batch["decoder_loss_weights"], batch["decoder_target_tokens"]
    features, head = model.features(params, batch), model.head(params)
    settings = {"vocab_size": model.config.vocab_size, "chunk_tokens": chunk_tokens, "logit_cap": model.logit_cap}
    total, _ = token_losses(features, head, targets, weights, **settings)
    return total, weights.sum()

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


def on_mesh(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """Lays rows out over the current mesh; every process passes the same global arrays."""
  mesh = jax.sharding.get_mesh()
  return {
    key: jax.make_array_from_callback(value.shape, NamedSharding(mesh, P(BATCH)), value.__getitem__)
    for key, value in batch.items()
  }
