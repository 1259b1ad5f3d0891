"""Converters: SeqIO's published vectors."""

import numpy as np
import pytest

from data.features import CONVERTERS, Example, Layout
from tests.conftest import packed_batch


def test_packed_prefix_lm_vector():
  rows = [[Example([7, 8, 5, 1], [3, 9, 1]), Example([8, 4, 9, 3, 1], [4, 1])]]
  layout = Layout("gpt", 0, 15, start_id=0, eos_id=1, bidirectional_prefix=True)
  batch = {key: value[0].tolist() for key, value in CONVERTERS["gpt"](rows, layout).items()}
  assert batch["decoder_target_tokens"] == [7, 8, 5, 1, 3, 9, 1, 8, 4, 9, 3, 1, 4, 1, 0]
  assert batch["decoder_input_tokens"] == [0, 7, 8, 5, 1, 3, 9, 0, 8, 4, 9, 3, 1, 4, 0]
  assert batch["decoder_loss_weights"] == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0]
  assert batch["decoder_positions"] == [*range(7), *range(7), 0]
  assert batch["decoder_segment_ids"] == [1] * 7 + [2] * 7 + [0]
  assert batch["decoder_bidirectional"] == [1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0]


def test_encoder_decoder_segments_correspond():
  rows = [[Example([7, 8, 1], [3, 1], 0), Example([], [4, 5, 1], 1)]]
  batch = {k: v[0].tolist() for k, v in CONVERTERS["t5"](rows, Layout("t5", 6, 7, start_id=0, eos_id=1)).items()}
  assert batch["encoder_input_tokens"] == [7, 8, 1, 1, 0, 0]  # empty inputs read EOS
  assert batch["encoder_segment_ids"] == [1, 1, 1, 2, 0, 0]
  assert batch["encoder_positions"] == [0, 1, 2, 0, 0, 0]
  assert batch["decoder_input_tokens"] == [0, 3, 0, 4, 5, 0, 0]
  assert batch["decoder_target_tokens"] == [3, 1, 4, 5, 1, 0, 0]
  assert batch["decoder_loss_weights"] == [1, 1, 1, 1, 1, 0, 0]
  assert batch["task_ids"] == [0, 0, 1, 1, 1, -1, -1]


def test_example_normalisation_weighs_each_example_once():
  rows = [[Example([9], [5, 6, 7, 8])], [Example([9], [5, 1])]]
  layout = Layout("t5", 4, 10, start_id=0, eos_id=1, loss_normalisation="example")
  weights = CONVERTERS["t5"](rows, layout)["decoder_loss_weights"]
  assert weights[:, :4].tolist() == [[0.25] * 4, [0.5, 0.5, 0, 0]]
  assert weights.sum() == 2


def test_task_normalisation_weighs_by_the_usual_length():
  rows = [[Example([9], [5, 6, 7, 8], 0, usual=2.0), Example([9], [5, 1], 1, usual=4.0)]]
  layout = Layout("t5", 4, 8, start_id=0, eos_id=1, loss_normalisation="task")
  assert CONVERTERS["t5"](rows, layout)["decoder_loss_weights"].tolist() == [[0.5] * 4 + [0.25] * 2 + [0] * 2]


@pytest.mark.parametrize("architecture", ["t5", "gpt"])
def test_dtypes(architecture):
  for key, value in packed_batch(architecture).items():
    assert value.dtype == (np.float32 if key == "decoder_loss_weights" else np.int32), key
