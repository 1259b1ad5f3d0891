"""Converters: (inputs, targets) pairs, packed in rows, to the Batch that a model reads; one for each architecture.

A Batch is a dict of arrays under SeqIO's names: int32, loss weights float32; B rows, T decoder, S encoder length.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Batch = dict[str, np.ndarray]


class Example(NamedTuple):
  """One (inputs, targets) pair.

  Attributes:
    inputs: int32, EOS included; may be empty.
    targets: int32.
    task_id: index of its task or source in the stream's `task_names`.
    usual: target tokens of an example of that source, on average; what "task" normalises by.
  """

  inputs: np.ndarray
  targets: np.ndarray
  task_id: int = 0
  usual: float = 1.0


# Of the loss: what each target token of an example weighs.
NORMALISATIONS: dict[str, Callable[[Example], float]] = {
  "token": lambda example: 1.0,
  "example": lambda example: 1.0 / len(example.targets),
  "task": lambda example: 1.0 / example.usual,
}


class Layout(NamedTuple):
  """The form of a batch.

  Attributes:
    architecture: "t5" or "gpt".
    encoder_length: S (t5).
    decoder_length: T.
    start_id: what a decoder sequence starts from.
    eos_id: stands in for empty inputs of an encoder, which must have something to read.
    loss_normalisation: a name in `NORMALISATIONS`: "token" (each target token weighs 1), "example" (each example
      weighs 1) or "task" (each example weighs 1 on average over its source, and a source's tokens weigh the same).
    bidirectional_prefix: gpt: flags inputs as visible in both directions.
  """

  architecture: str
  encoder_length: int
  decoder_length: int
  start_id: int
  eos_id: int
  loss_normalisation: str = "token"
  bidirectional_prefix: bool = False


Row = Sequence[Example]


def encoder_decoder(rows: Sequence[Row], layout: Layout) -> Batch:
  """Inputs to the encoder, targets to the decoder; example k of a row is segment k on both sides.

  Args:
    rows: the examples of each row; they fit.
    layout: see `Layout`.

  Returns:
    The Batch.

  Example:
    >>> layout = Layout("t5", 4, 4, start_id=0, eos_id=1)
    >>> batch = encoder_decoder([[Example([7, 1], [3, 1]), Example([8, 1], [4, 1])]], layout)
    >>> [batch[key][0].tolist() for key in ("encoder_input_tokens", "decoder_target_tokens", "decoder_input_tokens")]
    [[7, 1, 8, 1], [3, 1, 4, 1], [0, 3, 0, 4]]
  """
  batch = _empty(len(rows), layout)
  for r, row in enumerate(rows):
    read = written = 0
    for segment, example in enumerate(row, 1):
      inputs = example.inputs if len(example.inputs) else [layout.eos_id]
      here = slice(read, read := read + len(inputs))
      batch["encoder_input_tokens"][r, here] = inputs
      batch["encoder_positions"][r, here] = np.arange(len(inputs))
      batch["encoder_segment_ids"][r, here] = segment
      here = slice(written, written := written + len(example.targets))
      _write_decoder(batch, r, here, segment, example.targets, example, layout)
  return batch


def decoder_only(rows: Sequence[Row], layout: Layout) -> Batch:
  """Inputs and targets one after the other, loss on the targets.

  Args:
    rows: the examples of each row; they fit.
    layout: see `Layout`.

  Returns:
    The Batch; with `bidirectional_prefix` also `decoder_bidirectional`, 1 on the inputs and on the position that
    predicts the first target.

  Example:
    >>> batch = decoder_only([[Example([7, 1], [3, 1])]], Layout("gpt", 0, 5, start_id=0, eos_id=1))
    >>> [batch[key][0].tolist() for key in ("decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights")]
    [[0, 7, 1, 3, 0], [7, 1, 3, 1, 0], [0.0, 0.0, 1.0, 1.0, 0.0]]
  """
  batch = _empty(len(rows), layout)
  for r, row in enumerate(rows):
    begin = 0
    for segment, example in enumerate(row, 1):
      tokens = np.concatenate([example.inputs, example.targets])
      here = slice(begin, begin + len(tokens))
      _write_decoder(batch, r, here, segment, tokens, example, layout)
      prefix = len(example.inputs)
      batch["decoder_loss_weights"][r, begin : begin + prefix] = 0.0
      if layout.bidirectional_prefix and prefix:
        batch["decoder_bidirectional"][r, begin : begin + prefix + 1] = 1
      begin += len(tokens)
  return batch


CONVERTERS: dict[str, Callable[[Sequence[Row], Layout], Batch]] = {"t5": encoder_decoder, "gpt": decoder_only}


def cost(example: Example, architecture: str) -> tuple[int, ...]:
  """Returns how many tokens an example takes of each kind of row: (encoder, decoder) for t5, (decoder,) for gpt."""
  if architecture == "t5":
    return max(len(example.inputs), 1), len(example.targets)
  return (len(example.inputs) + len(example.targets),)


def capacity(layout: Layout) -> tuple[int, ...]:
  """Returns what a row holds, in the terms of `cost`."""
  if layout.architecture == "t5":
    return layout.encoder_length, layout.decoder_length
  return (layout.decoder_length,)


def _empty(rows: int, layout: Layout) -> Batch:
  def zeros(length: int, dtype: type = np.int32) -> np.ndarray:
    return np.zeros((rows, length), dtype)

  length = layout.decoder_length
  keys = ["input_tokens", "target_tokens", "positions", "segment_ids"]
  batch = {f"decoder_{key}": zeros(length) for key in keys}
  batch["decoder_loss_weights"] = zeros(length, np.float32)
  batch["task_ids"] = np.full((rows, length), -1, np.int32)
  if layout.architecture == "t5":
    keys = ["input_tokens", "positions", "segment_ids"]
    batch |= {f"encoder_{key}": zeros(layout.encoder_length) for key in keys}
  elif layout.bidirectional_prefix:
    batch["decoder_bidirectional"] = zeros(length)
  return batch


def _write_decoder(batch: Batch, r: int, here: slice, segment: int, tokens, example: Example, layout: Layout) -> None:
  batch["decoder_target_tokens"][r, here] = tokens
  # A sequence starts from start_id, not from its neighbour's last token.
  batch["decoder_input_tokens"][r, here] = np.concatenate([[layout.start_id], tokens[:-1]])
  batch["decoder_positions"][r, here] = np.arange(len(tokens))
  batch["decoder_segment_ids"][r, here] = segment
  batch["decoder_loss_weights"][r, here] = NORMALISATIONS[layout.loss_normalisation](example)
  batch["task_ids"][r, here] = example.task_id
