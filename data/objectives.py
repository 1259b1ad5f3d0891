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
    mode_ids: ul2: what inputs begin with under its R, X and S denoisers, see `MODES`.
  """

  eos_id: int
  sentinel_ids: tuple[int, ...] = ()
  noise_density: float = 0.15
  mean_span_length: float = 3.0
  mode_ids: tuple[tuple[int, ...], ...] = ((), (), ())


MODES = ("[NLU]", "[NLG]", "[S2S]")  # UL2's names for R, X and S
UL2_DENOISERS: tuple[tuple[int, float, float], ...] = (
  # (mode, noise density, mean span length); mode 2 is the prefix, whose last quarter is hidden
  (0, 0.15, 3.0),
  (0, 0.15, 8.0),
  (1, 0.5, 3.0),
  (1, 0.5, 8.0),
  (1, 0.15, 64.0),
  (1, 0.5, 64.0),
  (2, 0.25, 0.0),
)

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


def text_infilling(
  tokens: np.ndarray, rng: np.random.Generator, settings: ObjectiveSettings, ends: bool = True
) -> Pair:
  """Hide spans, each behind a sentinel; the targets are the whole text (BART), which teaches to copy, too.

  Args:
    tokens: int32 [n] piece of a document.
    rng: draws the spans.
    settings: see `ObjectiveSettings`.
    ends: unused; both sides end in EOS.

  Returns:
    Inputs as under `span_corruption`, and the text, both with EOS.

  Raises:
    ValueError: more spans than sentinels.

  Reference:
    Lewis et al. 2020, §2.2 (the task); Raffel et al. 2020, §3.1.4 (the spans, and a sentinel for each in place of one
    mask token).

  Example:
    >>> settings = ObjectiveSettings(1, (999, 998), noise_density=0.5)
    >>> pair = text_infilling(np.arange(10, 16, dtype=np.int32), np.random.default_rng(0), settings)
    >>> [x.tolist() for x in pair]
    [[10, 11, 12, 999, 1], [10, 11, 12, 13, 14, 15, 1]]
  """
  inputs, _ = span_corruption(tokens, rng, settings, ends)
  return inputs, np.append(tokens, settings.eos_id).astype(np.int32)


def masked_lm(tokens: np.ndarray, rng: np.random.Generator, settings: ObjectiveSettings, ends: bool = True) -> Pair:
  """Hide single tokens, each behind a sentinel of its own; the targets fill in the masks.

  Unlike the spans of `span_corruption`, hidden tokens are drawn one by one and may be neighbours.

  Args:
    tokens: int32 [n] piece of a document.
    rng: draws the tokens; exactly `round(n · noise_density)` (at least 1, at most all but one).
    settings: see `ObjectiveSettings`.
    ends: unused; both sides end in EOS.

  Returns:
    Inputs and targets, both with EOS.

  Raises:
    ValueError: more hidden tokens than sentinels.

  Reference:
    Devlin et al. 2019, §3.1 (noise); Raffel et al. 2020, §3.3.2 (sentinels in place of one mask token).

  Example:
    >>> settings = ObjectiveSettings(1, (999, 998, 997), noise_density=0.5)
    >>> pair = masked_lm(np.arange(10, 16, dtype=np.int32), np.random.default_rng(1), settings)
    >>> [x.tolist() for x in pair]
    [[999, 11, 998, 13, 997, 15, 1], [999, 10, 998, 12, 997, 14, 1]]
  """
  del ends
  hidden = min(max(round(len(tokens) * settings.noise_density), 1), len(tokens) - 1)
  mask = np.zeros(len(tokens), bool)
  mask[rng.permutation(len(tokens))[:hidden]] = True
  return hide_spans(tokens, mask, settings, starts=mask)


def prefix_lm(tokens: np.ndarray, rng: np.random.Generator, settings: ObjectiveSettings, ends: bool = True) -> Pair:
  """Go on from a prefix: the text before a random cut is inputs, the rest targets.

  Args:
    tokens: int32 [n] piece of a document; a single token has no cut and is all targets.
    rng: draws the cut, every place equally likely.
    settings: see `ObjectiveSettings`.
    ends: the piece is its document's last, so that its targets end in EOS.

  Returns:
    Inputs with EOS, and the targets.

  Reference:
    Raffel et al. 2020, §3.2.1.

  Example:
    >>> pair = prefix_lm(np.arange(10, 16, dtype=np.int32), np.random.default_rng(0), ObjectiveSettings(1))
    >>> [x.tolist() for x in pair]
    [[10, 11, 12, 13, 14, 1], [15, 1]]
  """
  return _cut(tokens, int(rng.integers(1, max(len(tokens), 2))), settings, ends)


def _cut(tokens: np.ndarray, where: int, settings: ObjectiveSettings, ends: bool) -> Pair:
  eos = np.array([settings.eos_id], np.int32)
  where = min(where, len(tokens) - 1)
  inputs = np.concatenate([tokens[:where], eos]) if where > 0 else tokens[:0]
  return inputs.astype(np.int32), np.concatenate([tokens[max(where, 0) :], eos if ends else eos[:0]]).astype(np.int32)


def fill_in_the_middle(
  tokens: np.ndarray, rng: np.random.Generator, settings: ObjectiveSettings, ends: bool = True
) -> Pair:
  """Write the middle between a prefix and a suffix: one long hidden span, cut at two random places.

  The hidden middle stands behind the first sentinel, in inputs and targets, as under `span_corruption`: what fills
  one `<extra_id_0>` after training fills it here.

  Args:
    tokens: int32 [n] piece of a document.
    rng: draws the two cuts, every pair equally likely; the middle is never empty.
    settings: see `ObjectiveSettings`.
    ends: unused; both sides end in EOS.

  Returns:
    Inputs `prefix sentinel suffix EOS` and targets `sentinel middle EOS`.

  Reference:
    Bavarian et al. 2022, §3 (the cuts; not its special tokens, which published models differ in).

  Example:
    >>> settings = ObjectiveSettings(1, (999,))
    >>> pair = fill_in_the_middle(np.arange(10, 16, dtype=np.int32), np.random.default_rng(1), settings)
    >>> [x.tolist() for x in pair]
    [[10, 11, 999, 13, 14, 15, 1], [999, 12, 1]]
  """
  del ends
  begin, end = sorted(rng.choice(len(tokens) + 1, 2, replace=False))
  place = np.arange(len(tokens))
  return hide_spans(tokens, (begin <= place) & (place < end), settings)


def ul2(tokens: np.ndarray, rng: np.random.Generator, settings: ObjectiveSettings, ends: bool = True) -> Pair:
  """A mixture of denoisers, named by a mode prefix: regular and extreme span corruption, and a sequential prefix.

  Args:
    tokens: int32 [n] piece of a document.
    rng: draws the denoiser, all of `UL2_DENOISERS` equally likely, and its noise.
    settings: see `ObjectiveSettings`; the denoisers bring their own density and span length.
    ends: see `prefix_lm`.

  Returns:
    Inputs, the mode's tokens first, and targets.

  Reference:
    Tay et al. 2022, §3.1 and Table 1.

  Example:
    >>> settings = ObjectiveSettings(1, (999, 998), mode_ids=((50,), (51,), (52,)))
    >>> pair = ul2(np.arange(10, 18, dtype=np.int32), np.random.default_rng(7), settings)
    >>> [x.tolist() for x in pair]
    [[52, 10, 11, 12, 13, 14, 15, 1], [16, 17, 1]]
  """
  mode, density, mean = UL2_DENOISERS[rng.integers(len(UL2_DENOISERS))]
  if mean:
    inputs, targets = span_corruption(
      tokens, rng, settings._replace(noise_density=density, mean_span_length=mean), ends
    )
  else:
    inputs, targets = _cut(tokens, len(tokens) - max(round(len(tokens) * density), 1), settings, ends)
    inputs = inputs if len(inputs) else np.array([settings.eos_id], np.int32)  # the mode alone is inputs, too
  return np.concatenate([np.array(settings.mode_ids[mode], np.int32), inputs]), targets


def hide_spans(
  tokens: np.ndarray, mask: np.ndarray, settings: ObjectiveSettings, starts: np.ndarray | None = None
) -> Pair:
  """Splits tokens into inputs and targets by a noise mask; see `span_corruption`.

  Args:
    tokens: int32 [n].
    mask: bool [n], the hidden ones.
    settings: see `ObjectiveSettings`.
    starts: bool [n], the hidden tokens that get a sentinel; default the first of each run.

  Raises:
    ValueError: more of those than sentinels.
  """
  starts = mask & ~np.concatenate([[False], mask[:-1]]) if starts is None else starts
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
  noise = max(round(length * density), 1) if density else 0  # as `noise_mask` hides
  spans = max(round(noise / mean_span), 1) if noise else 0
  return length - noise + spans + 1, noise + spans + 1


class Lengths(NamedTuple):
  """The most tokens that pieces of one length become.

  Attributes:
    inputs: EOS included; what stands in for empty inputs counts, too.
    targets: EOS included.
    both: inputs and targets of one example together.
    sentinels: needed.
  """

  inputs: int
  targets: int
  both: int
  sentinels: int = 0


def _span_lengths(length: int, settings: ObjectiveSettings) -> Lengths:
  inputs, targets = corrupted_lengths(length, settings.noise_density, settings.mean_span_length)
  return Lengths(inputs, targets, inputs + targets, (inputs + targets - 2 - length) // 2)


def _masked_lengths(length: int, settings: ObjectiveSettings) -> Lengths:
  hidden = max(round(length * settings.noise_density), 1)
  return Lengths(length + 1, 2 * hidden + 1, length + 2 * hidden + 2, hidden)


def _infilling_lengths(length: int, settings: ObjectiveSettings) -> Lengths:
  spans = _span_lengths(length, settings)
  inputs = max(spans.inputs, 3)  # one token stays, and another is hidden behind a sentinel, however high the density
  return Lengths(inputs, length + 1, inputs + length + 1, spans.sentinels)


def _ul2_lengths(length: int, settings: ObjectiveSettings) -> Lengths:
  each = []
  for mode, density, mean in UL2_DENOISERS:
    begin, hidden = len(settings.mode_ids[mode]), max(round(length * density), 1)
    if mean:
      lengths = _span_lengths(length, settings._replace(noise_density=density, mean_span_length=mean))
    else:
      lengths = Lengths(length - hidden + 1, hidden + 1, length + 2)
    each.append(lengths._replace(inputs=lengths.inputs + begin, both=lengths.both + begin))
  return Lengths(*(max(values) for values in zip(*each, strict=True)))


class Objective(NamedTuple):
  """An objective.

  Attributes:
    make: `(tokens, rng, settings, ends) -> (inputs, targets)`.
    lengths: `(tokens in a piece, settings) -> Lengths`.
  """

  make: Callable[[np.ndarray, np.random.Generator, ObjectiveSettings, bool], Pair]
  lengths: Callable[[int, ObjectiveSettings], Lengths]


OBJECTIVES: dict[str, Objective] = {
  "next_token": Objective(next_token, lambda n, _: Lengths(1, n + 1, n + 1)),
  "prefix_lm": Objective(prefix_lm, lambda n, _: Lengths(n, n, n + 2)),
  "span_corruption": Objective(span_corruption, _span_lengths),
  "text_infilling": Objective(text_infilling, _infilling_lengths),
  "masked_lm": Objective(masked_lm, _masked_lengths),
  "ul2": Objective(ul2, _ul2_lengths),
  "fill_in_the_middle": Objective(fill_in_the_middle, lambda n, _: Lengths(n + 1, n + 2, n + 4, 1)),
}


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
  lengths = OBJECTIVES[objective].lengths

  def fits(length: int) -> bool:
    most = lengths(length, settings)
    if settings.sentinel_ids and most.sentinels > len(settings.sentinel_ids):
      return False
    if architecture == "t5":
      return most.inputs <= encoder_length and most.targets <= decoder_length
    return most.both <= decoder_length

  length = 1
  while fits(length + 1):
    length += 1
  most = lengths(length, settings)
  if objective == "span_corruption" and settings.noise_density == 0.5 and architecture == "t5":
    length -= most.targets > most.inputs
  if length < 2:
    raise ValueError(f"rows of {encoder_length} and {decoder_length} tokens are too short for {objective}")
  return length
