"""Objectives: T5's arithmetic exactly, and nothing of the text lost."""

import numpy as np
import pytest

from data.objectives import (
  OBJECTIVES,
  ObjectiveSettings,
  corrupted_lengths,
  hide_spans,
  noise_mask,
  raw_length,
)

FREE = ObjectiveSettings(eos_id=1)


@pytest.mark.parametrize(
  ("inputs", "raw", "targets"),
  [(16, 17, 5), (32, 34, 8), (64, 70, 14), (100, 110, 22), (114, 126, 26), (128, 141, 29), (256, 284, 58)]
  + [(512, 568, 114), (1024, 1137, 229), (2048, 2274, 456), (4096, 4550, 910)],
)
def test_lengths_are_those_of_t5(inputs, raw, targets):
  assert raw_length("span_corruption", "t5", inputs, 10_000, FREE) == raw
  assert corrupted_lengths(raw, 0.15, 3.0) == (inputs, targets)


@pytest.mark.parametrize(
  ("density", "mean", "raw", "targets"),
  [(0.15, 8, 588, 100), (0.5, 3, 766, 512), (0.5, 8, 908, 512), (0.15, 64, 600, 92), (0.5, 64, 1006, 512)],
)
def test_lengths_are_those_of_ul2(density, mean, raw, targets):
  settings = FREE._replace(noise_density=density, mean_span_length=mean)
  assert raw_length("span_corruption", "t5", 512, 10_000, settings) == raw
  assert corrupted_lengths(raw, density, mean)[1] == targets


@pytest.mark.parametrize(
  ("inputs", "density", "mean", "raw", "targets"),
  [(64, 0.2, 2.0, 70, 22), (64, 0.2, 1.0, 63, 27), (10, 0.0, 3.0, 9, 1), (10, 1.0, 1.0, 9, 19), (10, 0.15, 3.0, 10, 4)]
  + [(10, 0.5, 3.0, 14, 10)],
)
def test_lengths_at_the_edges(inputs, density, mean, raw, targets):
  settings = FREE._replace(noise_density=density, mean_span_length=mean)
  assert raw_length("span_corruption", "t5", inputs, 10_000, settings) == raw
  assert corrupted_lengths(raw, density, mean)[1] == targets


def test_targets_must_fit_the_decoder_too():
  raw = raw_length("span_corruption", "t5", 512, 50, FREE)
  assert corrupted_lengths(raw, 0.15, 3.0)[1] <= 50 < corrupted_lengths(raw + 1, 0.15, 3.0)[1]


def test_decoder_only_rows_hold_inputs_and_targets():
  raw = raw_length("span_corruption", "gpt", 0, 256, FREE)
  assert sum(corrupted_lengths(raw, 0.15, 3.0)) <= 256 < sum(corrupted_lengths(raw + 1, 0.15, 3.0))


def test_a_piece_has_no_more_spans_than_sentinels():
  settings = FREE._replace(sentinel_ids=tuple(range(99, 89, -1)))
  raw = raw_length("span_corruption", "t5", 4096, 4096, settings)
  hidden = OBJECTIVES["span_corruption"](np.full(raw, 5, np.int32), np.random.default_rng(0), settings)
  assert len(hidden[0]) < 4096


def test_golden_vector():
  tokens, mask = np.arange(10, 16, dtype=np.int32), np.array([1, 1, 0, 0, 1, 0], bool)
  inputs, targets = hide_spans(tokens, mask, ObjectiveSettings(1, (999, 998)))
  assert inputs.tolist() == [999, 12, 13, 998, 15, 1]
  assert targets.tolist() == [999, 10, 11, 998, 14, 1]


@pytest.mark.parametrize("length", [2, 3, 10, 101, 568])
@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.5, 3.0), (0.3, 1.0), (0.9, 8.0)])
def test_noise_mask_counts_and_ends(length, density, mean):
  mask = noise_mask(length, density, mean, np.random.default_rng(length))
  assert mask.sum() == min(max(round(length * density), 1), length - 1)
  assert not mask[0] and mask[-1]


def test_no_density_no_noise():
  assert not noise_mask(50, 0.0, 3.0, np.random.default_rng(0)).any()


@pytest.mark.parametrize("seed", range(5))
def test_span_corruption_reconstructs_its_text(seed):
  rng = np.random.default_rng(seed)
  sentinels = tuple(range(999, 899, -1))
  tokens = rng.integers(2, 800, 200).astype(np.int32)
  inputs, targets = OBJECTIVES["span_corruption"](tokens, rng, ObjectiveSettings(1, sentinels))
  assert inputs[-1] == targets[-1] == 1
  spans: dict[int, list[int]] = {}
  for token in targets[:-1].tolist():
    if token in sentinels:
      current = spans.setdefault(token, [])
    else:
      current.append(token)
  rebuilt = [t for token in inputs[:-1].tolist() for t in (spans[token] if token in sentinels else [token])]
  assert rebuilt == tokens.tolist()
  assert list(spans) == list(sentinels[: len(spans)])


def test_too_few_sentinels_are_an_error():
  settings = ObjectiveSettings(1, (99,), noise_density=0.5, mean_span_length=1.0)
  with pytest.raises(ValueError, match="the tokenizer has 1"):
    OBJECTIVES["span_corruption"](np.arange(10, dtype=np.int32), np.random.default_rng(0), settings)


def test_next_token_ends_only_where_the_document_ends():
  tokens = np.array([5, 6], np.int32)
  rng = np.random.default_rng(0)
  assert [x.tolist() for x in OBJECTIVES["next_token"](tokens, rng, FREE, True)] == [[], [5, 6, 1]]
  assert [x.tolist() for x in OBJECTIVES["next_token"](tokens, rng, FREE, False)] == [[], [5, 6]]


def test_unknown_objective_lists_the_known():
  with pytest.raises(ValueError, match="span_corruption"):
    raw_length("cloze", "t5", 16, 16, FREE)
