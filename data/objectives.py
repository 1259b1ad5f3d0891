"""Objectives: what a piece of unlabelled text asks of the model: tokens in, (inputs, targets) out.

Every targets sequence ends in EOS where its text ends; non-empty inputs end in EOS.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class ObjectiveSettings(NamedTuple):
  """What an objective needs to know.

  Attributes:
    eos_id: end of sequence.
    sentinel_ids: the first hidden span's sentinel first.
    noise_density: share of tokens to hide.
    mean_span_length: tokens in a hidden span, on average.
  """

  eos_id: int
  sentinel_ids: tuple[int, ...] = ()
  noise_density: float = 0.15
  mean_span_length: float = 3.0


Pair = tuple[np.ndarray, np.ndarray]


def next_token(tokens: np.ndarray, rng: np.random.Generator, settings: ObjectiveSettings, ends: bool = True) -> Pair:
  """Predict each token from those before it: no inputs, the text as targets.

  Args:
    tokens: int32 [n] piece of a document.
    rng: unused.
    settings: see `ObjectiveSettings`.
    ends: the piece is its document's last, so EOS follows.

  Returns:
    Empty inputs, and the targets.

  Example:
    >>> settings = ObjectiveSettings(eos_id=1)
    >>> [x.tolist() for x in next_token(np.array([7, 8], np.int32), np.random.default_rng(0), settings)]
    [[], [7, 8, 1]]
  """
  del rng
  end = [settings.eos_id] if ends else []
  return np.zeros(0, np.int32), np.concatenate([tokens, np.array(end, np.int32)]).astype(np.int32)


def span_corruption(
  tokens: np.ndarray, rng: np.random.Generator, settings: ObjectiveSettings, ends: bool = True
) -> Pair:
  """Hide spans, each behind a sentinel; the targets are the hidden spans, each after its sentinel (T5).

  Args:
    tokens: int32 [n] piece of a document.
    rng: draws the spans.
    settings: see `ObjectiveSettings`.
    ends: unused; both sides end in EOS, as in T5.

  Returns:
    Inputs and targets, both with EOS.

  Raises:
    ValueError: more spans than sentinels.

  Reference:
    Raffel et al. 2020, §3.1.4.

  Example:
    >>> mask = np.array([True, True, False, False, True, False])
    >>> pair = hide_spans(np.arange(10, 16, dtype=np.int32), mask, ObjectiveSettings(1, (999, 998)))
    >>> [x.tolist() for x in pair]
    [[999, 12, 13, 998, 15, 1], [999, 10, 11, 998, 14, 1]]
  """
  del ends
  mask = noise_mask(len(tokens), settings.noise_density, settings.mean_span_length, rng)
  return hide_spans(tokens, mask, settings)


OBJECTIVES: dict[str, Callable[..., Pair]] = {"next_token": next_token, "span_corruption": span_corruption}


def hide_spans(tokens: np.ndarray, mask: np.ndarray, settings: ObjectiveSettings) -> Pair:
  """Splits tokens into inputs and targets by a noise mask; see `span_corruption`."""
  starts = mask & ~np.concatenate([[False], mask[:-1]])
  spans = int(starts.sum())
  if spans > len(settings.sentinel_ids):
    raise ValueError(
      f"{len(tokens)} tokens need {spans} sentinels, the tokenizer has {len(settings.sentinel_ids)}; shorten the rows, "
      "raise data.mean_span_length or train a tokenizer with more sentinels"
    )
  sentinels = np.asarray(settings.sentinel_ids, np.int32)
  eos = np.array([settings.eos_id], np.int32)
  kept = np.where(starts, sentinels[np.maximum(np.cumsum(starts) - 1, 0)] if spans else 0, tokens)[~mask | starts]
  # In the targets each span is preceded by its sentinel: insert it before the span's first token.
  targets = np.insert(tokens[mask], np.flatnonzero(starts[mask]), sentinels[:spans])
  return np.concatenate([kept, eos]).astype(np.int32), np.concatenate([targets, eos]).astype(np.int32)


def noise_mask(length: int, density: float, mean_span: float, rng: np.random.Generator) -> np.ndarray:
  """Draws which tokens are hidden: spans of noise and text alternate, text first, noise last.

  Args:
    length: tokens.
    density: share to hide; exactly `round(length · density)` are (at least 1, at most all but one).
    mean_span: mean length of a hidden span.
    rng: draws where spans begin.

  Returns:
    bool [length].
  """
  noise, spans = _noise_counts(length, density, mean_span)
  if not noise:
    return np.zeros(length, bool)
  lengths = np.stack([_partition(length - noise, spans, rng), _partition(noise, spans, rng)], axis=1).reshape(-1)
  return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def _noise_counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
  """Returns hidden tokens and spans, such that text and noise can alternate: at least one token before each span."""
  if density <= 0.0 or length < 2:
    return 0, 0
  noise = min(max(round(length * density), 1), length - 1)
  return noise, min(max(round(noise / mean_span), 1), noise, length - noise)


def _partition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
  """Draws `parts` positive lengths that add up to `total`, uniformly."""
  first = rng.permutation(np.arange(total - 1) < parts - 1)
  return np.bincount(np.cumsum(np.concatenate([[False], first])), minlength=parts)


def corrupted_lengths(length: int, density: float, mean_span: float) -> tuple[int, int]:
  """Returns the lengths of inputs and targets (EOS included) that `length` tokens give, by T5's arithmetic.

  Example:
    >>> corrupted_lengths(568, 0.15, 3.0)
    (512, 114)
  """
  noise = round(length * density)
  spans = max(round(noise / mean_span), 1) if noise else 0
  return length - noise + spans + 1, noise + spans + 1


def raw_length(
  objective: str, architecture: str, encoder_length: int, decoder_length: int, settings: ObjectiveSettings
) -> int:
  """Returns how many tokens a piece may have so that it fills a row and does not overflow it.

  Args:
    objective: a name in `OBJECTIVES`.
    architecture: "t5" (inputs in the encoder's row) or "gpt" (inputs and targets in one row).
    encoder_length: tokens in an encoder row.
    decoder_length: tokens in a decoder row.
    settings: see `ObjectiveSettings`; a piece has no more spans than there are sentinels (none given: no limit).

  Raises:
    ValueError: unknown objective, or rows too short for any text.

  Reference:
    `random_spans_helper` of T5, whose lengths these are; at density 0.5 it keeps targets no longer than inputs.

  Example:
    >>> raw_length("span_corruption", "t5", 512, 114, ObjectiveSettings(1))
    568
  """
  if objective not in OBJECTIVES:
    raise ValueError(f"config.data.objective is {objective!r}; known: {sorted(OBJECTIVES)}")
  if objective == "next_token":
    length = decoder_length - 1  # and EOS
  else:
    length = _longest(architecture, encoder_length, decoder_length, settings)
  if length < 2:
    raise ValueError(f"rows of {encoder_length} and {decoder_length} tokens are too short for {objective}")
  return length


def _longest(architecture: str, encoder_length: int, decoder_length: int, settings: ObjectiveSettings) -> int:
  def lengths(length: int) -> tuple[int, int]:
    return corrupted_lengths(length, settings.noise_density, settings.mean_span_length)

  def fits(length: int) -> bool:
    inputs, targets = lengths(length)
    if settings.sentinel_ids and targets - 1 - round(length * settings.noise_density) > len(settings.sentinel_ids):
      return False
    if architecture == "t5":
      return inputs <= encoder_length and targets <= decoder_length
    return inputs + targets <= decoder_length

  length = 1
  while fits(length + 1):
    length += 1
  inputs, targets = lengths(length)
  return length - 1 if settings.noise_density == 0.5 and architecture == "t5" and targets > inputs else length
