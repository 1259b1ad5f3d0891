"""Objectives: T5's arithmetic exactly, and nothing of the text lost."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.features import CONVERTERS, Example, Layout, capacity, cost
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
  hidden = OBJECTIVES["span_corruption"].make(np.full(raw, 5, np.int32), np.random.default_rng(0), settings)
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


SENTINELS = tuple(range(999, 899, -1))
MODE_IDS = ((900 - 1,), (900 - 2, 900 - 3), (900 - 4,))
FULL = ObjectiveSettings(1, SENTINELS, mode_ids=MODE_IDS)


def rebuild(inputs, targets) -> list[int]:
  """Puts the text together again: what stands after a sentinel in the targets goes to its place in the inputs."""
  modes = {token for ids in MODE_IDS for token in ids}
  inputs = [token for token in inputs.tolist() if token != 1 and token not in modes]
  targets = [token for token in targets.tolist() if token != 1]
  if not any(token in SENTINELS for token in inputs):
    return inputs + targets
  spans: dict[int, list[int]] = {}
  for token in targets:
    if token in SENTINELS:
      current = spans.setdefault(token, [])
    else:
      current.append(token)
  assert list(spans) == list(SENTINELS[: len(spans)])
  return [t for token in inputs for t in (spans[token] if token in SENTINELS else [token])]


@settings(max_examples=60)
@given(
  objective=st.sampled_from(sorted(OBJECTIVES)),
  architecture=st.sampled_from(["gpt", "t5"]),
  rows=st.tuples(st.integers(16, 300), st.integers(16, 300)),
  density=st.floats(0.005, 0.99),
  mean=st.floats(1.0, 9.0),
  short=st.integers(0, 10**6),
  seed=st.integers(0, 10**6),
)
@example(objective="ul2", architecture="gpt", rows=(16, 18), density=0.5, mean=1.0, short=0, seed=0)  # a single token
@example(objective="span_corruption", architecture="gpt", rows=(16, 40), density=0.01, mean=3.0, short=0, seed=0)
@example(objective="text_infilling", architecture="gpt", rows=(16, 24), density=0.99, mean=20.0, short=0, seed=0)
def test_every_objective_fits_its_row_and_loses_nothing(objective, architecture, rows, density, mean, short, seed):
  chosen = FULL._replace(noise_density=density, mean_span_length=mean)
  longest = raw_length(objective, architecture, *rows, chosen)
  layout, rng = Layout(architecture, *rows, start_id=0, eos_id=1), np.random.default_rng(seed)
  for length in (longest, 1 + short % longest):
    tokens = rng.integers(2, 800, length).astype(np.int32)
    inputs, targets = OBJECTIVES[objective].make(tokens, rng, chosen, True)
    assert (np.array(cost(Example(inputs, targets), architecture)) <= capacity(layout)).all()
    whole = targets[:-1].tolist() if objective == "text_infilling" else rebuild(inputs, targets)
    assert whole == tokens.tolist()
    assert targets[-1] == 1 and (len(inputs) == 0 or inputs[-1] == 1)
    CONVERTERS[architecture]([[Example(inputs, targets)]], layout)


def test_masked_tokens_are_single_and_exactly_as_many_as_asked():
  tokens = np.arange(100, 200, dtype=np.int32)
  inputs, targets = OBJECTIVES["masked_lm"].make(tokens, np.random.default_rng(0), FULL, True)
  assert len(inputs) == 101 and len(targets) == 31
  assert sum(token in SENTINELS for token in inputs.tolist()) == 15


def test_text_infilling_hides_as_span_corruption_does():
  tokens = np.arange(100, 200, dtype=np.int32)
  inputs, targets = OBJECTIVES["text_infilling"].make(tokens, np.random.default_rng(0), FULL, False)
  hidden = OBJECTIVES["span_corruption"].make(tokens, np.random.default_rng(0), FULL, False)[0]
  assert inputs.tolist() == hidden.tolist() and targets.tolist() == [*tokens, 1]


def test_prefix_cuts_everywhere():
  tokens, rng = np.arange(100, 105, dtype=np.int32), np.random.default_rng(0)
  cuts = {len(OBJECTIVES["prefix_lm"].make(tokens, rng, FULL, False)[1]) for _ in range(100)}
  assert cuts == {1, 2, 3, 4}


def test_the_middle_may_touch_either_end():
  tokens, rng = np.arange(100, 104, dtype=np.int32), np.random.default_rng(0)
  made = {tuple(OBJECTIVES["fill_in_the_middle"].make(tokens, rng, FULL, True)[1].tolist()) for _ in range(200)}
  assert len(made) == 4 * 5 // 2


def test_ul2_names_its_mode_and_hides_by_it():
  tokens, rng, seen = np.arange(100, 500, dtype=np.int32), np.random.default_rng(0), set()
  for _ in range(100):
    inputs, targets = OBJECTIVES["ul2"].make(tokens, rng, FULL, True)
    mode = next(m for m, ids in enumerate(MODE_IDS) if tuple(inputs[: len(ids)].tolist()) == ids)
    hidden = sum(token not in SENTINELS for token in targets.tolist()) - 1
    seen.add((mode, hidden))
  assert seen == {(0, 60), (1, 200), (1, 60), (2, 100)}


def test_too_few_sentinels_are_an_error():
  settings = ObjectiveSettings(1, (99,), noise_density=0.5, mean_span_length=1.0)
  with pytest.raises(ValueError, match="the tokenizer has 1"):
    OBJECTIVES["span_corruption"].make(np.arange(10, dtype=np.int32), np.random.default_rng(0), settings)


def test_next_token_ends_only_where_the_document_ends():
  tokens = np.array([5, 6], np.int32)
  rng = np.random.default_rng(0)
  assert [x.tolist() for x in OBJECTIVES["next_token"].make(tokens, rng, FREE, True)] == [[], [5, 6, 1]]
  assert [x.tolist() for x in OBJECTIVES["next_token"].make(tokens, rng, FREE, False)] == [[], [5, 6]]


def test_unknown_objective_lists_the_known():
  with pytest.raises(ValueError, match="span_corruption"):
    raw_length("cloze", "t5", 16, 16, FREE)
