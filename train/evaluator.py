"""A model that is asked, in batches of few shapes: its labels scored here, its texts written in `train/generate.py`.

Prompts are sorted by length into buckets, so that few shapes are compiled and little padding is computed; batches are
filled up with empty rows, whose answers nobody gets.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from data.prompts import Frame, fill, frame_of, render, template_fields
from data.tasks import Task
from data.tokenizer import Tokenizer
from models import MODELS, Model, beam, decode
from models.model import learned_positions
from models.sharding import fetch, on_mesh, whole_batch
from train.calibration import LABEL_SCORES
from train.log import time_left
from train.processes import is_first

BUCKETS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)  # padded lengths of prompts and labels
NOT_FOR_PROMPTS = ("cudnn", "splash")  # attention paths that take not every length, or not on every device
PROGRESS_SECONDS = 20  # between two lines that say how far a long series of prompts is


class Evaluator:
  """A model with its tokenizer, ready to be asked.

  Args:
    config: `evaluate` and `data` lengths are read.
    model: the model.
    params: its parameters, on the current mesh (`jax.set_mesh`).
    tokenizer: its tokenizer.
  """

  def __init__(self, config: ConfigDict, model: Model, params: Any, tokenizer: Tokenizer):
    if model.config.attention in NOT_FOR_PROMPTS:
      model = with_auto_attention(config.architecture, config.model.size, model.config)
    self.config, self.model, self.params, self.tokenizer = config, model, params, tokenizer
    t5 = config.architecture == "t5"
    self.row = config.data.encoder_length if t5 else config.data.decoder_length  # tokens of the row that a prompt is in
    self.cut: set[tuple[str, Frame]] = set()  # prompts that were cut

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
    for rows, prompts in self.batches(texts, frame, max(map(len, labels)), task):
      scores[rows] = fetch(run(prompts, tokens, weights))[: len(rows)]
    return scores

  @property
  def counts_examples(self) -> bool:
    """Whether the model learned that examples, not tokens, weigh the same.

    By such a loss a text of n tokens is 1/n times as likely as it is right (see `data/features.py`).
    """
    return self.config.data.loss_normalisation == "example"

  def likelihoods(self, task: Task, texts: Sequence[str], template: int) -> np.ndarray:
    """Returns how likely each label is right by the model, in nats: `classify`, made good for what its loss took."""
    scores = self.classify(task, texts, template)
    return scores + np.log(self.label_sizes(task, template)) if self.counts_examples else scores

  def label_sizes(self, task: Task, template: int) -> np.ndarray:
    """Returns the tokens of every label, int [labels]; see `label_tokens`."""
    return np.array([len(label) for label in self.label_tokens(task, template)])

  def label_tokens(self, task: Task, template: int) -> list[list[int]]:
    """Returns the tokens of every label as the answer in a template, with what stands around an answer."""
    frame = frame_of(task, self.tokenizer)
    return [frame.answer(self.tokenizer.encode(answer)) for answer in label_answers(task, template)]

  def label_room(self, task: Task, template: int) -> int:
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
    sums = self.likelihoods(task, [*texts, nothing], template)  # in one batch: a shape of its own would be compiled
    tokens = self.label_sizes(task, template)
    return {name: score(sums[:-1], tokens, sums[-1]) for name, score in LABEL_SCORES.items()}

  def frame(self, task: Task | None) -> Frame:
    """Returns what stands around a task's prompts; without one, a GPT that goes on with texts goes on with a prompt."""
    return frame_of(task, self.tokenizer, continues=goes_on(self.config))

  def longest_prompt(self, answer: int) -> int:
    """Returns the most tokens of a prompt that an answer of up to so many follows.

    A decoder-only model's answer is in the same row, as in training: beyond it are positions that were never learned. A
    prompt always has half of the row, however long the answer may be.

    Raises:
      ValueError: an answer that learned positions leave no room for.
    """
    if self.config.architecture == "t5":
      return self.row
    longest, positions = self.row - min(answer, self.row // 2), learned_positions(self.model)
    if positions and answer >= positions:
      raise ValueError(
        f"an answer of up to {answer} tokens (max_new_tokens) leaves no room for a prompt: the model has learned "
        f"positions for {positions} tokens in all; ask for less"
      )
    return min(longest, positions - answer) if positions else longest

  def batches(
    self, texts: Sequence[str], frame: Frame, answer: int, task: Task | None = None, size: int = 0
  ) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
    """Yields the numbers of a batch's prompts and the padded batch; short prompts first.

    What takes long says now and then how far it is, on stderr, for answers may go to stdout.

    Args:
      texts: prompts.
      frame: what stands around them.
      answer: most tokens of an answer, see `longest_prompt`.
      task: the task that they are prompts of, or None.
      size: prompts in a batch, which divide over the mesh; 0 = `config.evaluate.batch_size`, rounded up to that.
    """
    longest = self.longest_prompt(answer)
    encoded = [self.encode(text, frame, longest) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))
    size = size or whole_batch(self.config.evaluate.batch_size)
    began = said = time.monotonic()
    for begin in range(0, len(order), size):
      rows = order[begin : begin + size]
      filled = [encoded[i] for i in rows] + [[self.tokenizer.eos_id]] * (size - len(rows))
      length = min(bucket(max(map(len, filled))), longest)
      prompts = self.model.prompts(filled, length, self.tokenizer.start_id)
      if self.config.data.bidirectional_prefix and self.config.architecture == "gpt" and frame.after:
        prompts["bidirectional"] = prompts["segments"]
      yield rows, on_mesh(prompts, whole=True)
      done, now = begin + len(rows), time.monotonic()
      if now - said > PROGRESS_SECONDS and done < len(order) and is_first():
        said, rate = now, done / (now - began)
        line = f"{task.name if task else 'prompts'}: {done:,}/{len(order):,}, {rate:,.1f} a second"
        print(f"{line}, {time_left((len(order) - done) / rate)}", file=sys.stderr, flush=True)

  def encode(self, text: str, frame: Frame, longest: int) -> list[int]:
    """Encodes a prompt; one of more than `longest` tokens is cut, see `Frame.prompt`, and is counted."""
    tokens = self.tokenizer.encode(text)
    prompt = frame.prompt(tokens, longest)
    if len(prompt) < len(frame.prompt(tokens, len(tokens) + longest)):
      self.cut.add((text, frame))  # a prompt that is asked twice counts once
    return prompt


def goes_on(config: ConfigDict) -> bool:
  """Says whether a model of this config was trained to go on with a text."""
  return config.architecture == "gpt" and config.data.objective == "next_token"


def room_of(answers: Sequence[Sequence[int]]) -> int:
  """Returns the bucket of tokens that the longest answer fits in."""
  return bucket(max(map(len, answers)), (4, 8, *BUCKETS))


def label_answers(task: Task, template: int) -> list[str]:
  """Returns the text of every label as the answer in a template."""
  fields = {"task": task.name, "instruction": task.instruction}
  return [fill(task.templates[template]["target"], {**fields, "target": label}) for label in task.labels]


@functools.cache
def with_auto_attention(architecture: str, size: str, config: Any) -> Model:
  """Returns the model with attention picked for what is asked; one for each config, so that programs are shared."""
  return MODELS[architecture](size, **dataclasses.asdict(config) | {"attention": "auto", "attention_block": 0})


@functools.cache
def scorer(model: Model) -> Callable:
  """The compiled `decode.score` of a model; one for each model, so that stages share it."""
  return jax.jit(partial(decode.score, model))


@functools.cache
def searcher(model: Model, beams: int, room: int, eos_id: int, pad_id: int, length_penalty: float) -> Callable:
  """The compiled `beam.search` of a model, without the scores."""
  settings = {"beams": beams, "room": room, "eos_id": eos_id, "pad_id": pad_id, "length_penalty": length_penalty}
  return jax.jit(lambda params, prompts: beam.search(model, params, prompts, **settings)[0])


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
